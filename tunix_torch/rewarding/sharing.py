"""Batches that are collected together: those that one step accumulates, or those of steps that share a rollout."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batch import PromptBatch, TrainBatch
from ..config.grpo import GRPOConfig
from ..data.batches import join_prompts
from ..learn.weights import step_weights
from ..runtime import device


def collect_together(
    steps: Sequence[Sequence[dict[str, Any]]],
    collect: Callable[[PromptBatch], tuple[TrainBatch, Tensor]],
    advantages_of: Callable[[Tensor, Tensor], Tensor],
    args: GRPOConfig,
    pad_token_id: int,
) -> list[tuple[TrainBatch, Tensor]]:
    """Collect the batches of one optimizer step, each by itself, or those of several steps by one rollout.

    Args:
        steps: for each step the batches of prompts that it accumulates, as the collator makes them.
        collect: samples and scores completions of N prompts: what is learned from, and its rewards (B, R).
        advantages_of: the advantages, (B,) on the device, of rows with these rewards, (B, R), and totals, (B,).

    Returns:
        batches with their rewards, in the order in which they are learned from, one for each pass: first every batch
        once, then every batch again, as often as `num_iterations` says (the order of TRL). A token's weight is relative
        to all tokens of its step, and an advantage to all rows that are collected here, as if they were one batch.
    """
    prompts = [PromptBatch(**columns).to(args.device) for batches in steps for columns in batches]
    if args.steps_per_generation > 1:
        prompts = [join_prompts(prompts, pad_token_id)]
    collected: list[tuple[TrainBatch, Tensor]] = []
    for part in prompts:
        batch, rewards = collect(part)
        collected += zip(batch.split(args.rows_per_step), rewards.split(args.rows_per_step), strict=True)
    device.sync()  # so that all these tensors exist, and no step has a graph of its own
    batches, rewards = zip(*collected, strict=True)
    masks, learned = [b.completion_mask.cpu() for b in batches], [b.token_weights.cpu() > 0 for b in batches]
    each = len(steps[0])  # batches that one step accumulates
    starts = range(0, len(batches), each)
    weights = [w for i in starts for w in step_weights(masks[i : i + each], learned[i : i + each], args)]
    advantages = advantages_of(torch.cat(rewards), torch.cat([b.rewards for b in batches]))
    advantages = advantages.split([len(b.advantages) for b in batches])
    parts = zip(batches, advantages, weights, rewards, strict=True)
    return [(replace(b, advantages=a, **w), r) for b, a, w, r in parts] * args.num_iterations
