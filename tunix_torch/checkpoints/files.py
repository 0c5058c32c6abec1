"""Finds the newest whole checkpoint of a run, and tells whether a run is finished."""

import hashlib
import json
import math
from pathlib import Path

from peft import LoraConfig, PeftConfig

STATE_FILE = "trainer_state.json"
# The files that a run writes after its last step. It writes the state after the others.
FINAL_FILES = ("adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json", STATE_FILE)


def is_whole(folder: Path) -> bool:
    """True when a checkpoint was written to its end: the trainer's state, which is written last, can be read."""
    needed = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
    if not all((folder / name).is_file() for name in needed):
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
    """Whether a run wrote its final adapter there."""
    return all((Path(output_dir) / name).is_file() for name in FINAL_FILES)


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


def check_same_scale(adapter: LoraConfig, folder: str | Path) -> None:
    """See that the weights of a checkpoint's LoRA mean the same in a model with this LoRA.

    Raises:
        ValueError: they would be scaled by another factor.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        return
    saved = PeftConfig.from_pretrained(str(folder))
    for name in ("r", "lora_alpha", "use_rslora"):
        given, there = getattr(adapter, name), getattr(saved, name, None)
        if given != there:
            raise ValueError(f"{name}={given!r}: the LoRA in {folder} has {there!r}; give that")


def digest_of_files(folder: str | Path) -> str:
    """A word that changes with the files in a checkpoint's folder, or "none" where there are no files."""
    files = [path for path in sorted(Path(folder).glob("*")) if path.is_file()]
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:12] if files else "none"
