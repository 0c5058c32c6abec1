"""A run writes its report, notes its starts and the seconds of its steps, and its report sees what a run logs."""

import json
import shutil

import pytest
from runs import run

from tunix_torch.report.diagnosis import diagnose
from tunix_torch.report.metrics import load_metrics, steps_of_training
from tunix_torch.report.panels import panels_of
from tunix_torch.report.record import read_run
from tunix_torch.report.starts import read_starts


def test_a_run_writes_its_report_and_notes_each_start(model_folder, finished_run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    assert (out / "report.html").is_file()
    (start,) = read_starts(out)
    assert start["step"] == 0 and start["training_rows"] == 16 and start["evaluation_rows"] == 4
    assert {"python", "torch", "transformers"} <= start["versions"].keys()
    before = (out / "report.html").read_text()
    run(model_folder, out, max_steps=6, resume_from_checkpoint="latest")
    assert [start["step"] for start in read_starts(out)] == [0, 4]
    after = (out / "report.html").read_text()
    assert after != before and "resumed 1 time" in after and "6, each of 2 prompts × 4 completions" in after
    run(model_folder, out, max_steps=6, resume_from_checkpoint="latest")  # there is nothing left to do
    assert [start["step"] for start in read_starts(out)] == [0, 4]
    run(model_folder, out, max_steps=2)
    (earlier,) = (out / "previous").iterdir()
    assert (earlier / "report.html").read_text() == after and len(read_starts(earlier)) == 2
    assert [start["step"] for start in read_starts(out)] == [0]


def test_the_seconds_of_a_step_are_those_of_its_parts_and_more(finished_run):
    rows = steps_of_training(load_metrics(finished_run))
    assert len(rows) == 4
    for row in rows:
        parts = [row[f"{name}_seconds"] for name in ("rollout", "scoring", "reference", "learning")]
        assert all(seconds > 0 for seconds in parts) and sum(parts) <= row["step_seconds"]


def test_an_evaluation_logs_the_intervals_of_its_shares(model_folder, tmp_path):
    run(model_folder, tmp_path / "out", max_steps=1, num_eval_completions=2)
    (row,) = [row for row in load_metrics(tmp_path / "out") if "eval_runtime" in row]
    for name in ("accuracy", "mean@2"):
        low, high = (row[f"eval_interval/{name}_{end}"] for end in ("low", "high"))
        assert 0 <= low <= row[f"eval_{name}"] <= high <= 1 and high > low


@pytest.mark.parametrize("settings", [{"use_grpo": False}, {"use_grpo": False, "preference_loss": "dpo"}])
def test_other_kinds_of_training_have_a_report_too(model_folder, tmp_path, settings):
    from tunix_torch import DataConfig, GRPOConfig, ModelConfig, train

    row = {"prompt": "What is 2 + 2?", "completion": "4", "chosen": "4", "rejected": "5", "answer": "4"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    args = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        max_prompt_length=48,
        generation_max_length=8,
        system_message="",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = train(ModelConfig(model_folder), DataConfig(data_path=str(tmp_path / "rows.jsonl")), args)
    num_tokens = int(next(iter(trainer.get_train_dataloader()))["completion_mask"].sum())  # all rows are the same
    rows = steps_of_training(load_metrics(tmp_path / "out"))
    for row in rows:
        assert row["learning_tokens_per_second"] * row["learning_seconds"] == pytest.approx(num_tokens, rel=0.1)
        parts = row["learning_seconds"] + row.get("reference_seconds", 0.0)
        assert ("reference_seconds" in row) == ("preference_loss" in settings) and parts <= row["step_seconds"]
    panels = {panel.name: panel.labels for panel in panels_of(rows)}
    assert "learning" in panels["time"] and panels["speed"] == ["learning"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "Loss" in text and settings.get("preference_loss", "sft").upper() in text
    assert diagnose(read_run(tmp_path / "out")) == []
