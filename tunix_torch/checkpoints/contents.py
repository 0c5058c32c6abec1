"""Looks into the files of a checkpoint before anything is loaded: no code in them runs, and its state is a run's."""

import json
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

STATE_FILE = "trainer_state.json"
READ_BY_TORCH, READ_BY_SAFETENSORS = (".pt", ".pth"), ".safetensors"
# Endings of files that a resumed run, or who loads a model, may read.
READ_BY_RUNS = (*READ_BY_TORCH, READ_BY_SAFETENSORS, ".bin", ".pkl", ".json")


COULD_RUN_CODE = "holds more than tensors and numbers, which could run code as it is read"


def unreadable(folder: Path) -> str | None:
    """Which file a run would fail to read, and why, in a few words; None: it can read all.

    Of tensors only names and shapes are read here, which takes milliseconds. Nothing in a file is executed.
    """
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        try:
            if path.suffix in READ_BY_TORCH:
                load_plain(path, mmap=True)
            elif path.suffix == READ_BY_SAFETENSORS:
                with safe_open(path, framework="pt") as file:
                    file.keys()
        except UnpicklingError:
            return f"{path.name} {COULD_RUN_CODE}"
        except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return f"{path.name} can't be read: {reason}"
    return None


def load_plain(path: Path, mmap: bool = False) -> Any:
    """What `torch.save` wrote, by the unpickler that makes tensors and numbers only; tensors are on the CPU.

    Args:
        mmap: read the tensors of the result when they are used.

    Raises:
        UnpicklingError: there is anything else in it.
        ValueError, RuntimeError: `torch.save` has not written it, or it is cut short.
    """
    from transformers.trainer_pt_utils import safe_globals  # NumPy's numbers, which the state of its generator has

    if not zipfile.is_zipfile(path):
        raise ValueError("torch.save has not written it, or not all of it is there")
    with safe_globals():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def read_state(folder: str | Path) -> dict[str, Any]:
    """What a run's trainer_state.json holds.

    Raises:
        ValueError: there is none, it can't be read, or it is not the state of a run.
    """
    from transformers import TrainerState

    path = Path(folder) / STATE_FILE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    known = TrainerState.__dataclass_fields__
    good = isinstance(state, dict) and state.keys() <= known.keys()
    good = good and _is_count(state.get("global_step")) and isinstance(state.get("stateful_callbacks"), dict)
    rows = state.get("log_history", []) if good else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and _is_count(row.get("step")) for row in rows):
        raise ValueError(f"{path} is not the state of a run")
    return state


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def evaluations_waited(state: dict[str, Any]) -> int:
    """How many evaluations in a row were no better, by the state of `EarlyStoppingCallback`; 0 where there is none.

    Args:
        state: from `read_state`.

    Raises:
        ValueError: the callback's state is not what it writes.
    """
    stopping = state["stateful_callbacks"].get("EarlyStoppingCallback", [])  # a list where there are several
    stopping = stopping if isinstance(stopping, list) else [stopping]
    try:
        counts = [callback["attributes"]["early_stopping_patience_counter"] for callback in stopping]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{STATE_FILE} has no count of evaluations for EarlyStoppingCallback") from error
    if not all(map(_is_count, counts)):
        raise ValueError(f"{STATE_FILE}: EarlyStoppingCallback has counted {counts!r:.60} evaluations")
    return max(counts, default=0)
