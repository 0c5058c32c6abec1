"""Gradients, weights and optimizer moments must be finite before they are used or kept."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# ---- numbers ----


def check_gradient_norm(norm: float, model: nn.Module, step: int) -> None:
    """A gradient must be finite before the optimizer may step.

    Raises:
        FloatingPointError: `norm` is not; names the step and a matrix.
    """
    if math.isfinite(norm):
        return
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    named = next((name for name, gradient in gradients.items() if math.isnan(_zero_if_finite(gradient))), None)
    where = f"that of {named} is not finite" if named else "it is too large for float32"
    raise FloatingPointError(
        f"step {step}: the gradient's norm is {norm}: {where}; the optimizer has not stepped, and nothing is saved. "
        "Checkpoints of earlier steps are whole: resume from one, with a lower learning_rate in a new run"
    )


def _zero_if_finite(tensor: Tensor) -> Tensor:
    """0 where all of a tensor's numbers are finite, else NaN, (). A sum: the hosts of a mesh share it on any device."""
    return (tensor.detach() * 0).sum()


def check_finite(weights: Mapping[str, Tensor], when: str) -> None:
    """Weights and moments that are kept, or have been learned with, must be finite. All are on one device.

    Raises:
        FloatingPointError: one is not; names `when` and the matrix.
    """
    if not weights or float(torch.stack([_zero_if_finite(weight) for weight in weights.values()]).sum()) == 0:
        return  # the host has waited once
    for name, weight in weights.items():
        if math.isnan(_zero_if_finite(weight)):
            raise FloatingPointError(
                f"{when}: {name} is not finite; nothing is saved. Checkpoints of earlier steps are whole: resume from "
                "one. A learning_rate that is too high, or an adam_epsilon of 0, makes weights that are not finite"
            )
