"""Checks what must hold before the first optimizer step on a batch, whatever the model and the data."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.forward import base_model
from ..model.policies import Policy
from .finite import check_finite


def check_first_pass(
    parts: Sequence[dict[str, Tensor]],
    first: dict[str, float],
    policy: Policy,
    step: int,
    describe_row: Callable[[int], str],
    *,
    at_reference: bool,
    dropout: bool,
) -> None:
    """Check that the first ratio is 1, that sampler and learner agree, and that the first KL is 0.

    Where the loss is not finite the step will be skipped, so only the weights are looked at.

    Args:
        parts: what `learn_micro_batch` returned for each micro-batch.
        first: the sums over `parts` that `sum_up` returned.
        policy: the policy that learns. Where it computes in float32 the limits are narrow.
        step: the number of the optimizer step, from 1, for messages.
        describe_row: returns what a message says about a row of the batch.
        at_reference: the policy has not left the reference yet, so its KL must be 0.
        dropout: the policy has dropout, so its log-probabilities differ from the sampler's and need only be finite.

    Raises:
        FloatingPointError: a weight is not finite.
        AssertionError: one of them does not hold; the message says what, and describes the row.
    """
    if not math.isfinite(first["loss"]):
        check_finite(policy.weights(), f"step {step}")
        return
    exact = base_model(policy.model).dtype == torch.float32
    broken = _broken_invariant(parts, first, exact, at_reference, dropout)
    if broken is not None:
        message, row = broken
        raise AssertionError(f"step {step}: {message}; {describe_row(row)}")


def _broken_invariant(
    parts: Sequence[dict[str, Tensor]], first: dict[str, float], exact: bool, at_reference: bool, dropout: bool
) -> tuple[str, int] | None:
    """Return what does not hold and the first row of the batch where it does not, or None where everything holds.

    Args:
        exact: the model computes in float32, so the limits are narrow.
    """

    def column(name: str) -> Tensor:  # (B,)
        return torch.cat([part[name].float() for part in parts]).cpu()

    checks = [(column("row_bad"), 0.5, "a log-probability is not finite, or above 0")]
    if not dropout:
        ratio_gap, sampler_gap = column("row_ratio_gap"), column("row_sampler_gap")
        checks.append((ratio_gap, 1e-3 if exact else 0.1, "the first ratio is off 1 by {:.3g}"))
        if exact:
            checks.append((sampler_gap, 1e-2, "sampler and learner disagree by {:.3g} on a log-probability"))
        elif first["sampler_gap"] > 0.2 * max(first["tokens"], 1.0):  # in bfloat16 only the mean is limited
            most = sampler_gap.max() * (1 - 1e-6)
            checks.append((sampler_gap, most, "sampler and learner disagree by up to {:.3g} on a log-probability"))
        if exact and at_reference:
            message = "the policy has not learned yet, but its KL from the reference policy is {:.3g}"
            checks.append((column("row_largest_kl"), 1e-4, message))
    for values, limit, message in checks:
        broken = ~(values <= limit)  # unlike `values > limit`, this is true for NaN
        if broken.any():
            row = int(broken.int().argmax())
            return message.format(float(values[row])), row
    return None
