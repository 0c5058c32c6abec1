"""Checks what must hold before the first optimizer step on a batch, whatever the model and the data."""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..model.forward import base_model
from ..model.policies import Policy
from ..runtime import device
from ..runtime.once import warn_once
from .finite import check_finite

logger = logging.getLogger(__name__)

EXACT_GAP, ROUNDED_GAP = 1e-3, 0.1  # how far a first ratio may be off 1: in float32, and where products are rounded


def check_first_pass(
    rows: dict[str, Tensor],
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
        rows, first: the numbers of each row, (B,) float32 in main memory, and the sums: see `metrics.look_at`.
        policy: the policy that learns. Where it computes with float32's precision the limits are narrow. Where products
            are rounded, a token of thousands may have any ratio, so a warning says if many rows have such a token.
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
    exact = device.multiplies_exactly(base_model(policy.model).dtype)
    if not (exact or dropout):
        _say_if_ratios_are_off(rows["row_ratio_gap"], step)
    broken = _broken_invariant(rows, first, exact, at_reference, dropout)
    if broken is not None:
        message, row = broken
        raise AssertionError(f"step {step}: {message}; {describe_row(row)}")


def _broken_invariant(
    rows: dict[str, Tensor], first: dict[str, float], exact: bool, at_reference: bool, dropout: bool
) -> tuple[str, int] | None:
    """Return what does not hold and the first row of the batch where it does not, or None where everything holds.

    Args:
        exact: products have float32's precision, so the limits are narrow.
    """
    checks = [(rows["row_bad"], 0.5, "a log-probability is not finite, or above 0")]
    if not dropout:
        sampler_gap = rows["row_sampler_gap"]
        if exact:
            checks.append((rows["row_ratio_gap"], EXACT_GAP, "the first ratio is off 1 by {:.3g}"))
            checks.append((sampler_gap, 1e-2, "sampler and learner disagree by {:.3g} on a log-probability"))
        elif first["sampler_gap"] > 0.2 * max(first["tokens"], 1.0):  # in bfloat16 only the mean is limited
            most = sampler_gap.max() * (1 - 1e-6)
            checks.append((sampler_gap, most, "sampler and learner disagree by up to {:.3g} on a log-probability"))
        if exact and at_reference:
            message = "the policy has not learned yet, but its KL from the reference policy is {:.3g}"
            checks.append((rows["row_largest_kl"], 1e-4, message))
    for values, limit, message in checks:
        broken = ~(values <= limit)  # unlike `values > limit`, this is true for NaN
        if broken.any():
            row = int(broken.int().argmax())
            return message.format(float(values[row])), row
    return None


def _say_if_ratios_are_off(gaps: Tensor, step: int) -> None:
    """Warn where a tenth of the rows or more have a token whose first ratio is off 1 by more than `ROUNDED_GAP`.

    Args:
        gaps: (B,) float32, the largest gap of each row.
    """
    gap = float(gaps.nan_to_num(torch.inf).quantile(0.9))
    if gap > ROUNDED_GAP:
        warn_once(
            logger,
            "In a tenth of the rows a token's first ratio is off 1, by rounding. "
            f"In step {step} it was by {gap:.3g} or more. With num_iterations above 1 such tokens are clipped although "
            "nothing was learned from them; model_dtype float32 has none of this",
        )
