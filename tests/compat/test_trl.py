"""TRL's config and trainer by its own names: every field is there with its default, and means what it means in TRL."""

import dataclasses
import importlib.util
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from models import save_reward_model
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments

from tunix_torch.checkpoints.publishing import uploaded_files
from tunix_torch.cli import ask
from tunix_torch.cli.answering import Asked
from tunix_torch.compat.trl import REFUSED_ARGUMENTS, GRPOConfig, GRPOTrainer
from tunix_torch.compat.trl_config import FIELDS, REMOVED, to_ours
from tunix_torch.model.loading import load_model
from tunix_torch.run.export import export_merged

ROWS = [{"prompt": f"Say {i}.", "n": i} for i in range(12)]
has_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def length_reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


def make_trainer(model, folder, reward_funcs=length_reward, rows=ROWS, peft_config=None, **settings):
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6} | settings
    settings = {"report_to": "none", "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3} | settings
    return GRPOTrainer(model, reward_funcs, GRPOConfig(str(folder), **settings), rows, peft_config=peft_config)


# ---- the config ----


@has_trl
def test_every_field_of_trl_is_there_with_its_default():
    from trl import GRPOConfig as Theirs

    usual = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    theirs = {
        field.name: field.default
        for field in dataclasses.fields(Theirs)
        if field.name not in usual or field.default != usual[field.name].default
    }
    assert theirs.keys() == FIELDS.keys()
    different = {name for name, default in theirs.items() if FIELDS[name].default != default}
    assert different == {"gradient_checkpointing"}, "it changes memory and time, and no number"


def test_each_field_has_a_name_here_or_says_what_becomes_of_it():
    ours = {field.name for field in dataclasses.fields(to_ours(GRPOConfig("out", report_to="none")))}
    for name, field in FIELDS.items():
        assert field.ours in (None, *ours), name
        assert field.ours or field.note, f"{name}: nothing says what becomes of it"


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.refused])
def test_what_is_not_there_is_refused_in_one_line_with_the_reason(name):
    values = {"dict": {"a": 1}, "bool": True, "int": 3, "float": 0.5, "str": "x"}
    value = next(value for kind, value in values.items() if kind in str(FIELDS[name].type))
    with pytest.raises(ValueError, match=rf"^{name}=.*{re.escape(FIELDS[name].note)}$"):
        GRPOConfig("out", **{name: value})


@pytest.mark.parametrize(
    "theirs, ours",
    [
        # (completions a part, accumulated, group, parts a rollout) -> (prompts, accumulated, steps a rollout, a pass)
        ((8, 1, 8, None), (1, 1, 1, None)),
        ((8, 1, 4, None), (2, 1, 1, None)),
        ((2, 4, 4, None), (2, 1, 1, 2)),
        ((4, 2, 2, None), (4, 1, 1, 4)),
        ((4, 2, 2, 8), (4, 1, 4, 4)),
        ((4, 4, 2, 2), (4, 2, 1, 4)),
        ((3, 2, 2, None), (3, 1, 1, None)),
    ],
)
def test_a_step_learns_from_as_many_completions_as_in_trl(theirs, ours):
    part, accumulated, group, parts = theirs
    settings = {"per_device_train_batch_size": part, "gradient_accumulation_steps": accumulated}
    args = to_ours(GRPOConfig("out", num_generations=group, steps_per_generation=parts, report_to="none", **settings))
    rows_of_a_pass = args.micro_batch_size
    found = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.steps_per_generation)
    assert (*found, rows_of_a_pass) == ours
    completions = args.rows_per_step * args.gradient_accumulation_steps
    assert completions == part * accumulated, "an optimizer step learns from other completions"
    assert args.rows_per_step * args.steps_per_generation * args.gradient_accumulation_steps == part * max(
        accumulated, parts or accumulated
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_generations": 5}, "num_generations=5: per_device_train_batch_size=8 times steps_per_generation=1"),
        (
            {"generation_batch_size": 12},
            "generation_batch_size=12: must be a multiple of per_device_train_batch_size=8",
        ),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, "generation_batch_size=16: steps_per_generation=2"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "steps_per_generation=3: it or gradient_acc"),
        ({"loss_type": "ppo"}, "loss_type='ppo': choose one of"),
        ({"model_init_kwargs": "{dtype"}, "model_init_kwargs='{dtype': "),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        GRPOConfig("out", **settings)


@pytest.mark.parametrize(
    "name, message",
    [("num_generation", "; did you mean 'num_generations'?"), *((name, f": {hint}") for name, hint in REMOVED.items())],
)
def test_a_name_that_is_not_there_gets_the_nearest_or_what_older_scripts_should_do(name, message):
    with pytest.raises(TypeError, match="^" + re.escape(f"GRPOConfig has no setting {name!r}{message}") + "$"):
        GRPOConfig("out", **{name: 4})
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    _, gives, instead = message.partition("; give ")
    assert name not in names and (not gives or instead.split(",")[0] in names)


def test_the_config_is_read_from_flags_printed_and_pickled(tmp_path):
    flags = f"--output_dir {tmp_path} --num_generations 4 --beta 0.1 --max_completion_length 32 --report_to none"
    (args,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(flags.split())
    assert (args.num_generations, args.beta, args.max_completion_length) == (4, 0.1, 32)
    assert to_ours(args).kl_penalty_coef == 0.1
    assert json.loads(args.to_json_string())["num_generations"] == 4
    assert pickle.loads(pickle.dumps(args)).beta == 0.1


# ---- the trainer ----


def test_without_a_peft_config_all_weights_learn_and_with_one_the_lora(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path / "a")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert load_model(str(tmp_path / "a" / "checkpoint-2")).config.model_type == "gemma3_text"

    trainer = make_trainer(model_folder, tmp_path / "b", peft_config=LoraConfig(target_modules="all-linear"))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(before[name], p)}
    assert changed and all("lora_" in name for name in changed)


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=2, target_modules="all-linear")], ids=["all", "lora"])
@pytest.mark.parametrize("as_messages", [False, True])
def test_what_was_trained_is_asked_in_the_form_of_its_questions(as_messages, peft_config, model_folder, tmp_path):
    """Also by the code on its card, which names no file of settings: a script has made the trainer."""
    questions = [[{"role": "user", "content": row["prompt"]}] if as_messages else row["prompt"] for row in ROWS]
    rows = [{"prompt": question} for question in questions]
    trainer = make_trainer(model_folder, tmp_path, rows=rows, peft_config=peft_config)
    trainer.save_model()
    trainer.save_state()
    asked = Asked(ask.parse_args(["--question", "?"], "ask"), str(tmp_path))
    text, ids = asked.prompt("1 + 1?")
    assert ("<start_of_turn>user\n1 + 1?<end_of_turn>" in text) == as_messages and asked.system_message == ""
    rendered = trainer.processing_class.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False)
    assert not as_messages or text.startswith(rendered)
    card = (tmp_path / "README.md").read_text()
    assert ("apply_chat_template" in card) == as_messages and "--config" not in card
    copy, merged = (tmp_path.with_name(f"{tmp_path.name}-{name}") for name in ("copy", "merged"))
    export_merged(tmp_path, merged)
    for name in uploaded_files(tmp_path):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / name, copy / name)
    for folder in (merged, copy):
        asked = Asked(ask.parse_args(["--question", "?"], "ask"), str(folder))
        assert asked.prompt("1 + 1?") == (text, ids), "as a plain model, and as a copy of what is uploaded"


def test_prompts_and_columns_reach_rewards_as_they_stand_however_long(model_folder, tmp_path):
    seen = []

    def reward(prompts, completions, n, **kwargs):
        seen.extend(zip(prompts, n, strict=True))
        return [float(len(text)) for text in completions]

    rows = [{"prompt": "1 + 1 " * i, "n": i} for i in range(1, 9)]
    make_trainer(model_folder, tmp_path, reward, rows, max_steps=4).train()
    assert set(seen) == {(row["prompt"], row["n"]) for row in rows}


def test_it_is_evaluated_with_the_loss_of_trl_where_rewards_decide_it(model_folder, tmp_path):
    """Where ratios are 1, TRL's loss is minus the mean over tokens of their advantages."""
    trainer = make_trainer(model_folder, tmp_path, num_generations_eval=3, per_device_eval_batch_size=6)
    metrics = trainer.evaluate(ROWS[:4])
    assert {"eval_reward", "eval_rewards/length_reward/mean", "eval_sampled/reward"} <= metrics.keys()
    assert abs(metrics["eval_loss"]) < 1
    assert "eval_loss" not in make_trainer(model_folder, tmp_path, beta=0.1).evaluate(ROWS[:4])


def test_attributes_that_scripts_of_trl_read(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, [length_reward, length_reward], reward_weights=[1.0, 0.5], beta=0.1)
    assert trainer.reward_func_names == ["length_reward", "length_reward_2"]
    assert trainer.reward_weights.tolist() == [1.0, 0.5] and trainer.reward_processing_classes == [None, None]
    names = {name for name, _ in trainer.model.named_parameters()}
    assert {name for name, _ in trainer.ref_model.named_parameters()} == names
    assert make_trainer(model_folder, tmp_path).ref_model is None


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_arguments_that_are_not_there_are_refused(name, model_folder, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}="):
        GRPOTrainer(model_folder, length_reward, GRPOConfig(str(tmp_path)), ROWS, **{name: [print]})


def test_missing_data_or_rewards_are_one_line(model_folder, tmp_path):
    with pytest.raises(ValueError, match="train_dataset=None: "):
        GRPOTrainer(model_folder, length_reward, GRPOConfig(str(tmp_path)))
    with pytest.raises(ValueError, match="reward_funcs=None: "):
        GRPOTrainer(model_folder, None, GRPOConfig(str(tmp_path)), ROWS)
    with pytest.raises(ValueError, match="args: a TrainingArguments; "):
        GRPOTrainer(model_folder, length_reward, TrainingArguments(str(tmp_path)), ROWS)


# ---- the page ----


@pytest.fixture(scope="module")
def reward_model_folder(tmp_path_factory):
    """A reward model with random weights and the tiny model's tokenizer."""
    return str(save_reward_model(tmp_path_factory.mktemp("reward") / "model"))


def test_the_scripts_of_the_page_run(model_folder, reward_model_folder, tmp_path, monkeypatch):
    import datasets

    page = (Path(__file__).parent.parent.parent / "docs" / "from_trl.md").read_text()
    scripts = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "GRPOTrainer(" in block]
    assert len(scripts) == 3
    monkeypatch.chdir(tmp_path)

    def load_dataset(name, config=None, split=None):
        if "gsm8k" in name:
            rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(64)]
        else:
            rows = [{"prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(16)]
        rows = datasets.Dataset.from_list(rows)
        return rows if split else datasets.DatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    small = "max_completion_length=4, max_steps=2, report_to='none', "
    for script in scripts:
        script = script.replace("google/gemma-3-270m-it", model_folder)
        script = script.replace("Skywork/Skywork-Reward-V2-Qwen3-0.6B", reward_model_folder)
        script = script.replace("max_completion_length=256", "max_completion_length=8").replace("range(64)", "range(4)")
        script = re.sub(r"(GRPOConfig\(\"[^\"]*\", )", r"\1" + small, script)
        script = script.replace(", max_completion_length=8)", ")").replace("eval_steps=50", "eval_steps=1")
        space = {"__name__": "script"}
        exec(compile(script, "docs/from_trl.md", "exec"), space)
        assert space["trainer"].state.global_step == 2
