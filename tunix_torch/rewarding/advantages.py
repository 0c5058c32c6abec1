"""Advantages: how much better each completion is than the others, from the rewards of a step."""

import math

import torch
from torch import Tensor

from ..config.grpo import GRPOConfig
from ..learn.equal_rewards import all_equal
from ..runtime import together


def compute_group_advantages(
    rewards: Tensor,
    group_size: int,
    algorithm: str = "grpo",
    normalize: bool = True,
    epsilon: float = 1e-8,
    std: Tensor | None = None,
) -> Tensor:
    """How much better each completion is than the mean of its group.

    grpo, gspo, dapo: (r - mean) / (std + epsilon), std with ddof = 1 (DeepSeekMath, arXiv 2402.03300, section 4.1.2);
    without `normalize`, and for dr_grpo (arXiv 2503.20783): r - mean; rloo (arXiv 2402.14740): r - mean of the others.

    Args:
        rewards: (B,), rows of a group side by side.
        group_size: G, at least 2.
        std: () float64, divides in place of each group's own standard deviation, such as that of the whole batch.

    Returns:
        (B,) float32 on the device of `rewards`, computed in float64. Advantages are exactly 0 in a group whose rewards
        are equal, or differ only by the rounding of float64 (0.1 + 0.2 and 0.3).

    Raises:
        ValueError: `group_size` is below 2 or does not divide B, or `rewards` is not one-dimensional.
    """
    if rewards.ndim != 1 or group_size < 2 or rewards.shape[0] % group_size:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} can't be cut into groups of {group_size}, at least 2"
        )
    grouped = rewards.double().view(-1, group_size)  # (N, G)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    centred = centred - centred.mean(dim=1, keepdim=True)  # corrects the rounding of the first subtraction
    if algorithm == "rloo":
        centred = centred * (group_size / (group_size - 1))  # r - (sum - r) / (G - 1)
    elif normalize and algorithm != "dr_grpo":
        centred = centred / ((centred.std(dim=1, keepdim=True) if std is None else std) + epsilon)
    # else a residue of rounding, divided by itself, would count in full
    return torch.where(all_equal(grouped), 0.0, centred).flatten().float()


def step_advantages(rewards: Tensor, totals: Tensor, weights: Tensor, args: GRPOConfig) -> Tensor:
    """The advantages of this process's rows of a step, scaled as the settings say.

    `scale_rewards` "batch" divides by the standard deviation of all rows of the step, those of other processes included
    (arXiv 2508.08221). `multi_objective_aggregation` "normalize_then_sum" is `decoupled_advantages`.

    Args:
        rewards: (B, R) float64, NaN where a function does not apply. Only "normalize_then_sum" reads them.
        totals: (B,) float64, the weighted sums of the rewards; NaN in groups that were dropped.
        weights: (R,) float64, one for each reward function.

    Returns:
        (B,) float32, see `compute_group_advantages`; 0 in groups that were dropped.
    """
    group_size, epsilon = args.num_completions_per_prompt, args.advantage_epsilon
    if args.multi_objective_aggregation == "normalize_then_sum":
        return decoupled_advantages(rewards, weights, group_size, epsilon)
    scale = args.reward_scale
    std = None
    if scale == "batch":
        everyones = together.gather_rows(totals)
        std = everyones[~everyones.isnan()].std()  # without groups that were dropped
    return compute_group_advantages(totals, group_size, args.algorithm, scale != "none", epsilon, std)


def decoupled_advantages(rewards: Tensor, weights: Tensor, group_size: int, epsilon: float) -> Tensor:
    """GDPO (arXiv 2601.05242): each function's rewards are normalized within the group, then summed, then scaled.

    For function k, n_k = (r_k - mean) / (std + epsilon) within the group. With s = sum of weight_k * n_k, an advantage
    is s / (std of s over all rows of the step + epsilon). The mean of s is 0 already. A function that does not apply to
    a row adds nothing to it, nor one that applies to no other row of the group.

    Args:
        rewards: (B, R) float64, NaN where a function does not apply.
        weights: (R,) float64.

    Returns:
        (B,) float32: 0 where no function applies to a row, and where each function rewards the group equally.
    """
    grouped = rewards.view(-1, group_size, rewards.shape[1])  # (N, G, R)
    count = (~grouped.isnan()).sum(dim=1, keepdim=True)  # (N, 1, R)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    std = (centred.square().nansum(dim=1, keepdim=True) / (count - 1)).sqrt()  # NaN where a row is alone
    normalized = torch.where(all_equal(grouped), 0.0 * grouped, centred / (std + epsilon))
    sums = (normalized * weights).nansum(dim=2).flatten()  # (B,)
    everyones = together.gather_rows(sums.masked_fill(rewards.isnan().all(dim=1), math.nan))
    return (sums / (everyones[~everyones.isnan()].std() + epsilon)).nan_to_num(0.0).float()


def overlong_penalties(lengths: Tensor, args: GRPOConfig) -> Tensor:
    """What total rewards lose for the length of completions, (B,) float64 (DAPO, arXiv 2503.14476, equation 13).

    It is 0 up to `generation_max_length - overlong_buffer_length` tokens. Over the buffer it rises linearly, to
    `overlong_penalty` at the greatest length.
    """
    excess = lengths.double() - (args.generation_max_length - args.overlong_buffer_length)
    return excess.clamp(min=0.0) / max(1, args.overlong_buffer_length) * args.overlong_penalty
