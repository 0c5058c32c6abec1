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

from ..runtime import together
from .files import STATE_FILE, checkpoints_of
from .manifest import MANIFEST_FILE, damage, flush, write_manifest
from .means import KeepsMeans

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
            super()._push_from_checkpoint(str(run / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._written_in is None:  # else it is pushed when it has its name
            super()._push_from_checkpoint(checkpoint_folder)

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
    """Let an error of a full disk within this context say where, how much is free and how much was written.

    Args:
        folder: where files are written.

    Raises:
        DiskFull: in place of the error.
    """
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and torch have errors of their own for a full disk
        by_number = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        by_text = any(
            text in str(error)
            for text in ("No space left", "file write failed", "inline_container", "cannot be opened")
        )
        if isinstance(error, DiskFull) or not (by_number or by_text):
            raise
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        unfinished = (
            f", and {written / 2**20:,.1f} MB of a checkpoint were written" if folder.name == UNFINISHED else ""
        )
        raise DiskFull(
            errno.ENOSPC,
            f"no space left in {folder.parent if unfinished else folder}: {shutil.disk_usage(there).free / 2**20:,.1f} "
            f"MB are free{unfinished}. Checkpoints that were there before are whole; make room, and resume",
        ) from error
