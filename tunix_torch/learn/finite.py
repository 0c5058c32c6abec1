"""Gradients, weights and optimizer moments must be finite before they are used or kept."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def bad_gradients(model: nn.Module) -> list[str]:
    """The names of the parameters whose gradients are not finite."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]


def check_finite(tensors: Mapping[str, Tensor], when: str) -> None:
    """Check that weights, or an optimizer's moments, are finite, before they are kept.

    They are looked at in main memory, so that nothing is compiled. All hosts of a mesh take part.

    Args:
        tensors: the weights by the names that the message uses.
        when: what the message begins with, such as "step 3".

    Raises:
        FloatingPointError: one is not finite; the message names the matrix.
    """
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.detach().cpu()).all()):
            raise FloatingPointError(
                f"{when}: {name} is not finite; nothing is saved. Checkpoints of earlier steps are whole: resume from "
                "one. A learning_rate that is too high makes weights that are not finite"
            )
