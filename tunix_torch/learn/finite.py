"""Gradients, weights and optimizer moments must be finite before they are used or kept."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..runtime import fsdp, together


def bad_gradients(model: nn.Module) -> list[str]:
    """The names of the parameters whose gradients are not finite."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [name for name, gradient in gradients.items() if not _is_finite(gradient)]


def check_finite(tensors: Mapping[str, Tensor], when: str) -> None:
    """Check that weights, or an optimizer's moments, are finite, before they are kept.

    They are looked at in main memory, so that nothing is compiled. All hosts of a mesh take part, and all processes
    over which weights are split.

    Args:
        tensors: the weights by the names that the message uses.
        when: what the message begins with, such as "step 3".

    Raises:
        FloatingPointError: one is not finite; the message names the matrix.
    """
    for name, tensor in tensors.items():
        if not _is_finite(tensor if fsdp.is_part(tensor) else tensor.detach().cpu()):
            raise FloatingPointError(
                f"{when}: {name} is not finite; nothing is saved. Checkpoints of earlier steps are whole: resume from "
                "one. A learning_rate that is too high makes weights that are not finite"
            )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, in whichever process they lie."""
    finite = bool(torch.isfinite(fsdp.own_part(tensor)).all())
    return not together.anyone(not finite) if fsdp.is_part(tensor) else finite
