"""Learning from preference pairs: a batch of chosen and rejected completions, its passes, and their evaluation."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import TrainBatch, completion_lengths
from ..config.grpo import GRPOConfig
from ..data.batches import Collator
from ..data.rows import Row
from ..model.decoding import with_fast_layers
from ..runtime import device, together
from ..runtime.profiling import span
from .logprobs import token_logps
from .metrics import sum_up
from .passes import Pass, in_passes
from .preference import preference_terms

AsReference = Callable[[], AbstractContextManager[None]]  # within its context the model is the reference policy


def pair_batch(
    inputs: dict[str, Any], num_pairs: int, num_counted: int | None = None, place: torch.device | None = None
) -> TrainBatch:
    """Make a batch of what `Collator` made of N pairs: G = 2, B = 2N, each chosen before its rejected.

    A pair's weight in the loss, 1 / `num_pairs`, stands in `token_weights` at every token of both completions.
    `num_pairs` counts all pairs that the optimizer step learns from: those of accumulated batches and of other
    processes too. Of this batch the first `num_counted` pairs count, the others only fill its shape; None: all count.
    Its tensors are on `place`; None: on this process's device.
    """
    lengths = completion_lengths(inputs["completion_mask"])
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    columns = {name: inputs[name] for name in names}
    columns["advantages"] = torch.zeros(len(lengths))
    # Weights are computed in main memory, so that no graph depends on the number of pairs.
    columns["token_weights"] = inputs["completion_mask"].float() / max(num_pairs, 1)
    if num_counted is not None:
        columns["token_weights"][2 * num_counted :] = 0.0
    place = device.torch_device() if place is None else place
    return TrainBatch(**{name: value.to(place) for name, value in columns.items()}, lengths=lengths)


@with_fast_layers
@torch.no_grad()
def logps_of_pairs(model: nn.Module, batch: TrainBatch, args: GRPOConfig) -> Tensor:
    """Log-probabilities by the model as it is now, at temperature 1: (B, C) float32, 0 where masked."""
    model.eval()

    def compute(part: Pass) -> Tensor:
        logps = token_logps(model, part)[0]
        device.sync()
        return logps

    return torch.cat(in_passes(batch, args, compute))


def _add_reference(model: nn.Module, batch: TrainBatch, args: GRPOConfig, as_reference: AsReference) -> None:
    """Add the log-probabilities of the reference policy, where the loss needs it. It is within `as_reference`."""
    if args.needs_reference:
        with span("reference"), as_reference():
            batch.ref_per_token_logps = logps_of_pairs(model, batch, args)


@with_fast_layers
def learn_pairs(
    model: nn.Module, batch: TrainBatch, args: GRPOConfig, backward: Callable[[Tensor], None]
) -> list[dict[str, Tensor]]:
    """Run a `pair_batch` forward and backward in micro-batches of whole pairs, with `backward` as in `learn`.

    Returns:
        for each micro-batch the numbers of `pair_numbers`, which add up.
    """
    model.train()

    def learn_pass(part: Pass) -> dict[str, Tensor]:
        loss, numbers = pair_numbers(token_logps(model, part)[0], part.batch, args)
        backward(loss)
        device.sync()
        return numbers

    return in_passes(batch, args, learn_pass)


def pair_numbers(logps: Tensor, batch: TrainBatch, args: GRPOConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some pairs, and numbers of them under TRL's names.

    Args:
        logps: (B, C) float32, the policy's.
        batch: pairs, with `ref_per_token_logps` where the loss needs a reference policy.

    Returns:
        the loss, (), with gradient, and numbers without: scalars on the device that add up over micro-batches, since
        each is a sum over pairs by their weights. `weight` is the sum of the weights.
    """
    terms = preference_terms(
        args.preference_loss,
        logps,
        batch.ref_per_token_logps,
        batch.completion_mask,
        beta=args.pair_beta,
        gamma=args.simpo_gamma,
        label_smoothing=args.label_smoothing,
    )
    weights = batch.token_weights[::2].amax(dim=1)  # (N,)
    loss = (terms.loss * weights).sum()
    margins = terms.chosen_rewards - terms.rejected_rewards
    columns = {
        "loss": terms.loss.detach(),
        "weight": torch.ones_like(margins),
        "rewards/chosen": terms.chosen_rewards,
        "rewards/rejected": terms.rejected_rewards,
        "rewards/accuracies": (margins > 0).float(),
        "rewards/margins": margins,
        "logps/chosen": terms.chosen_logps,
        "logps/rejected": terms.rejected_logps,
    }
    return loss, {name: (column * weights).sum() for name, column in columns.items()}


def learn_pair_rows(
    model: nn.Module,
    inputs: dict[str, Any],
    together_with: Sequence[dict[str, Any]],
    args: GRPOConfig,
    backward: Callable[[Tensor], None],
    sum_gradients: Callable[[], None],
    as_reference: AsReference,
) -> tuple[Tensor, dict[str, float]]:
    """Run one batch of pairs forward and backward. The arguments and results are those of `learn_rows`.

    `as_reference` is entered for the passes of the reference policy, where the loss needs it.
    """
    counts = {"pairs": sum(len(batch["prompt_ids"]) for batch in together_with)}
    counts = together.sum_numbers(counts | {"tokens": int(inputs["completion_mask"].sum())})
    batch = pair_batch(inputs, counts["pairs"])
    _add_reference(model, batch, args, as_reference)
    started = time.perf_counter()
    with span("learning"):
        own = sum_up(learn_pairs(model, batch, args, backward))  # here Python waits for the device
        sum_gradients()
    seconds = time.perf_counter() - started
    numbers = together.sum_numbers(own)
    metrics = {name: value / numbers["weight"] for name, value in numbers.items() if "/" in name}
    metrics["learning_tokens_per_second"] = counts["tokens"] / seconds
    loss = device.scalar(own["loss"] * together.count())
    device.sync()
    return loss, metrics


@torch.no_grad()
def pair_metrics(
    model: nn.Module, rows: Sequence[Row], collator: Collator, args: GRPOConfig, as_reference: AsReference
) -> dict[str, float]:
    """The mean loss of pairs, and the means of what else is logged about them, such as `rewards/accuracies`.

    Each process takes a part of the rows, and all of them return the means over all rows.

    Args:
        rows: pairs from `prepare_rows`.
    """
    size, totals = args.per_device_eval_batch_size, []
    for some in together.own_batches(len(rows), size):
        part = list(rows[some])
        filled = collator(part + [(part or rows)[-1]] * (size - len(part)))  # so that all have one shape
        batch = pair_batch(filled, 1, num_counted=len(part))
        _add_reference(model, batch, args, as_reference)
        _, numbers = pair_numbers(logps_of_pairs(model, batch, args), batch, args)
        totals.append(sum_up([numbers]))  # here Python waits for the device
    names = ("loss", "weight", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    sums = {name: sum(together.gather(sum(numbers[name] for numbers in totals))) for name in names}
    return {name: sums[name] / sums["weight"] for name in names if name != "weight"}
