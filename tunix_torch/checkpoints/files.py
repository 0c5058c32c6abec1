"""Finds the newest whole checkpoint of a run, and tells whether a run is finished."""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from .contents import STATE_FILE, evaluations_waited, read_state, unreadable
from .manifest import damage, not_listed

# The files of what is saved: those of an adapter, of a whole model, or of one whose weights lie in several files.
LAYOUTS = (
    ("adapter_config.json", "adapter_model.safetensors"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
)
# The patterns of the names of what a run has trained, and of its state.
FINAL_FILES = ("adapter_*", "model*.safetensors*", "generation_config.json", "token*.json", "*.jinja", STATE_FILE)


def _missing(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_file()]


def why_not_whole(folder: str | Path) -> str | None:
    """Why a run can't be resumed from a folder, in a few words; None: it can.

    A checkpoint has all the files that resuming reads, their content is what its manifest says, and there is no other
    file that would be read. One that an early version wrote has no manifest. In either case the files must be readable.
    """
    folder = Path(folder)
    missing = min((_missing(folder, layout) for layout in LAYOUTS), key=len)
    missing += _missing(folder, ("optimizer.pt", "scheduler.pt", STATE_FILE))
    if missing:
        return f"{missing[0]} is missing"
    return why_damaged(folder)


def why_damaged(folder: str | Path) -> str | None:
    """Why nothing may be loaded from a checkpoint, in a few words; None: what is there is what was written.

    A checkpoint that was saved with `save_only_model` has no optimizer, and may be without damage all the same.
    """
    folder = Path(folder)
    try:
        reason = damage(folder) or not_listed(folder)
        if reason is None:
            evaluations_waited(read_state(folder))
            reason = unreadable(folder)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return reason


def is_whole(folder: str | Path) -> bool:
    """Whether a run can be resumed from a folder."""
    return why_not_whole(folder) is None


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """All folders `checkpoint-N` of a run, damaged ones too, the one with the largest N first."""
    numbered = [
        (int(folder.name.removeprefix("checkpoint-")), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if re.fullmatch("checkpoint-[0-9]{1,18}", folder.name) and folder.is_dir()
    ]
    return [folder for _, folder in sorted(numbered, reverse=True)]


def newest_checkpoint(output_dir: str | Path, passed_over: Callable[[Path, str], None] | None = None) -> Path | None:
    """The whole `checkpoint-N` with the largest N in a run's folder, or None.

    Args:
        passed_over: is called with each later checkpoint that is not whole, and the reason.
    """
    for folder in checkpoints_of(output_dir):
        reason = why_not_whole(folder)
        if reason is None:
            return folder
        if passed_over is not None:
            passed_over(folder, reason)
    return None


def has_final_files(output_dir: str | Path) -> bool:
    """Whether a run wrote what it has trained there, and after that its state, and all is still what was written."""
    folder, others = Path(output_dir), ("tokenizer_config.json", STATE_FILE)
    there = any(not _missing(folder, (*layout, *others)) for layout in LAYOUTS)
    return there and damage(folder) is None and unreadable(folder) is None


def final_files(output_dir: str | Path) -> list[str]:
    """The files in a run's folder that are what it has trained, and its state: the names that its manifest has."""
    return sorted(path.name for pattern in FINAL_FILES for path in Path(output_dir).glob(pattern) if path.is_file())


def is_finished(folder: str | Path, num_steps: int, patience: int | None = None) -> bool:
    """Whether the run that left this checkpoint, or these final files, has no step left to do.

    Args:
        num_steps: how many steps the run has.
        patience: `early_stopping_patience`, the number of evaluations without improvement after which a run stops.

    Raises:
        ValueError: the folder holds no state of a run.
    """
    state = read_state(folder)
    enough = math.inf if patience is None else patience
    return state["global_step"] >= num_steps or evaluations_waited(state) >= enough


def digest_of_files(folder: str | Path) -> str:
    """A word that changes with the files in a checkpoint's folder, or "none" where there are no files."""
    files = [path for path in sorted(Path(folder).glob("*")) if path.is_file()]
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:12] if files else "none"
