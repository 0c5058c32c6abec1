"""Which checkpoint of a run is whole, and which is the newest."""

import hashlib
import json
from pathlib import Path


def is_whole(folder: Path) -> bool:
    """True when a checkpoint was written to its end: the trainer's state, written last, can be read."""
    needed = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
    if not all((folder / name).is_file() for name in needed):
        return False
    try:
        json.loads((folder / "trainer_state.json").read_text())
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


def fingerprint(folder: str | Path) -> str:
    """A word that changes with the files of a checkpoint; "none" where there are none."""
    files = [path for path in sorted(Path(folder).glob("*")) if path.is_file()]
    total = hashlib.sha256()
    for path in files:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:12] if files else "none"
