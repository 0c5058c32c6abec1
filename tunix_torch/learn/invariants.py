"""What must hold before the first optimizer step on a batch, whatever the model and the data."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model.adapter import adapter_weights
from ..model.forward import base_model
from ..model.policy import Policy
from .finite import check_finite
from .metrics import broken_invariant


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
    """See that the first ratio is 1, that sampler and learner agree, and that the first KL is 0.

    Args:
        parts: for each micro-batch what `learn_pass` returned.
        first: their `sum_up`.
        policy: that has learned; in float32 the limits are narrow.
        step: the number of the optimizer step, from 1, for messages.
        describe_row: what to say of a row of the batch.
        at_reference, dropout: see `broken_invariant`.

    Raises:
        FloatingPointError: a weight or a log-probability is not finite.
        AssertionError: something else does not hold; the message says what, and describes the row.
    """
    exact = base_model(policy.model).dtype == torch.float32
    broken = broken_invariant(parts, first, exact, at_reference, dropout)
    if broken is None:
        return
    check_finite(adapter_weights(policy.model, policy.adapter), f"step {step}")
    check_finite({"a log-probability": torch.cat([part["logps"] for part in parts])}, f"step {step}")
    message, row = broken
    raise AssertionError(f"{message}; {describe_row(row)}")
