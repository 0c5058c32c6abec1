"""Finds the newest whole checkpoint of a run, and tells whether a run is finished."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path

STATE_FILE = "trainer_state.json"
# The files of what is saved: those of an adapter, of a whole model, or of one whose weights lie in several files.
LAYOUTS = (
    ("adapter_config.json", "adapter_model.safetensors"),
    ("config.json", "model.safetensors"),
    ("config.json", "model.safetensors.index.json"),
)


def _has_all(folder: Path, names: Iterable[str]) -> bool:
    return all((folder / name).is_file() for name in names)


def is_whole(folder: Path) -> bool:
    """True when a checkpoint was written to its end: the trainer's state, which is written last, can be read."""
    if not any(_has_all(folder, (*layout, "optimizer.pt", "scheduler.pt")) for layout in LAYOUTS):
        return False
    try:
        json.loads((folder / STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole `checkpoint-N` with the largest N in a run's folder, or None."""
    numbered = [
        (int(folder.name.removeprefix("checkpoint-")), folder)
        for folder in Path(output_dir).glob("checkpoint-*")
        if folder.name.removeprefix("checkpoint-").isdigit() and is_whole(folder)
    ]
    return max(numbered)[1] if numbered else None


def has_final_files(output_dir: str | Path) -> bool:
    """Whether a run wrote what it has trained there, and after that its state."""
    return any(_has_all(Path(output_dir), (*layout, "tokenizer_config.json", STATE_FILE)) for layout in LAYOUTS)


def is_finished(folder: str | Path, num_steps: int, patience: int | None = None) -> bool:
    """Whether the run that left this checkpoint, or these final files, has no step left to do.

    Args:
        num_steps: how many steps the run has.
        patience: `early_stopping_patience`, the number of evaluations without improvement after which a run stops.
    """
    state = json.loads((Path(folder) / STATE_FILE).read_text())
    stopping = state["stateful_callbacks"].get("EarlyStoppingCallback", [])  # a list where there are several
    stopping = stopping if isinstance(stopping, list) else [stopping]
    waited = max((callback["attributes"]["early_stopping_patience_counter"] for callback in stopping), default=0)
    return state["global_step"] >= num_steps or waited >= (math.inf if patience is None else patience)


def digest_of_files(folder: str | Path) -> str:
    """A word that changes with the files in a checkpoint's folder, or "none" where there are no files."""
    files = [path for path in sorted(Path(folder).glob("*")) if path.is_file()]
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:12] if files else "none"
