"""A resumed run is the run that left its checkpoint: other settings, rows, rewards and base weights are refused."""

import dataclasses
import json
import shutil

import pytest
import torch
from commands import refused
from datasets import Dataset, IterableDataset
from runs import SMALL, files, run
from safetensors.torch import load_file, save_file
from trainers import digits_reward, ends_early
from transformers import AutoModelForCausalLM

from tunix_torch import DataConfig, GRPOConfig, ModelConfig, TunixTrainer
from tunix_torch.checkpoints.manifest import BOTH
from tunix_torch.cli import train
from tunix_torch.config.saved import RUN_FILE, check_same_run, settings_of
from tunix_torch.data import fingerprint as of_rows
from tunix_torch.data.batches import PromptStream
from tunix_torch.data.rows import PROMPT_IDS, WHERE
from tunix_torch.model import fingerprint as of_weights
from tunix_torch.model import tiny
from tunix_torch.model.loading import add_lora, load_model, lora_config, place

ROWS = tiny.arithmetic_rows("train", 16)


def make(model, output_dir, rows=ROWS, reward=digits_reward, **settings):
    args = GRPOConfig(output_dir=str(output_dir), **(SMALL | {"max_steps": 2, "eval_steps": None} | settings))
    return TunixTrainer(model, reward, args, rows, tiny.arithmetic_rows("test", 4))


@pytest.fixture(scope="module")
def checkpoint(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    make(model_folder, folder).train()
    return folder / "checkpoint-2"


@pytest.fixture(scope="module")
def other_model(model_folder, tmp_path_factory):
    """A model of which one number of one weight differs."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


CHANGES = {
    "learning_rate": {"learning_rate": 2e-2},
    "adam_beta2": {"adam_beta2": 0.9},
    "data_seed": {"data_seed": 3},
    "lr_scheduler_kwargs": {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "constant"},
    "training_data": {"rows": [*ROWS[:-1], ROWS[-1] | {"answer": "0"}]},
    "base_weights": {},
    "reward_functions": {"reward": ends_early},
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_what_is_learned_is_refused_unless_it_is_allowed_by_name(
    name, checkpoint, model_folder, other_model, tmp_path, caplog
):
    """Without `train` there is no config.json, so the checkpoint itself must know."""
    model = other_model if name == "base_weights" else model_folder
    with pytest.raises(ValueError, match=f"^{name}=.*would be resumed.*allow_changes={name}"):
        make(model, tmp_path, **CHANGES[name], max_steps=3).train(resume_from_checkpoint=str(checkpoint))
    allowed = make(model, tmp_path, **CHANGES[name], max_steps=3, save_steps=3, allow_changes=[name])
    allowed.train(resume_from_checkpoint=str(checkpoint))
    assert allowed.state.global_step == 3
    lines = [record.getMessage() for record in caplog.records if "allow_changes" in record.getMessage()]
    assert len(lines) == 1 and f"{name}=" in lines[0] and "(was " in lines[0], lines
    caplog.clear()
    later = make(model, tmp_path, **CHANGES[name], max_steps=4)  # from here on the change is the run's own
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert later.state.global_step == 4 and "allow_changes" not in caplog.text


@pytest.mark.parametrize("schedule", ["constant", "linear", "reduce_lr_on_plateau"])
def test_a_change_that_is_allowed_is_in_force(schedule, model_folder, tmp_path):
    """The states of optimizer and schedule hold the settings of the earlier run, which loading would bring back."""
    how = {"lr_scheduler_type": schedule}
    if schedule == "reduce_lr_on_plateau":
        how |= {"eval_steps": 1, "eval_strategy": "steps"}
    make(model_folder, tmp_path, **how).train()
    changes = {"learning_rate": 2e-2, "adam_beta2": 0.9, "weight_decay": 0.1, "adam_epsilon": 1e-6}
    changed = make(model_folder, tmp_path, **how, **changes, max_steps=4, allow_changes=list(changes))
    changed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rates = [row["learning_rate"] for row in changed.state.log_history if "learning_rate" in row]
    expected = [1e-2, 5e-3, 1e-2, 5e-3] if schedule == "linear" else [1e-2, 1e-2, 2e-2, 2e-2]
    assert rates == pytest.approx(expected)
    for group in changed.optimizer.param_groups:
        decay = group["weight_decay"]
        assert (group["betas"], group["eps"], decay) in (((0.9, 0.9), 1e-6, 0.1), ((0.9, 0.9), 1e-6, 0.0))


def test_what_the_first_run_had_beside_the_defaults_may_not_be_left_out(checkpoint, model_folder, tmp_path):
    make(model_folder, tmp_path, adam_beta2=0.9, data_seed=3, max_steps=1, save_steps=1).train()
    with pytest.raises(ValueError, match=r"^adam_beta2=0.999: .*would be resumed.* has 0.9"):
        make(model_folder, tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_copied_checkpoint_alone_knows_the_settings_of_its_whole_job(finished_run, model_folder, tmp_path):
    shutil.copytree(finished_run / "checkpoint-2", tmp_path / "checkpoint-2")
    again = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with pytest.raises(ValueError, match="^learning_rate=0.1: .*would be resumed"):
        run(model_folder, tmp_path / "out", learning_rate=0.1, **again)
    with pytest.raises(ValueError, match="^judge='format': .*would be resumed"):
        run(model_folder, tmp_path / "out", judge="format", **again)
    assert not (tmp_path / "out").exists()
    run(model_folder, tmp_path / "out", **again)
    written = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert written == (finished_run / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("with_config", [True, False])
def test_checkpoints_from_before_these_facts_were_written_resume(
    with_config, finished_run, model_folder, tmp_path, caplog
):
    shutil.copytree(finished_run / "checkpoint-2", tmp_path / "checkpoint-2")
    for name in (RUN_FILE, *BOTH):
        (tmp_path / "checkpoint-2" / name).unlink()
    again = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    if with_config:
        shutil.copy(finished_run / "config.json", tmp_path)
        with pytest.raises(ValueError, match="^learning_rate=0.1: .*would be resumed"):
            run(model_folder, tmp_path / "out", learning_rate=0.1, **again)
    run(model_folder, tmp_path / "out", **again)
    assert ("can't be compared" in caplog.text) is not with_config
    assert (tmp_path / "out" / "checkpoint-4" / RUN_FILE).is_file()


def test_the_config_of_a_whole_model_beside_a_checkpoint_is_not_taken_for_settings(model_folder, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    shutil.copy(f"{model_folder}/config.json", tmp_path)
    check_same_run(settings_of(ModelConfig(), DataConfig(), GRPOConfig(seed=7)), tmp_path / "checkpoint-1")


def test_a_name_that_is_no_setting_can_not_be_allowed(tmp_path):
    with pytest.raises(ValueError, match="^allow_changes='learning_rat': .*did you mean 'learning_rate'"):
        GRPOConfig(output_dir=str(tmp_path), allow_changes=["learning_rat"])


# ---- fingerprints ----


def test_rows_are_known_by_their_content_and_order_not_by_their_place_or_type():
    rows = [{"question": f"{n}?", "answer": [n, None], WHERE: f"a.jsonl, row {n}"} for n in range(40)]
    known = of_rows.fingerprint_of(rows)
    assert known == of_rows.fingerprint_of([row | {WHERE: "elsewhere"} for row in rows])
    assert known == of_rows.fingerprint_of(Dataset.from_list(rows))
    assert known == of_rows.fingerprint_of([dict(reversed(row.items())) for row in rows])
    others = [rows[::-1], rows[:-1], [*rows[:-1], rows[-1] | {"answer": [1, 2]}], [row | {"more": 1} for row in rows]]
    assert len({known, *map(of_rows.fingerprint_of, others)}) == 5


def test_large_data_sets_are_read_in_part(monkeypatch):
    monkeypatch.setattr(of_rows, "MOST_ROWS", 10)
    rows = [{"question": str(n)} for n in range(95)]
    read = [row["question"] for row in of_rows._spread(rows)]
    assert len(read) == 10 and read == Dataset.from_list(rows).select(range(0, 95, 10))["question"][:]


def test_the_first_rows_of_a_stream_are_not_lost():
    """Also where the stream can be read once only."""
    once = iter([{"question": str(n), PROMPT_IDS: [n]} for n in range(100)])
    stream = PromptStream(IterableDataset.from_generator(lambda: once), lambda rows, numbers: rows, 9999, None, "drop")
    first = of_rows.fingerprint_of(stream)
    drawn = iter(stream)
    assert [next(drawn)["question"] for _ in range(100)] == [str(n) for n in range(100)]
    assert first == of_rows.fingerprint_of(stream) and "a stream" in first


def test_the_optimizer_may_not_be_allowed_to_change(tmp_path):
    with pytest.raises(ValueError, match="allow_changes='optim': the optimizer's state"):
        GRPOConfig(str(tmp_path), allow_changes=["optim"])


def test_the_rows_of_a_stream_are_known_before_it_is_read(model_folder, tmp_path):
    """Regression: the fingerprint was taken at the first save, of rows that the run then lost."""
    given = tiny.arithmetic_rows("train", 64)
    facts = []
    for name, save_steps in (("a", 1), ("b", 3)):
        args = GRPOConfig(str(tmp_path / name), max_steps=3, save_steps=save_steps, report_to="none", use_grpo=False)
        TunixTrainer(model_folder, None, args, IterableDataset.from_generator(lambda: iter(given))).train()
        facts.append(json.loads((tmp_path / name / "checkpoint-3" / "run.json").read_text())["training_data"])
    assert facts[0] == facts[1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("xla", marks=pytest.mark.xla)])
def test_base_weights_are_the_same_wherever_they_lie_and_whatever_was_learned(device, model_folder):
    model = add_lora(AutoModelForCausalLM.from_pretrained(model_folder), lora_config(ModelConfig()))

    def fingerprint(model):
        return of_weights.fingerprint_of(model, [x for name, x in model.named_parameters() if "lora" in name])

    known = fingerprint(model)
    for name, weight in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weight)
    assert fingerprint(model) == known
    assert fingerprint(place(model)) == known
    half = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    assert fingerprint(add_lora(half, lora_config(ModelConfig()))) == known


def test_a_change_of_a_large_weight_is_seen_where_it_touches_many_rows():
    layer = torch.nn.Linear(2048, 4096, bias=False)
    known, kept = of_weights.fingerprint_of(layer, []), layer.weight.detach().clone()
    for column in (0, 700, 1024, 2047):  # blocks fall on all columns
        layer.weight.data[:, column] += 1.0
        assert of_weights.fingerprint_of(layer, []) != known, column
        layer.weight.data.copy_(kept)
    layer.weight.data *= 1.01
    assert of_weights.fingerprint_of(layer, []) != known


def test_every_checkpoint_lists_the_facts_in_its_manifest(checkpoint):
    facts = json.loads((checkpoint / RUN_FILE).read_text())
    compared = {"settings", "training_data", "base_weights", "reward_functions", "processes"}
    assert set(facts) == compared | {"questions_are_messages"}
    assert {field.name for field in dataclasses.fields(GRPOConfig)} >= set(facts["settings"])
    assert RUN_FILE in json.loads((checkpoint / BOTH[0]).read_text())
    assert "16 rows" in facts["training_data"] and facts["reward_functions"] == ["digits_reward"]


@pytest.mark.thorough
def test_other_rows_under_the_same_name_are_refused_by_the_command(call, model_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n' * 8)
    flags = (
        "--use_grpo --batch_size 2 --max_completion_length 4 --report_to none --save_steps 1 --system_message=".split()
    )
    flags += ["--model_name", model_folder, "--data_path", path, "--output_dir", tmp_path / "out"]
    assert call(train, *flags, "--max_steps", 1).returncode == 0
    path.write_text('{"question": "1 + 2?", "answer": "3"}\n' * 8)
    more = [*flags, "--max_steps", 2, "--resume_from_checkpoint", "auto"]
    before = files(tmp_path / "out")
    refused(call(train, *more), "training_data='8 rows, ", "allow_changes=training_data")
    assert files(tmp_path / "out") == before
    assert call(train, *more, "--allow_changes", "training_data").returncode == 0
    assert (tmp_path / "out" / "checkpoint-2").is_dir() and not (tmp_path / "out" / "previous").exists()


def test_an_adapter_on_another_base_is_loaded_with_a_warning(model_folder, tmp_path, caplog):
    """Whoever asks or evaluates it would take what comes of it for what was trained."""
    shutil.copytree(model_folder, tmp_path / "base")
    make(str(tmp_path / "base"), tmp_path / "out").save_model()
    load_model(str(tmp_path / "out"))
    assert "is not the one" not in caplog.text
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    load_model(str(tmp_path / "out"))
    said = f"{tmp_path / 'out'}: the base model in {tmp_path / 'base'} is not the one that it was trained on"
    assert said in caplog.text


@pytest.mark.parametrize("kind, is_said", [("constant", False), ("linear", True)])
def test_another_length_is_said_where_the_schedule_changes(kind, is_said, model_folder, tmp_path, caplog):
    make(model_folder, tmp_path, lr_scheduler_type=kind).train()
    longer = make(model_folder, tmp_path, lr_scheduler_type=kind, max_steps=3)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    said = "max_steps=3 (was 2): the learning rate goes on along the schedule of the new length"
    assert (said in caplog.text) == is_said
    caplog.clear()
    more = make(model_folder, tmp_path, lr_scheduler_type=kind, num_train_epochs=5)  # which max_steps outweighs
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "the learning rate goes on" not in caplog.text


def test_a_run_that_begins_where_another_has_been_says_what_it_may_overwrite(checkpoint, model_folder, caplog):
    make(model_folder, checkpoint.parent, max_steps=1, save_strategy="no").train()
    assert f"output_dir={str(checkpoint.parent)!r} holds checkpoint-2 of an earlier run" in caplog.text
