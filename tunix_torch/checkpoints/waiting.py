"""Keeps in a checkpoint the batches that were sampled before it and are learned from after it."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from ..batch import TrainBatch
from ..runtime import together

WaitingBatch = tuple[TrainBatch, Tensor]  # with the rewards of its rows, (B, R) float64
IN_MEMORY = ("lengths", "rewards")  # tensors of a `TrainBatch` that lie in main memory


def _file(folder: str | Path) -> Path:
    """Each process has batches of its own, and so a file of its own."""
    return Path(folder) / f"waiting_batches_{together.index()}.pt"


def save_waiting(waiting: Sequence[WaitingBatch], folder: str | Path) -> None:
    """Write batches into a checkpoint's folder. One that waits for several passes is written once."""
    distinct = list({id(batch): (batch, rewards) for batch, rewards in waiting}.values())
    columns = [
        {f.name: None if (x := getattr(batch, f.name)) is None else x.cpu().clone() for f in fields(batch)}
        for batch, _ in distinct
    ]
    order = [next(i for i, (known, _) in enumerate(distinct) if known is batch) for batch, _ in waiting]
    torch.save({"batches": columns, "rewards": [r.clone() for _, r in distinct], "order": order}, _file(folder))


def load_waiting(folder: str | Path, device: torch.device) -> list[WaitingBatch]:
    """Read what `save_waiting` wrote. The list is empty where the checkpoint has no such file."""
    path = _file(folder)
    if not path.is_file():
        return []
    saved = torch.load(path, weights_only=True)
    batches = [
        TrainBatch(**{k: v if v is None or k in IN_MEMORY else v.to(device) for k, v in columns.items()})
        for columns in saved["batches"]
    ]
    return [(batches[i], saved["rewards"][i]) for i in saved["order"]]
