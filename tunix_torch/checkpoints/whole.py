"""Checkpoints that are whole or not there: written beside their place, listed in a manifest, and renamed into place."""

import contextlib
import errno
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from ..rewarding.values import is_of_rewards
from ..runtime import together
from .files import STATE_FILE, checkpoints_of
from .manifest import MANIFEST_FILE, damage, flush, write_manifest
from .means import KeepsMeans

# What errors of torch say that could not write a file; they give no reason.
FAILED_WRITES = ("inline_container", "PytorchStreamWriter", "cannot be opened")
UNFINISHED = "unfinished"  # the folder in output_dir where a checkpoint is written


class WholeCheckpoints(KeepsMeans):
    """A trainer whose checkpoints appear under their names only when all of them is on the disk.

    With `save_total_limit` the checkpoints of the latest steps are kept, whatever their files' times are.
    """

    _written_in: Path | None = None  # where a checkpoint is being written; None: none is

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._written_in is None else str(self._written_in)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint of the current step.

        Raises:
            OSError: it can't be written, for which the message gives the reason. What was there before stays.
        """
        self.settle()  # or the schedule might count a step that was skipped
        args, state = self.args, self.state
        run, limit = Path(self._get_output_dir(trial)), args.save_total_limit
        beside, name = run / UNFINISHED, f"checkpoint-{state.global_step}"
        if together.is_first():
            shutil.rmtree(beside, ignore_errors=True)
        together.wait()
        self._written_in, args.save_total_limit = beside, None
        try:
            with explaining_full_disk(beside):
                with _without_logs(state):  # `_finish` writes them
                    super()._save_checkpoint(model, trial)
                together.wait()  # until all processes have written their parts
                best = run / f"checkpoint-{state.best_global_step}"
                if state.best_global_step and (best.name == name or best.exists()):
                    state.best_model_checkpoint = str(best)  # where it is from now on, not where it was written
                if together.is_first():
                    self._finish(beside / name, run / name)
                    rotate(run, limit, state.best_model_checkpoint)
        finally:
            self._written_in, args.save_total_limit = None, limit
            if together.is_first():
                shutil.rmtree(beside, ignore_errors=True)
        together.wait()
        if args.push_to_hub:
            self._push_from_checkpoint(str(run / name))

    def _finish(self, written: Path, place: Path) -> None:
        """Give a checkpoint its manifest and its name. If it is killed in between, `finish_writing` gives the name."""
        _write_state(self.state, written / STATE_FILE)
        _check_ends(written)
        write_manifest(written)
        if place.exists():  # a resumed run comes to this step again
            os.rename(place, written.parent / "replaced")
        os.rename(written, place)
        flush(place.parent)

    def _finalize_training(self, *args: Any) -> TrainOutput:
        """See `transformers.Trainer`, which at the end deletes all checkpoints but the best where one is to be kept:
        also the latest, from which a run that was stopped goes on."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit


@contextlib.contextmanager
def _without_logs(state: TrainerState) -> Iterator[None]:
    """Within this context a trainer's state has no logs."""
    logs, state.log_history = state.log_history, []
    try:
        yield
    finally:
        state.log_history = logs


def _write_state(state: TrainerState, path: Path) -> None:
    """Write what `TrainerState.save_to_json` would, a log a line.

    That would take 5 KB of memory for each log that the run has written, and for each checkpoint.
    """
    with _without_logs(state):
        before, empty, after = json.dumps(vars(state), indent=2, sort_keys=True).partition('"log_history": []')
    assert empty, "a trainer's state has no logs"
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{before}"log_history": [')
        for i, log in enumerate(state.log_history):
            file.write(f"{',' if i else ''}\n    {json.dumps(log, sort_keys=True)}")
        file.write(f"{chr(10) + '  ' if state.log_history else ''}]{after}\n")


def _check_ends(folder: Path) -> None:
    """Raises OSError where `torch.save` has not written all of a file: on a full disk it may leave the end out, and say
    nothing (torch 2.9)."""
    for path in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        if not zipfile.is_zipfile(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def finish_writing(run: Path) -> None:
    """Give a checkpoint its name that was written when its run was killed, and delete what was written of another."""
    beside = run / UNFINISHED
    for written in beside.glob("checkpoint-*"):
        listed = (written / MANIFEST_FILE).is_file() and damage(written) is None
        if listed and not (run / written.name).exists():
            os.rename(written, run / written.name)
            flush(run)
    shutil.rmtree(beside, ignore_errors=True)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Delete the checkpoints of the earliest steps, so that `limit` are left, the latest and the best among them.

    Args:
        limit: None or 0: all are kept.
        best: the folder of the best checkpoint, which stays; None: there is none.
    """
    folders = checkpoints_of(run)  # the latest first
    keep = folders[:1] + [folder for folder in folders[1:] if best is not None and folder == Path(best)]
    for folder in folders[1:]:
        if folder not in keep and len(keep) < (limit or len(folders)):
            keep.append(folder)
    for folder in folders:
        if folder not in keep:  # renamed first, so that no part of it is left under its name if that is interrupted
            (run / UNFINISHED).mkdir(exist_ok=True)
            os.rename(folder, run / UNFINISHED / f"old-{folder.name}")
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)


class DiskFull(OSError):
    """There is no room for a file; the message says where."""


@contextlib.contextmanager
def explaining_full_disk(folder: Path) -> Iterator[None]:
    """Let an error of a write within this context say where it was and, for a full disk, how much is missing.

    Args:
        folder: where files are written.

    Raises:
        DiskFull: in place of the error of a full disk.
        OSError: in place of another error of a checkpoint that is written into the folder.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:  # safetensors, tokenizers and torch have errors of their own for a write that fails
        if _is_of_elsewhere(error, folder):
            raise
        number = _number_of(error, folder)
        kept = "Checkpoints that were there before are whole; make room and resume"
        place = folder.parent if folder.name == UNFINISHED else folder
        if number in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(number, f"no space left in {place}: {_room(folder)}. {kept}") from error
        if number is not None and folder.name == UNFINISHED:
            raise OSError(number, f"a checkpoint can't be written in {place}: {os.strerror(number)}. {kept}") from error
        raise


def _is_of_elsewhere(error: Exception, folder: Path) -> bool:
    """Whether an error names a file that is not in this folder, or was raised by a reward function."""
    if is_of_rewards(error):
        return True
    file = getattr(error, "filename", None)
    return isinstance(file, str) and not Path(file).absolute().is_relative_to(folder.absolute())


def _number_of(error: Exception, folder: Path) -> int | None:
    """The number of the operating system's error behind an error; None: it is about something else."""
    if isinstance(error, OSError):
        return error.errno
    if any(words in str(error) for words in ("No space left", "file write failed")):
        return errno.ENOSPC
    return _why(folder) if any(words in str(error) for words in FAILED_WRITES) else None


def _why(folder: Path) -> int:
    """The number of the error by which the operating system refuses to write into a folder, which torch does not say.

    Once more as much is asked for as a checkpoint takes.
    """
    earlier = checkpoints_of(folder.parent)
    probe = next(path for path in (folder, *folder.absolute().parents) if path.is_dir()) / "probe"
    try:
        with open(probe, "wb", buffering=0) as file:
            file.write(b"0")
            os.posix_fallocate(file.fileno(), 0, max(2**26, _size(earlier[0]) if earlier else 0))
    except OSError as error:
        return error.errno
    finally:
        probe.unlink(missing_ok=True)
    return errno.EIO


def _room(folder: Path) -> str:
    """How much is free and, of a checkpoint that was being written, how much was written and about how much is missing.

    An earlier checkpoint says how much one takes.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if folder.name != UNFINISHED:
        return f"{_megabytes(free)} are free"
    written, earlier = _size(folder), checkpoints_of(folder.parent)
    found = f"{_megabytes(free)} are free, and {_megabytes(written)} of a checkpoint were written when it ended"
    if earlier and (missing := _size(earlier[0]) - written - free) > 0:
        found += f"; about {_megabytes(missing)} are missing"
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MB"
