"""The weights of tokens: how much each counts in the loss of an optimizer step, and in its entropy bonus."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..batch import TrainBatch, completion_lengths
from ..config.grpo import GRPOConfig
from ..grpo import LOSS_AGGREGATIONS
from ..runtime import device, together


def aggregation_weights(
    completion_mask: Tensor,
    mode: str,
    max_length: int,
    num_tokens: float | None = None,
    num_rows: float | None = None,
) -> Tensor:
    """The weight of each token in the loss, so that loss = sum(per_token_loss * weights) for every mode.

    Weights are computed once for everything that an optimizer step learns from. So the losses of micro-batches and of
    accumulated batches add up to exactly that of one whole batch. A row without any token does not count as a row.

    Args:
        completion_mask: (B, C) bool.
        mode: one of `LOSS_AGGREGATIONS`:
            token-mean: over all tokens of the batch;
            sequence-mean-token-mean: over tokens within a row, then over rows;
            sequence-mean-token-scale: sum of a row divided by `max_length`, then mean over rows;
            seq-mean-token-sum: sum of a row, then mean over rows;
            sequence-mean-token-sum-norm: sum of everything divided by the number of rows.
            The last two give the same number. Both names exist because google-tunix has both.
        max_length: the number of tokens that a completion may have at most.
        num_tokens, num_rows: their numbers in all batches of the optimizer step. None: they are counted in this mask.

    Returns:
        (B, C) float32.
    """
    mask = completion_mask.float()
    lengths = mask.sum(dim=-1, keepdim=True)  # (B, 1)
    num_tokens = max(1.0, float(mask.sum()) if num_tokens is None else num_tokens)
    num_rows = max(1.0, float((lengths > 0).sum()) if num_rows is None else num_rows)
    if mode == "token-mean":
        return mask / num_tokens
    if mode == "sequence-mean-token-mean":
        return mask / lengths.clamp(min=1) / num_rows
    if mode == "sequence-mean-token-scale":
        return mask / max_length / num_rows
    if mode in ("seq-mean-token-sum", "sequence-mean-token-sum-norm"):
        return mask / num_rows
    raise ValueError(f"loss_aggregation={mode!r}: choose one of {', '.join(LOSS_AGGREGATIONS)}")


def learned_tokens(ids: Tensor, mask: Tensor, eos_ids: Sequence[int], args: GRPOConfig) -> Tensor:
    """Which tokens the loss counts, (B, C) bool on the CPU: with `mask_truncated_completions` only those of completions
    that have an end token, and then Python waits for the device.

    Args:
        ids: (B, C) int64.
        mask: (B, C) bool on the CPU.
    """
    if not args.mask_truncated_completions:
        return mask
    ended = torch.isin(ids.cpu(), torch.tensor(eos_ids)) & mask
    return mask & ended.any(dim=1, keepdim=True)


def without_dropped(batch: TrainBatch, totals: Tensor, args: GRPOConfig) -> TrainBatch:
    """The batch where rows whose total reward is NaN, (B,) on the CPU, have no token: they weigh nothing in loss,
    gradient, penalty and bonus, and the others weigh as if these rows were not there. No shape depends on them.

    With `on_reward_error` "stop" there are none. Otherwise masks and weights are uploaded for every batch alike: on XLA
    a batch with such rows has the graphs of all the others.
    """
    if not args.drops_failed_groups:
        return batch
    kept = ~totals.isnan()[:, None]  # (B, 1)
    mask, learned = batch.completion_mask.cpu() & kept, (batch.token_weights.cpu() > 0) & kept  # here Python waits
    weights = step_weights([mask], [learned], args)[0]
    return replace(batch, completion_mask=device.upload(mask, args.device), lengths=completion_lengths(mask), **weights)


def step_weights(
    masks: Sequence[Tensor], learned: Sequence[Tensor], args: GRPOConfig
) -> list[dict[str, Tensor | None]]:
    """The weight of each token, relative to all that an optimizer step learns from, over all processes.

    Rows count where they have tokens, whether or not these are learned from. So does TRL count them.

    Args:
        masks, learned: for each batch of the step `completion_mask` and `learned_tokens`, (B, C) bool on the CPU.

    Returns:
        for each batch fields of `TrainBatch`, (B, C) float32 on the device: `token_weights`, and where there is an
        entropy bonus `entropy_weights`, with which it is the mean entropy of all tokens; else None.
    """
    counts = {"num_tokens": sum(int(m.sum()) for m in learned), "num_rows": sum(int(m.any(1).sum()) for m in masks)}
    counts = together.sum_numbers(counts)

    def of(mask: Tensor, mode: str) -> Tensor:
        return device.upload(aggregation_weights(mask, mode, args.generation_max_length, **counts), args.device)

    bonus = args.has_entropy_bonus
    return [
        {"token_weights": of(mask, args.aggregation), "entropy_weights": of(mask, "token-mean") if bonus else None}
        for mask in learned
    ]
