"""Batches that are collected together: those that one step accumulates, or those of steps that share a rollout."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..batch import PromptBatch, TrainBatch
from ..config.grpo import GRPOConfig
from ..data.batches import join_prompts
from ..runtime import device


def collect_together(
    steps: Sequence[Sequence[dict[str, Any]]],
    collect: Callable[[PromptBatch], tuple[TrainBatch, Tensor]],
    token_weights: Callable[[Sequence[Tensor]], list[Tensor]],
    args: GRPOConfig,
    pad_token_id: int,
) -> list[tuple[TrainBatch, Tensor]]:
    """Collect the batches of one optimizer step, each by itself, or those of several steps by one rollout.

    Args:
        steps: for each step the batches of prompts that it accumulates, as the collator makes them.
        collect: samples and scores completions of N prompts: what is learned from, and its rewards (B, R).
        token_weights: for the masks of the batches of one step, (B, C) bool on the CPU, the weights of their tokens.

    Returns:
        batches with their rewards, in the order in which they are learned from, one for each pass: first every batch
        once, then every batch again, as often as `num_iterations` says (the order of TRL). A token's weight is relative
        to all tokens of its step, as if the batches that the step accumulates were one.
    """
    prompts = [PromptBatch(**columns).to(args.device) for batches in steps for columns in batches]
    if args.steps_per_generation > 1:
        prompts = [join_prompts(prompts, pad_token_id)]
    collected: list[tuple[TrainBatch, Tensor]] = []
    for part in prompts:
        batch, rewards = collect(part)
        collected += zip(batch.split(args.rows_per_step), rewards.split(args.rows_per_step), strict=True)
    device.sync()  # so that all these tensors exist, and no step has a graph of its own
    masks, each = [batch.completion_mask.cpu() for batch, _ in collected], len(steps[0])
    weights = [w for first in range(0, len(masks), each) for w in token_weights(masks[first : first + each])]
    collected = [(replace(b, token_weights=w), rewards) for (b, rewards), w in zip(collected, weights, strict=True)]
    return collected * args.num_iterations
