"""SFT, then SimPO, then GRPO on one adapter, as in docs/pipeline.md: each stage goes on where the last one ended."""

import json

import pytest
import torch
from runs import run
from safetensors.torch import load_file

from tunix_torch import DataConfig, GRPOConfig, ModelConfig, train
from tunix_torch.cli.train import main
from tunix_torch.model import tiny
from tunix_torch.run.folder import warn_of_other_prompts

pytestmark = pytest.mark.thorough  # whole runs, each of many steps

SMALL = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "generation_max_length": 48,
    "max_prompt_length": 48,
    "system_message": "",
    "learning_rate": 5e-3,
    "report_to": "none",
    "disable_tqdm": True,
}
STAGES = {
    "sft": {"use_grpo": False, "data_path": "answers.jsonl"},
    "simpo": {"use_grpo": False, "data_path": "pairs.jsonl", "preference_loss": "simpo"},
    "grpo": {"use_grpo": True, "data_path": "questions.jsonl", "generation_temperature": 1.5},
}
OF_DATA = ("data_path",)


def write_data(folder):
    """Write the three files that the stages learn from, all made of the same questions."""
    rows = tiny.arithmetic_rows("train", 16)
    files = {"answers": [], "pairs": [], "questions": rows}
    for row in rows:
        right, wrong = (f"<reasoning>I count.</reasoning>\n<answer>{a}</answer>" for a in (row["answer"], "a lot"))
        files["answers"].append({"prompt": row["question"], "completion": right})
        conversation = [{"role": "user", "content": row["question"]}]
        sides = {"chosen": right, "rejected": wrong}
        pair = {side: [*conversation, {"role": "assistant", "content": text}] for side, text in sides.items()}
        files["pairs"].append(pair)
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def by_flags(model, folder, output_dir, settings):
    settings = SMALL | settings | {"data_path": str(folder / settings["data_path"])}
    words = {"model_name": model, "output_dir": output_dir, "lora_rank": 8, "lora_alpha": 16} | settings
    main([f"--{name}={value}" for name, value in words.items()])


def by_library(model, folder, output_dir, settings):
    data = DataConfig(data_path=str(folder / settings["data_path"]))
    args = {name: value for name, value in settings.items() if name not in OF_DATA}
    config = GRPOConfig(output_dir=str(output_dir), **(SMALL | args))
    train(ModelConfig(str(model), lora_rank=8, lora_alpha=16), data, config)


@pytest.mark.parametrize("run_stage", [by_flags, by_library])
def test_each_stage_goes_on_with_the_adapter_of_the_last(model_folder, tmp_path, run_stage):
    write_data(tmp_path)
    model, logs, adapters = model_folder, {}, {}
    for name, settings in STAGES.items():
        run_stage(model, tmp_path, tmp_path / name, settings)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        logs[name] = [row for row in map(json.loads, lines) if "loss" in row]
        adapters[name] = load_file(tmp_path / name / "adapter_model.safetensors")
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == model_folder and config["r"] == 8
        model = tmp_path / name
    assert [len(log) for log in logs.values()] == [3, 3, 3]
    assert logs["sft"][-1]["loss"] < logs["sft"][0]["loss"]
    assert logs["simpo"][-1]["rewards/margins"] > logs["simpo"][0]["rewards/margins"]
    assert logs["grpo"][0]["kl"] == 0.0, "the reference is the policy as this run starts, not the bare base model"
    assert any(row["kl"] > 0 for row in logs["grpo"][1:])
    for earlier, later in (("sft", "simpo"), ("simpo", "grpo")):
        gaps = [(adapters[later][key] - adapters[earlier][key]).norm() for key in adapters[earlier]]
        sizes = [weight.norm() for weight in adapters[earlier].values()]
        assert 0 < torch.stack(gaps).norm() < torch.stack(sizes).norm(), (
            "a stage moves the adapter, it starts no new one"
        )


def test_another_instruction_than_that_of_the_last_stage_is_said(finished_run, tmp_path, caplog):
    warn_of_other_prompts(str(finished_run), "")
    assert not caplog.messages
    settings = {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no", "eval_steps": None}
    run(str(finished_run), tmp_path / "next", system_message="Think.", **settings)
    assert "it is asked as before with --system_message ''" in caplog.text


def test_a_file_of_settings_beside_a_user_says_nothing_of_a_model_of_the_hub(tmp_path, monkeypatch, caplog):
    (tmp_path / "config.json").write_text(json.dumps({"system_message": "Think."}))
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "gemma"):
        warn_of_other_prompts(name, "")
    assert not caplog.messages
