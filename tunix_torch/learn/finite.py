"""Gradients, weights and optimizer moments must be finite before they are used or kept."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def check_gradient_norm(norm: float, model: nn.Module, step: int) -> None:
    """Check that a gradient is finite, before the optimizer steps.

    Args:
        norm: the norm of the gradient of all weights together.

    Raises:
        FloatingPointError: the norm is not finite. The message names the step and a matrix.
    """
    if math.isfinite(norm):
        return
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    bad = [name for name, gradient in gradients.items() if math.isnan(_zero_if_finite(gradient))]
    # Clipping by a norm that is NaN makes all gradients NaN, so often all of them are found here.
    where = f"{len(bad)} gradients, such as that of {bad[0]}, are not finite" if bad else "it is too large for float32"
    raise FloatingPointError(
        f"step {step}: the gradient's norm is {norm}: {where}; the optimizer has not stepped, and nothing is saved. "
        "Checkpoints of earlier steps are whole: resume from one, with a lower learning_rate in a new run"
    )


def _zero_if_finite(tensor: Tensor) -> Tensor:
    """Return 0 where all numbers of a tensor are finite, else NaN: (). Every host of a mesh can read it, as a sum."""
    return (tensor.detach() * 0).sum()


def check_finite(weights: Mapping[str, Tensor], when: str) -> None:
    """Check that weights, or an optimizer's moments, are finite, before they are kept. All are on one device.

    Args:
        weights: the weights by the names that the message uses.
        when: what the message begins with, such as "step 3".

    Raises:
        FloatingPointError: one is not finite; the message names the matrix.
    """
    if not weights or float(torch.stack([_zero_if_finite(weight) for weight in weights.values()]).sum()) == 0:
        return  # one sum of all, so that usually the host waits only once
    for name, weight in weights.items():
        if math.isnan(_zero_if_finite(weight)):
            raise FloatingPointError(
                f"{when}: {name} is not finite; nothing is saved. Checkpoints of earlier steps are whole: resume from "
                "one. A learning_rate that is too high, or an adam_epsilon of 0, makes weights that are not finite"
            )
