"""The numbers that a step logs, under the names that TRL and Tunix use."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..runtime import together

logger = logging.getLogger(__name__)


def rollout_metrics(
    ids: Tensor,
    mask: Tensor,
    rewards: Tensor,
    totals: Tensor,
    names: Sequence[str],
    group_size: int,
    eos_ids: list[int],
) -> dict[str, float]:
    """Return the numbers that are logged about one rollout. All tensors lie in main memory.

    Args:
        ids, mask: (B, C) int64 and bool.
        rewards: (B, R) float64, NaN where a function did not apply; `names` are those of the R functions.
        totals: (B,) float64, the weighted totals.
    """
    lengths = mask.sum(dim=1).double()  # (B,)
    ended = (torch.isin(ids, torch.tensor(eos_ids)) & mask).any(dim=1)
    grouped = totals.view(-1, group_size)
    metrics = {
        "reward": totals.mean(),
        "reward_std": grouped.std(dim=1).mean(),
        "frac_reward_zero_std": (grouped == grouped[:, :1]).all(dim=1).double().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (~ended).double().mean(),
    }
    for j, name in enumerate(names):
        values = rewards[:, j][~rewards[:, j].isnan()]
        if len(values):
            metrics[f"rewards/{name}/mean"] = values.mean()
            metrics[f"rewards/{name}/std"] = values.std(correction=0)
    return {name: float(value) for name, value in metrics.items()}


def warn_of_equal_rewards(metrics: dict[str, float], step: int, example: str) -> None:
    """Say once, however many processes there are, what may be wrong where no group has completions of different
    rewards; `example` is one of them."""
    if metrics["frac_reward_zero_std"] == 1.0 and together.is_first():
        logger.warning(
            "Step %d: within every group all rewards are equal, so there is nothing to learn from this batch. "
            "The questions are too easy or too hard, the temperature is too low, or the reward functions do not "
            "find what they look for in completions such as %.200r",
            step,
            example,
        )


def sum_up(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The scalars of what `learn` returned, summed over micro-batches. The host waits for the device once."""
    names = [name for name in parts[0] if parts[0][name].ndim == 0]
    columns = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts])  # (parts, names)
    return dict(zip(names, columns.sum(dim=0).tolist(), strict=True))


def add_up(numbers: Sequence[dict[str, float]]) -> dict[str, float]:
    """The sum of each number over the batches of an optimizer step."""
    return {name: sum(of_batch[name] for of_batch in numbers) for name in numbers[0]}


def learning_metrics(first: dict[str, float], last: dict[str, float], has_reference: bool) -> dict[str, float]:
    """Return what is logged about the first and the last time that a batch was learned from.

    Args:
        first, last: the sums over micro-batches of what `learn_micro_batch` returned.
    """
    weight, tokens = max(last["weight"], 1e-12), max(last["tokens"], 1.0)
    kl = {"kl": last["kl_loss"] / weight} if has_reference else {}
    return kl | {
        "pg_loss": last["policy_loss"],
        "clip_ratio/region_mean": last["clipped_weight"] / weight,
        "entropy": last["entropy"] / tokens,
        "sampling/sampling_logp_difference/mean": first["sampler_gap"] / tokens,
    }
