"""Checkpoints that are whole or not there: written beside their place, listed in a manifest, and renamed into place."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from ..learn.optimizer_steps import OptimizerSteps
from ..runtime import together
from .files import STATE_FILE, checkpoints_of
from .manifest import flush, write_manifest

FAILED_WRITES = ("inline_container", "PytorchStreamWriter")  # torch says this where it could not write
UNFINISHED = "unfinished"  # the folder in output_dir where a checkpoint is written


class WholeCheckpoints(OptimizerSteps):
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
            super()._save_checkpoint(model, trial)
            together.wait()  # until all processes have written their parts
            best = run / f"checkpoint-{state.best_global_step}"
            if state.best_global_step and (best.name == name or best.exists()):
                state.best_model_checkpoint = str(best)  # where it is from now on, not where it was written
            if together.is_first():
                self._finish(beside / name, run / name)
                rotate(run, limit, state.best_model_checkpoint)
        except OSError as error:
            raise explained(error, beside) from error
        except Exception as error:  # safetensors and torch have errors of their own for a write that fails
            full = any(words in str(error) for words in ("No space left", "file write failed"))
            if full or any(words in str(error) for words in FAILED_WRITES):
                number = errno.ENOSPC if full or _free(beside) < 2**20 else errno.EIO
                raise explained(OSError(number, os.strerror(number)), beside) from error
            raise
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
        """Give a checkpoint its manifest and its name."""
        self.state.save_to_json(str(written / STATE_FILE))
        write_manifest(written)
        if place.exists():  # a resumed run comes to this step again
            old = written.parent / "replaced"
            os.rename(place, old)
        os.rename(written, place)
        flush(place.parent)


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
        if folder not in keep:
            shutil.rmtree(folder, ignore_errors=True)


def explained(error: OSError, folder: Path) -> OSError:
    """The error of a write with a message that says where and, for a full disk, how much is missing.

    Args:
        folder: where the files were to be written.
    """
    kept = "Checkpoints that were there before are whole; make room and resume"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        reason = error.strerror or str(error)
        return OSError(error.errno, f"a checkpoint can't be written in {folder.parent}: {reason}. {kept}")
    written, free = _size(folder), _free(folder)
    found = f"{_megabytes(free)} are free, and {_megabytes(written)} of a checkpoint were written when it ended"
    earlier = checkpoints_of(folder.parent)
    if earlier and (missing := _size(earlier[0]) - written - free) > 0:
        found += f"; about {_megabytes(missing)} are missing"
    return OSError(error.errno, f"no space left in {folder.parent}: {found}. {kept}")


def _free(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MB"
