"""run_training.py runs every command of agent-tunix's guide, with its nested settings, run folders and sweeps."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from tunix_torch import GRPOTrainingConfig, train
from tunix_torch.cli import hydra_app, sections
from tunix_torch.compat.agent_tunix import (
    AlgorithmConfig,
    EvaluationConfig,
    GenerationConfig,
    OptimizerConfig,
    TrainingConfig,
)
from tunix_torch.config.data import DataConfig
from tunix_torch.config.flags import parse_job
from tunix_torch.config.model import ModelConfig
from tunix_torch.model import tiny

ROOT = Path(__file__).parent.parent.parent
CONF = ROOT / "conf"
# These overrides make a documented command short enough for a test.
SHORT = (
    "training.max_steps=2 training.micro_batch_size=2 evaluation.num_eval_completions=2 data.num_eval_rows=4 "
    "data.num_train_rows=16"
).split()
NARROW = ["generation.max_generation_steps=12"]


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    """An empty working directory, with the tiny model in the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNIX_CACHE", cache)
    return tmp_path


@pytest.fixture
def without_hydras_log(monkeypatch):
    """Let Hydra run in this process: it leaves pytest's log handlers alone, and its changes end with the test."""
    monkeypatch.setattr(sys, "argv", ["run_training.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr("hydra.core.utils.configure_log", lambda *args: None)


def job_of(*overrides, folder="run"):
    """Return the job that `run_training.py OVERRIDES` would run."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return hydra_app.config_from(compose("config", list(overrides)), folder)


def settings_of(*overrides):
    return job_of(*overrides).flat()


def run(*overrides, folder="run"):
    """Run the job of these overrides in this process, and return its saved settings and its metrics."""
    job = job_of(*overrides, folder=folder)
    train(job)
    return saved(job.checkpoint_dir or job.output_dir)


def saved(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return json.loads((Path(folder) / "config.json").read_text()), rows


def command(*overrides, cwd, **environment):
    """Run `run_training.py OVERRIDES` in a process of its own, as people do."""
    env = {**os.environ, "TUNIX_DEVICE": "cpu", **environment}
    words = [sys.executable, str(ROOT / "run_training.py"), *overrides]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def numbers(rows):
    """Return the metrics without those of speed, which differ from run to run."""
    return [{k: v for k, v in row.items() if not re.search("time|second", k)} for row in rows]


# ---- the documented commands ----


def make_hugging_face_cache(root, model_folder):
    """Make a cache as downloads leave it, of a tiny random google/gemma-3-270m-it and eight rows a split of gsm8k."""
    import datasets

    repository = root / "hub" / "models--google--gemma-3-270m-it"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    os.symlink(model_folder, repository / "snapshots" / "abc")

    rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(8)]
    folder = root / "datasets" / "openai___gsm8k" / "main" / "0.0.0" / "abc"
    splits = datasets.SplitDict(dataset_name="gsm8k")
    for split in ("train", "test"):
        table = datasets.Dataset.from_list(rows)
        table.save_to_disk(root / split)
        folder.mkdir(parents=True, exist_ok=True)
        os.rename(root / split / "data-00000-of-00001.arrow", folder / f"gsm8k-{split}.arrow")
        splits.add(datasets.SplitInfo(split, num_examples=8, dataset_name="gsm8k"))
    info = datasets.DatasetInfo(
        features=table.features, splits=splits, builder_name="parquet", dataset_name="gsm8k", config_name="main"
    )
    info.version = datasets.Version("0.0.0")
    info.write_to_directory(folder)
    return {"HF_HOME": str(root), "HF_HUB_OFFLINE": "1"}


@pytest.mark.thorough
def test_model_gemma3_270m_micro_batch_size_1(here, model_folder):
    offline = make_hugging_face_cache(here / "hf", model_folder)
    words = ["model=gemma3_270m", "training.micro_batch_size=1"]
    result = command(*words, "training.max_steps=1", "generation.max_generation_steps=8", cwd=here, **offline)
    assert result.returncode == 0, result.stderr
    assert "8 training rows, 8 evaluation rows" in result.stdout
    (folder,) = here.glob("outputs/tunix-grpo/*/*")
    config, rows = saved(folder)
    assert config["model_name"] == "google/gemma-3-270m-it" and config["dataset"] == "gsm8k"
    assert config["per_device_train_batch_size"] == 1 and any("reward" in row for row in rows)


def test_model_lora_rank_8(here):
    run("model.lora_rank=8", *SHORT, *NARROW)
    assert json.loads(Path("run/adapter_config.json").read_text())["r"] == 8


def test_generation_lengths(here):
    words = ["generation.max_prompt_length=128", "generation.max_generation_steps=256"]
    shorter = "training.max_steps=1 evaluation.num_eval_completions=0 evaluation.eval_on_start=false".split()
    config, _ = run(*words, *SHORT, *shorter)
    assert (config["max_prompt_length"], config["generation_max_length"]) == (128, 256)


def test_grpo_num_generations_2(here):
    config, rows = run("grpo.num_generations=2", *SHORT, *NARROW)
    assert config["num_completions_per_prompt"] == 2 and any("reward" in row for row in rows)


def test_wandb_disabled_true(here, monkeypatch):
    config, _ = run("wandb_disabled=true", *SHORT, *NARROW)
    assert "wandb" not in config.get("report_to", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb_disabled=False: wandb is not installed"):
        settings_of("wandb_disabled=false")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert settings_of("wandb_disabled=false")[2].report_to == ["tensorboard", "wandb"]


def test_mesh_of_one_device_trains(here):
    config, _ = run('model.mesh_shape=[[1,1],["fsdp","tp"]]', *SHORT, *NARROW)
    assert (config["mesh_shape"], config["mesh_axes"]) == ("1,1", "fsdp,tp")


def test_mesh_shape_2_2_fsdp_tp(here, without_hydras_log):
    with pytest.raises(ValueError, match="mesh_shape='2,2'") as refused:  # this process has one device
        sections.main(CONF, ['model.mesh_shape=[[2,2],["fsdp","tp"]]'])
    (log,) = here.glob("outputs/tunix-grpo/*/*/train.log")
    assert log.read_text() == f"error: {refused.value}\n"
    assert settings_of("model.mesh_shape=[[2,2],[fsdp,tp]]")[0].mesh_shape == "2,2"  # a shell drops quotes


def test_checkpoint_dir_resumes_from_the_newest(here, capsys, caplog):
    words = ["checkpoint_dir=./checkpoints/ckpts/", "training.save_interval_steps=1", *SHORT, *NARROW]
    _, whole = run(*words)
    folder = Path("checkpoints/ckpts")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert "Continuing" not in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run(*words)
    assert "The run is finished: checkpoints/ckpts/checkpoint-2 holds its last step, 2." in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    (folder / "checkpoint-2" / "trainer_state.json").write_text('{"epoch"')  # a crash would leave it so
    (folder / "trainer_state.json").unlink()
    _, resumed = run(*words)
    assert "Continuing from checkpoints/ckpts/checkpoint-1" in capsys.readouterr().out
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    steps = [row for row in numbers(whole) if "reward" in row]
    assert [row for row in numbers(resumed) if "reward" in row] == steps
    assert not (folder / "previous").exists()

    run(*words, "training.max_steps=3")  # one step more than before
    assert "Continuing from checkpoints/ckpts/checkpoint-2" in capsys.readouterr().out
    assert (folder / "checkpoint-3").is_dir()


def test_a_size_without_its_section_would_be_trained_by_the_tiny_models_settings():
    with pytest.raises(ValueError, match=r"model.model_size='270m': .*choose model=gemma3_270m"):
        job_of("model.model_size=270m")


def test_experiment_quick_test(here, cache):
    result = command("+experiment=quick_test", cwd=here, TUNIX_CACHE=cache)
    assert result.returncode == 0, result.stderr
    (folder,) = here.glob("outputs/tunix-grpo/*/*")
    assert re.fullmatch(r"outputs/tunix-grpo/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", str(folder.relative_to(here)))
    assert {"config.json", "adapter_model.safetensors", "metrics.jsonl", "checkpoint-10"} <= set(os.listdir(folder))
    log = (folder / "train.log").read_text().splitlines()
    shown = [line for line in log if not line or line not in result.stderr]  # warnings are on stderr
    assert shown == re.sub(r"^[ \r]+(?=step)", "", result.stdout, flags=re.MULTILINE).splitlines()
    assert "step   10/10" in result.stdout and "accuracy (greedy)" in result.stdout


def test_model_gemma3_1b_experiment_full_training(here, model_folder):
    words = ["model=gemma3_1b", "+experiment=full_training"]
    model, data, args = settings_of(*words)
    assert (model.model_name, model.lora_rank, data.dataset) == ("google/gemma-3-1b-it", 32, "gsm8k")
    assert (args.max_steps, args.save_steps, args.eval_steps, args.save_total_limit) == (3738, 500, 500, 4)
    local = ["model.model_size=null", f"model.model_name={model_folder}", "data.dataset=null"]
    run(*words, *local, *SHORT, *NARROW)


def test_multirun_over_learning_rates(here, cache):
    rates = "optimizer.learning_rate=1e-6,3e-6,1e-5"
    result = command("--multirun", rates, *SHORT, *NARROW, cwd=here, TUNIX_CACHE=cache)
    assert result.returncode == 0, result.stderr
    (sweep,) = here.glob("multirun/*/*")
    jobs = json.loads((sweep / "sweep.json").read_text())
    assert [job["number"] for job in jobs] == [0, 1, 2] and all(job["error"] is None for job in jobs)
    assert all({"accuracy", "mean@2", "reward"} == set(job["results"]) for job in jobs)
    table = result.stdout[result.stdout.index("  # overrides") :].splitlines()
    assert [line.split()[1] for line in table[1:4]] == [
        f"optimizer.learning_rate={r}" for r in ("1e-06", "3e-06", "1e-05")
    ]
    assert all((sweep / number / "train.log").read_text().count("step    2/2") == 2 for number in "012")
    assert json.loads((sweep / "2" / "config.json").read_text())["learning_rate"] == 1e-5

    # The third job has the numbers that it would have had alone.
    _, alone = run("optimizer.learning_rate=1e-5", *SHORT, *NARROW)
    for after_others, first in zip(numbers(saved(sweep / "2")[1]), numbers(alone), strict=True):
        assert after_others == pytest.approx(first, rel=1e-4, abs=1e-7)


@pytest.mark.thorough
def test_a_failed_job_does_not_stop_a_sweep(here, cache):
    words = ["--multirun", "grpo.num_generations=1,2", "output_dir=mine", *SHORT, *NARROW]
    words += ["generation.max_prompt_length=24"]  # some prompts are longer, which is worth a warning
    result = command(*words, cwd=here, TUNIX_CACHE=cache)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    (path,) = here.glob("multirun/*/*/sweep.json")
    failed, good = json.loads(path.read_text())
    assert "grpo.num_generations=1: " in failed["error"] and "reward" in good["results"]
    assert good["output_dir"] == "mine/1", "jobs of a sweep must not share a folder"
    warning = "longer than max_prompt_length=24 tokens"
    assert warning in result.stderr and warning in (path.parent / "1" / "train.log").read_text()
    assert re.search(r"0 grpo.num_generations=1 +failed: grpo.num_generations=1: ", result.stdout)


@pytest.mark.parametrize("size", ["4b", "12b", "27b"])
def test_larger_models_have_their_names(size):
    model, data, _ = settings_of(f"model=gemma3_{size}")
    assert (model.model_name, data.dataset) == (f"google/gemma-3-{size}-it", "gsm8k")


def test_multimodal_gemma_3_trains_on_text(tmp_path):
    """Models from 4b up are Gemma3ForConditionalGeneration, with a vision tower beside the decoder that is trained."""
    tokenizer = tiny.make_tokenizer()
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=len(tokenizer)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = ["model=gemma3_4b", "model.model_size=null", f"model.model_name={tmp_path / 'model'}", "data.dataset=null"]
    run(*model, *SHORT, *NARROW, "optimizer.learning_rate=1e-3", folder=str(tmp_path / "run"))
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any(value.any() for name, value in adapter.items() if "language_model" in name and "lora_B" in name)


# ---- conf/ and the nested settings ----


def flat_dict(model, data, args):
    return dataclasses.asdict(model) | dataclasses.asdict(data) | args.to_dict() | {"output_dir": None}


def test_without_arguments_it_is_the_job_of_train_py():
    assert flat_dict(*settings_of()) == flat_dict(*parse_job(["--use_grpo"]))


def test_conf_has_agent_tunix_values():
    nested = GRPOTrainingConfig(
        model=ModelConfig(model_size="270m", lora_rank=32, lora_alpha=32.0), data=DataConfig(dataset="gsm8k")
    )
    assert flat_dict(*settings_of("model=gemma3_270m")) == flat_dict(*nested.flat())


def test_conf_names_every_setting():
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("config")
    known = {
        "model": ModelConfig,
        "data": DataConfig,
        "optimizer": OptimizerConfig,
        "grpo": AlgorithmConfig,
        "generation": GenerationConfig,
        "training": TrainingConfig,
        "evaluation": EvaluationConfig,
    }
    assert set(config) == {field.name for field in dataclasses.fields(GRPOTrainingConfig)}
    for name, section in known.items():
        twice = {"learning_rate", "warmup_ratio", "max_grad_norm"} if name == "training" else set()
        assert set(config[name]) == {field.name for field in dataclasses.fields(section)} - twice, name


def test_command_line_wins_over_experiment_over_model():
    args = settings_of("model=tiny", "+experiment=quick_test")[2]
    assert (args.per_device_train_batch_size, args.max_steps, args.learning_rate) == (2, 10, 2e-3)
    args = settings_of("+experiment=quick_test", "training.num_batches=7", "training.micro_batch_size=3")[2]
    assert (args.per_device_train_batch_size, args.max_steps) == (3, 7)


def example(**changes):
    """Return the example of agent-tunix's guide, word for word but for `changes`."""
    return dataclasses.replace(
        GRPOTrainingConfig(
            model=ModelConfig(model_size="270m", lora_rank=16, mesh_shape=((1, 1), ("fsdp", "tp"))),
            training=TrainingConfig(num_batches=100, micro_batch_size=1),
        ),
        **changes,
    )


def test_example_of_the_guide():
    model, _, args = example().flat()
    assert (model.model_name, model.lora_rank, model.mesh_shape) == ("google/gemma-3-270m-it", 16, "1,1")
    assert (args.per_device_train_batch_size, args.max_steps) == (1, 100)
    assert (args.learning_rate, args.kl_penalty_coef, args.max_grad_norm) == (3e-6, 0.08, 0.1)


def test_example_of_the_guide_trains(here, model_folder):
    short = {"training": TrainingConfig(num_batches=1, micro_batch_size=1), "data": DataConfig(num_eval_rows=2)}
    model = ModelConfig(model_name=model_folder, lora_rank=16, mesh_shape=((1, 1), ("fsdp", "tp")))
    trainer = train(example(model=model, generation=GenerationConfig(max_generation_steps=8), **short))
    assert trainer.state.global_step == 1 and Path("outputs/adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    "given, steps, epochs",
    [
        ({"training": TrainingConfig(num_batches=10, num_epochs=2)}, 20, 3),
        ({"training": TrainingConfig(num_batches=10, max_steps=3)}, 3, 3),
        ({"training": TrainingConfig(num_epochs=2)}, -1, 2),
        ({}, 280, 3),
        ({"model": ModelConfig(model_size="1b")}, -1, 1),
    ],
)
def test_number_of_steps(given, steps, epochs):
    args = GRPOTrainingConfig(**given).flat()[2]
    assert args.max_steps == steps and (steps > 0 or args.num_train_epochs == epochs)


def test_dapo_needs_no_word_about_the_kl_penalty():
    config = GRPOTrainingConfig(ModelConfig(model_size="1b"), grpo=AlgorithmConfig(algorithm="dapo"))
    assert config.flat()[2].beta == 0


@pytest.mark.parametrize(
    "given, message",
    [
        ({"grpo": AlgorithmConfig(num_generations=1)}, "grpo.num_generations=1: GRPO compares"),
        ({"training": TrainingConfig(num_batches="ten")}, "training.num_batches='ten': expected int"),
        ({"training": TrainingConfig(num_batches=0)}, "training.num_batches=0: must be at least 1"),
        ({"optimizer": OptimizerConfig(warmup_ratio=5)}, "optimizer.warmup_ratio=5: must be in"),
        ({"training": {"num_batches": 1}}, "training={'num_batches': 1}: expected TrainingConfig"),
        ({"args": {"algoritm": "dapo"}}, "'algoritm'; did you mean 'algorithm'"),
        ({"args": 5}, "args=5: expected names and values"),
        ({"args": {"seed": 1}}, "seed=42: is also given as args.seed=1"),
        ({"output_dir": "a", "checkpoint_dir": "b"}, "checkpoint_dir='b': is also given as output_dir='a'"),
        (
            {"optimizer": OptimizerConfig(learning_rate=1e-5), "training": TrainingConfig(learning_rate=1e-6)},
            "training.learning_rate=1e-06: is also given as optimizer.learning_rate=1e-05",
        ),
    ],
)
def test_wrong_settings_are_named_with_their_section(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        GRPOTrainingConfig(**given).flat()


@pytest.mark.parametrize(
    "word, message",
    [
        (
            "optimizer.lerning_rate=1",
            "unknown setting 'optimizer.lerning_rate'; did you mean 'optimizer.learning_rate'",
        ),
        ("+optimizer.lerning_rate=1", "did you mean 'optimizer.learning_rate'"),
        ("training.learning_rate=1", "did you mean 'optimizer.learning_rate'"),
        ("modle=tiny", "unknown setting 'modle'; did you mean 'model'"),
        ("model=gemma9", "model='gemma9': choose one of gemma3_12b"),
        ("+experiment=full", "experiment='full': choose one of full_training, quick_test"),
        ("experiment=quick_test", "use +experiment=quick_test"),
        ("model.lora_rank=eight", "model.lora_rank='eight': expected int"),
        ("model.lora_rank=-1", "model.lora_rank=-1: must be at least 1, or 0"),
        ("training=fast", "training='fast': choose one of default"),
        ("generation.temperature=0", "generation.temperature=0: must be above 0"),
        ("optimizer=5e", "optimizer='5e': choose one of default"),
        ("model.mesh_shape=[2,2]", "model.mesh_shape=[2, 2]: expected"),
        ("foo", "foo"),
    ],
)
def test_wrong_words_become_one_line(word, message, here, without_hydras_log):
    with pytest.raises(ValueError, match=re.escape(message)):
        sections.main(CONF, [word])


def test_args_take_any_setting_of_train_py(here, monkeypatch, without_hydras_log):
    seen = []
    monkeypatch.setattr(hydra_app, "train", lambda job: seen.append(job.flat()[2]))
    words = ["+args.overlong_prompts=raise", "args.stop_check_interval=2", "args.epsilon_c=3", "grpo.algorithm=gspo"]
    with pytest.raises(SystemExit, match="0"):
        sections.main(CONF, words)
    (args,) = seen
    assert (args.overlong_prompts, args.stop_check_interval, args.epsilon_c, args.algorithm) == ("raise", 2, 3, "gspo")


def test_the_device_is_chosen_from_the_arguments():
    for words, flags in (
        (["device=xla"], ["--device=xla"]),
        (["+device=cpu", "model=tiny"], ["--device=cpu"]),
        (["model=tiny"], []),
    ):
        assert sections.device_among(words) == flags
