"""Notes each start of a run in its folder: when, from which step, on what, and with which versions it computed."""

import importlib.metadata
import json
import platform
import time
from pathlib import Path
from typing import Any

STARTS_FILE = "starts.jsonl"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy", "torch_xla", "torch_tpu")


def note_start(output_dir: str | Path, step: int, facts: dict[str, Any]) -> None:
    """Append a line to the file.

    Args:
        step: the last step that was done before; 0 for a new run.
        facts: what else is known about it, such as the device. JSON must be able to hold it.
    """
    line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, **facts, "versions": versions()}
    path = Path(output_dir) / STARTS_FILE
    cut_short = path.is_file() and not path.read_bytes().endswith(b"\n")  # by a full disk, or with the machine
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n" * cut_short + json.dumps(line) + "\n")


def read_starts(output_dir: str | Path) -> list[dict[str, Any]]:
    """What was noted, oldest first. A line that was cut short is left out; early versions noted nothing.

    Raises:
        ValueError: a line is JSON, and not what a run writes.
    """
    path = Path(output_dir) / STARTS_FILE
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    starts = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            start = json.loads(line)
        except ValueError:
            continue
        if not isinstance(start, dict) or not isinstance(start.get("versions"), dict):
            raise ValueError(f"{path}, line {number}: not what a run writes")
        starts.append(start)
    return starts


def versions() -> dict[str, str]:
    """The versions of Python, of the system and of the packages that decide what a run computes."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in ("tunix-torch", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
