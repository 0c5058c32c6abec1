"""Weights of the policy loss where another policy has sampled than the one that learns, as TRL 1.16 has them."""

import torch
from torch import Tensor

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..grpo import LARGEST_EXPONENT


def sampler_ratios(batch: TrainBatch, logps: Tensor, args: GRPOConfig) -> Tensor | None:
    """How much likelier the policy that the batch was sampled with is than the truncated one that chose the tokens.

    The ratio is exp(old_logps - sampler_logps), of a token or of a row's sum. The modes that truncate limit it to
    [`sampler_correction_min`, `sampler_correction_max`]; those that mask make it 0 outside.

    Args:
        logps: (B, C) float32 without gradient, in place of `batch.old_per_token_logps` where there are none.

    Returns:
        (B, C) float32, with the modes of sequences the same in all of a row; None without a correction.
    """
    if not args.corrects_sampler:
        return None
    old = logps if batch.old_per_token_logps is None else batch.old_per_token_logps
    difference = (old - batch.sampler_logps).masked_fill(batch.token_weights == 0, 0.0)
    if args.sampler_correction.startswith("sequence"):
        difference = difference.sum(dim=1, keepdim=True).expand_as(difference)
    ratios = difference.clamp(max=LARGEST_EXPONENT).exp()
    low, high = args.sampler_correction_min, args.sampler_correction_max
    limited = ratios if low is None and high is None else ratios.clamp(low, high)
    return limited if args.sampler_correction.endswith("truncate") else torch.where(limited == ratios, ratios, 0.0)


def sampler_gap(batch: TrainBatch, logps: Tensor, args: GRPOConfig) -> Tensor:
    """How far the log-probabilities of the policy that sampled are from those that its sampler gave: (B, C) float32.

    It is 0 up to rounding, where both do the same. Where sampling truncates the distribution, only what can't be is
    counted: truncation raises log-probabilities, and a repetition penalty may do anything.

    Args:
        logps: (B, C) float32 without gradient, in place of `batch.old_per_token_logps` where there are none.
    """
    own = logps if batch.old_per_token_logps is None else batch.old_per_token_logps
    gap = (own - batch.sampler_logps) * batch.completion_mask
    if not args.corrects_sampler:
        return gap.abs()
    return gap.clamp(min=0.0) if args.repetition_penalty == 1 else torch.zeros_like(gap)


def policy_weights(batch: TrainBatch, logps: Tensor, ratios: Tensor | None, args: GRPOConfig) -> Tensor | None:
    """The weights of the tokens in the policy loss, (B, C) float32; None where they are `batch.token_weights`.

    Args:
        logps: (B, C) float32 without gradient, of the policy that learns.
        ratios: what `sampler_ratios` returned. VESPO takes them into its own ratio.
    """
    weights = batch.token_weights
    if batch.policy_mask is not None:
        weights = weights * batch.policy_mask
    if args.off_policy_mask_threshold is not None:
        weights = weights * _on_policy(batch, logps, args)[:, None]
    if ratios is not None and args.loss_type != "vespo":
        weights = weights * ratios
    return None if weights is batch.token_weights else weights


def _on_policy(batch: TrainBatch, logps: Tensor, args: GRPOConfig) -> Tensor:
    """Which rows are learned from, (B,) bool: those with an advantage of at least 0, and those from whose sampler the
    policy has not gone far: mean(log-probability then - now) is at most the threshold (arXiv 2512.02556, equation 9).

    The sampler is the policy before it learns from the batch; with a sampler correction it is the truncated one.
    """
    then = batch.sampler_logps if args.corrects_sampler else batch.old_per_token_logps
    mask = batch.token_weights > 0
    drift = ((logps if then is None else then) - logps) * mask
    return (batch.advantages >= 0) | (drift.sum(1) / mask.sum(1).clamp(min=1) <= args.off_policy_mask_threshold)
