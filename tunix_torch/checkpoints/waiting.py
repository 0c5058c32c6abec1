"""Keeps in a checkpoint the batches that were sampled before it and are learned from after it."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..batch import TrainBatch
from ..runtime import together
from .contents import COULD_RUN_CODE, load_plain

WaitingBatch = tuple[TrainBatch, Tensor]  # with the rewards of its rows, (B, R) float64
IN_MEMORY = ("lengths", "rewards")  # tensors of a `TrainBatch` that lie in main memory


def _file(folder: str | Path, process: int | None = None) -> Path:
    """Each process has batches of its own, and so a file of its own. None: this one's."""
    return Path(folder) / f"waiting_batches_{together.index() if process is None else process}.pt"


def save_waiting(waiting: Sequence[WaitingBatch], folder: str | Path, rows: dict[str, Any]) -> None:
    """Write batches into a checkpoint's folder. One that waits for several passes is written once.

    Args:
        rows: the completions of these batches, as `StepRows.state` gives them.
    """
    distinct = list({id(batch): (batch, rewards) for batch, rewards in waiting}.values())
    columns = [vars(batch.in_main_memory()) for batch, _ in distinct]
    order = [next(i for i, (known, _) in enumerate(distinct) if known is batch) for batch, _ in waiting]
    saved = {"batches": columns, "rewards": [r.clone() for _, r in distinct], "order": order}
    torch.save(saved | {"processes": together.count(), "rows": rows}, _file(folder))


def _read(file: Path) -> dict[str, Any]:
    try:
        return load_plain(file)
    except UnpicklingError as error:
        raise ValueError(f"{file} {COULD_RUN_CODE}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{file} can't be read: {' '.join(str(error).split())}") from error


def load_waiting(folder: str | Path, device: torch.device) -> list[WaitingBatch]:
    """Read what `save_waiting` wrote. The list is empty where the checkpoint has no such file.

    Raises:
        ValueError: other than so many processes as now have sampled the batches, or a file is damaged.
    """
    first = _file(folder, 0)
    if not first.is_file():
        return []
    processes = _read(first)["processes"]
    if processes != together.count():
        raise ValueError(
            f"resume_from_checkpoint={str(folder)!r}: {processes} process(es) have sampled batches that wait in it, "
            f"and there are {together.count()}; start as many, or take a checkpoint from between two rollouts"
        )
    saved = _read(_file(folder))
    batches = [
        TrainBatch(**{k: v if v is None or k in IN_MEMORY else v.to(device) for k, v in columns.items()})
        for columns in saved["batches"]
    ]
    return [(batches[i], saved["rewards"][i]) for i in saved["order"]]


def waiting_rows(folder: str | Path) -> dict[str, Any] | None:
    """The completions of the batches that `load_waiting` reads; None: an early version, which kept none, wrote them."""
    return _read(_file(folder)).get("rows")
