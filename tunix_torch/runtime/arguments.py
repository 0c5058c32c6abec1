"""The arguments of a step, which are tensors and lists of tensors, as one list."""

from collections.abc import Sequence
from typing import Any

import torch


def tensors_in(args: Sequence[Any]) -> list[torch.Tensor]:
    """Flatten a step's arguments into one list."""
    return [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]
