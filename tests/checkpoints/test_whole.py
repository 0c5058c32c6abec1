"""A checkpoint is whole or not there, whatever happens while it is written; damage is found before it is loaded."""

import errno
import os
import shutil

import pytest
import torch
from damages import DAMAGES, flip
from runs import run
from trainers import digits_reward, make_trainer

from tunix_torch.checkpoints.files import checkpoints_of, has_final_files, newest_checkpoint, why_not_whole
from tunix_torch.checkpoints.manifest import BOTH, damage
from tunix_torch.checkpoints.whole import UNFINISHED, finish_writing, rotate
from tunix_torch.run.folder import resolve_checkpoint


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """The folder of a run of four steps, with checkpoints of the second and the fourth."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(model_folder, folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_every_damage_to_every_file_of_the_newest_checkpoint_is_passed_over_with_its_reason(folder, tmp_path, caplog):
    newest = folder / "checkpoint-4"
    kept = shutil.copytree(newest, tmp_path / "kept")
    names = sorted(path.name for path in kept.iterdir())
    assert len(names) * len(DAMAGES) >= 60 and {*BOTH, "optimizer.pt", "rng_state.pth"} <= set(names)
    for name in names:
        for kind, do in DAMAGES.items():
            shutil.rmtree(newest)
            shutil.copytree(kept, newest)
            do(newest / name)
            caplog.clear()
            assert resolve_checkpoint("auto", folder) == str(folder / "checkpoint-2"), (name, kind)
            (message,) = caplog.messages
            assert message.startswith(f"{newest} is passed over: ") and "\n" not in message, (name, kind)
            assert name in message or "manifest" in message, (name, kind, message)
            with pytest.raises(ValueError, match="not a whole checkpoint folder: "):
                resolve_checkpoint(str(newest), folder)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_where_it_would_have(model_folder, finished, folder):
    flip(folder / "checkpoint-4" / "optimizer.pt")
    (folder / BOTH[1]).unlink()  # it was killed while it wrote the final files
    assert not has_final_files(folder)
    run(model_folder, folder, resume_from_checkpoint="auto")
    assert adapter(folder) == adapter(finished) and has_final_files(folder)
    assert why_not_whole(folder / "checkpoint-4") is None


def test_a_checkpoint_without_a_manifest_still_resumes(model_folder, finished, folder):
    """Early versions wrote none."""
    shutil.rmtree(folder / "checkpoint-4")
    for name in BOTH:
        (folder / name).unlink()
        (folder / "checkpoint-2" / name).unlink()
    (folder / "adapter_model.safetensors").unlink()
    run(model_folder, folder, resume_from_checkpoint="latest")
    assert adapter(folder) == adapter(finished)


def test_a_folder_whose_name_only_looks_like_a_number_is_no_checkpoint(tmp_path):
    """Regression: Python counts a superscript among the digits, and can't make a number of it."""
    for name in ("checkpoint-2", "checkpoint-\u00b2", "checkpoint-\u0663", "checkpoint-", "checkpoint--1"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in checkpoints_of(tmp_path)] == ["checkpoint-2"]


def test_a_file_that_was_not_written_is_not_read(folder):
    """A run would take batches that wait, or a reference policy, from a file that someone put there."""
    for name in ("waiting_batches_0.pt", "reference.safetensors", "scaler.pt"):
        shutil.copy(folder / "checkpoint-4" / "optimizer.pt", folder / "checkpoint-4" / name)
        assert why_not_whole(folder / "checkpoint-4") == f"{name} is not one of the files that were written"
        (folder / "checkpoint-4" / name).unlink()
    assert why_not_whole(folder / "checkpoint-4") is None


def test_a_manifest_that_is_no_file_is_not_taken_for_none(folder):
    """Regression: with a folder in the place of one of its files, and without the other, nothing was compared."""
    newest = folder / "checkpoint-4"
    for name in BOTH:
        (newest / name).unlink()
    (newest / BOTH[1]).mkdir()
    assert why_not_whole(newest) == f"{BOTH[0]} is missing"


def test_a_changed_final_adapter_is_noticed(folder):
    assert damage(folder) is None
    flip(folder / "adapter_model.safetensors")
    assert "adapter_model.safetensors has changed" in damage(folder)


@pytest.mark.thorough
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_a_disk_that_is_full_leaves_earlier_checkpoints_and_says_what_is_missing(
    model_folder, tmp_path, monkeypatch, error
):
    save, count = torch.save, 0

    def save_until_full(*args, **kwargs):
        nonlocal count
        count += 1
        if count > 4:  # in the middle of the second checkpoint
            raise error
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(OSError, match=r"no space left in .*run: .* MB are free, and .* MB of a checkpoint"):
        run(model_folder, tmp_path / "run")
    assert [folder.name for folder in checkpoints_of(tmp_path / "run")] == ["checkpoint-2"]
    assert newest_checkpoint(tmp_path / "run") is not None and not (tmp_path / "run" / UNFINISHED).exists()
    monkeypatch.undo()
    run(model_folder, tmp_path / "run", resume_from_checkpoint="auto")
    run(model_folder, tmp_path / "other")
    assert adapter(tmp_path / "run") == adapter(tmp_path / "other")


def test_a_file_that_torch_has_not_written_to_its_end_is_no_part_of_a_checkpoint(model_folder, tmp_path, monkeypatch):
    """Regression: where only the last bytes of a file found no room, `torch.save` said nothing, and the manifest listed
    what there was."""
    save = torch.save

    def save_in_part(value, path):
        save(value, path)
        if os.path.basename(os.path.dirname(path)) == "checkpoint-4" and path.endswith("optimizer.pt"):
            os.truncate(path, os.path.getsize(path) - 100)

    monkeypatch.setattr(torch, "save", save_in_part)
    with pytest.raises(OSError, match=r"no space left in .*run"):
        run(model_folder, tmp_path / "run")
    assert [folder.name for folder in checkpoints_of(tmp_path / "run")] == ["checkpoint-2"]


def test_a_checkpoint_whose_run_was_killed_before_it_had_its_name_gets_it(model_folder, finished, folder):
    unfinished = folder / UNFINISHED
    unfinished.mkdir()
    (folder / "checkpoint-4").rename(unfinished / "checkpoint-4")
    kept = shutil.copytree(folder / "checkpoint-2", unfinished / "replaced")
    finish_writing(folder)
    assert why_not_whole(folder / "checkpoint-4") is None and not kept.exists()
    unfinished.mkdir()
    (folder / "checkpoint-4").rename(unfinished / "checkpoint-4")
    flip(unfinished / "checkpoint-4" / "optimizer.pt")
    finish_writing(folder)
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-2"] and not unfinished.exists()


def test_the_latest_checkpoint_is_kept_beside_the_best(model_folder, tmp_path):
    """Regression: at the end of training, also when a signal had ended it, transformers.Trainer deleted all but the
    best one, where one was to be kept."""
    best = {"save_total_limit": 1, "metric_for_best_model": "eval_reward", "greater_is_better": False}
    trainer = run(model_folder, tmp_path / "run", eval_steps=2, **best)
    names = {"checkpoint-4", os.path.basename(trainer.state.best_model_checkpoint)}
    assert {path.name for path in checkpoints_of(tmp_path / "run")} == names


def test_the_checkpoints_of_the_latest_steps_are_kept_whatever_the_clock_says(tmp_path):
    def left(limit, best=None):
        for step in (2, 4, 10, 12):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
            os.utime(tmp_path / f"checkpoint-{step}", (0, 1000 - step))  # the clock was set back
        rotate(tmp_path, limit, None if best is None else str(tmp_path / best))
        return [folder.name.removeprefix("checkpoint-") for folder in checkpoints_of(tmp_path)]

    assert left(2) == ["12", "10"]
    assert left(1, "checkpoint-4") == ["12", "4"]
    assert left(3, "checkpoint-2") == ["12", "10", "2"]
    assert left(0) == left(None) == ["12", "10", "4", "2"]


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_what_was_learned_before_a_reward_failed_is_saved_and_resumed(model_folder, tmp_path, caplog, where):
    """Nothing that was learned is lost; the step whose rewards failed is sampled again, and alike."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 100, "eval_strategy": "steps", "eval_steps": 2}

    def reward(completions, trainer_state, **kwargs):
        values = digits_reward(None, completions)
        if failing and trainer_state.global_step == 2 and (len(completions) == 8) == (where == "evaluation"):
            raise RuntimeError("the judge is away")
        return values

    failing = True
    with pytest.raises(RuntimeError, match="the judge is away") as raised:
        make_trainer(model_folder, tmp_path / "a", reward, **settings).train()
    said = {"training": "in step 3", "evaluation": "in the evaluation after step 2"}[where]
    assert f"Scoring failed {said}; " in caplog.text and "checkpoint-2 holds everything before" in caplog.text
    assert ("skip_group" in str(raised.value.__notes__)) == (where == "training"), (
        "no group of questions can be left out"
    )
    failing = False
    trainers = [make_trainer(model_folder, tmp_path / name, reward, **settings) for name in "ab"]
    trainers[0].train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    trainers[1].train()
    resumed, whole = ([p for p in t.model.parameters() if p.requires_grad] for t in trainers)
    assert all(map(torch.equal, resumed, whole))
