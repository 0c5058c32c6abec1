"""What is logged after a resume is what the run would have logged had it not stopped."""

import json
import shutil

import pytest
from runs import left_by, run
from transformers import TrainerState

JOB = {"max_steps": 5, "logging_steps": 3, "save_steps": 2, "eval_steps": 5}


def kill_before_the_end(folder, step):
    """Let the folder look as if the run was killed after the checkpoint of this step."""
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    for name in ("adapter_model.safetensors", "trainer_state.json", "manifest.sha256"):
        (folder / name).unlink()


def test_the_state_in_a_checkpoint_is_what_transformers_writes(model_folder, tmp_path):
    """It is written a log a line, since a log that is written in the other way takes 5 KB of memory."""
    trainer = run(model_folder, tmp_path / "run", max_steps=2, save_steps=2)
    checkpoint = TrainerState.load_from_json(str(tmp_path / "run" / "checkpoint-2" / "trainer_state.json"))
    known = len(checkpoint.log_history)
    assert 0 < known < len(trainer.state.log_history), "the summary comes after the checkpoint"
    trainer.state.log_history = trainer.state.log_history[:known]
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")).log_history == checkpoint.log_history
    lines = (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text().splitlines()
    assert sum(line.startswith("    {") and line.rstrip(",").endswith("}") for line in lines) == known
    assert vars(checkpoint).keys() == vars(TrainerState()).keys()


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("means") / "run"
    run(model_folder, folder, **JOB)
    return folder


def test_the_mean_of_a_log_counts_steps_before_the_checkpoint(model_folder, whole, tmp_path):
    """Regression: the first log of a resumed run was the mean of the steps since, and `train_loss` of those only."""
    folder = shutil.copytree(whole, tmp_path / "run")
    expected = left_by(folder)
    kill_before_the_end(folder, 2)  # the log of step 3 has the means of steps 1 to 3
    run(model_folder, folder, **JOB, resume_from_checkpoint="auto")
    assert left_by(folder) == expected
    assert [row["step"] for row in expected["metrics"] if "reward" in row] == [3, 5]


def test_a_finished_run_that_was_killed_before_its_summary_writes_it(model_folder, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    expected = left_by(folder)
    kill_before_the_end(folder, 5)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "train_loss" in json.loads(lines[-1])
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:10])
    run(model_folder, folder, **JOB, resume_from_checkpoint="auto")
    assert left_by(folder) == expected
