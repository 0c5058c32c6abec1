"""Writes whole, and reads in parts, what processes hold in parts: weights, and the state of their optimizer.

So a checkpoint has the same files however many processes wrote it, and any number of them goes on from it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.trainer import OPTIMIZER_NAME

from ..runtime import fsdp
from .contents import load_plain


def in_main_memory(tensor: Tensor, is_kept: bool) -> Tensor:
    """A tensor on the CPU, without gradient, with the parts of all processes. All of them must call this.

    Args:
        is_kept: whether this process needs it. If not, it gets an empty tensor in place of one that lies in parts,
            since it may have no room for it.
    """
    if not fsdp.is_part(tensor):
        return tensor.detach().cpu()
    tensor = fsdp.whole(tensor)
    return tensor.cpu() if is_kept else torch.empty(0)


def is_split(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps weights that lie in parts."""
    return any(fsdp.is_part(weight) for group in optimizer.param_groups for weight in group["params"])


def save_optimizer(optimizer: Optimizer, folder: str | Path, writes: bool) -> None:
    """Write the state of an optimizer as that of one process would be. All processes must call this.

    Args:
        writes: whether this process writes the file.
    """
    state = optimizer.state_dict()
    of_weights: dict[int, dict[str, Any]] = {}
    for number, kept in state["state"].items():
        of_weights[number] = {k: in_main_memory(v, writes) if isinstance(v, Tensor) else v for k, v in kept.items()}
    if writes:
        torch.save(state | {"state": of_weights}, Path(folder) / OPTIMIZER_NAME)


def load_optimizer(optimizer: Optimizer, folder: str | Path) -> None:
    """Read this process's parts of the state that any number of processes have written."""
    state = load_plain(Path(folder) / OPTIMIZER_NAME, mmap=True)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, kept in state["state"].items():
        weight = weights[number]
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                kept[name] = fsdp.like(value, weight)
    optimizer.load_state_dict(state)
