"""The numbers of a step, under the names that TRL and Tunix use, and the invariants read off them."""

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = ("ratio_gap", "largest_sampler_gap")


def rollout_metrics(
    ids: Tensor,
    mask: Tensor,
    rewards: Tensor,
    totals: Tensor,
    names: Sequence[str],
    group_size: int,
    eos_ids: list[int],
) -> dict[str, float]:
    """Numbers about one rollout, all computed on the host.

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


def sum_up(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The scalars of a pass over a batch: sums over its micro-batches, or the largest. The host waits once."""
    names = [name for name in parts[0] if parts[0][name].ndim == 0]
    columns = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts])  # (parts, names)
    largest = torch.tensor([name in LARGEST for name in names], device=columns.device)
    values = torch.where(largest, columns.amax(dim=0), columns.sum(dim=0)).tolist()
    return dict(zip(names, values, strict=True))


def learning_metrics(first: dict[str, float], last: dict[str, float]) -> dict[str, float]:
    """What is logged of the first and the last pass over a batch (see `TunixTrainer._learn`)."""
    weight, tokens = max(last["weight"], 1e-12), max(last["tokens"], 1.0)
    return {
        "pg_loss": last["policy_loss"],
        "kl": last["kl_loss"] / weight,
        "clip_ratio/region_mean": last["clipped_weight"] / weight,
        "entropy": last["entropy"] / tokens,
        "sampling/sampling_logp_difference/mean": first["sampler_gap"] / tokens,
    }


def broken_invariant(first: dict[str, float], exact: bool, at_base: bool) -> str | None:
    """What is wrong with the first pass over a batch, or None.

    Args:
        first: from `sum_up`.
        exact: the model computes in float32, so tolerances are narrow.
        at_base: the policy has not left the reference yet, so the KL must be 0.
    """
    if first["num_bad_rows"]:
        return "log-probabilities are not finite, or above 0"
    if first["ratio_gap"] > (1e-3 if exact else 0.1):
        return f"the first ratio is off 1 by {first['ratio_gap']:.3g}"
    if exact and first["largest_sampler_gap"] > 1e-2:
        return f"sampler and learner disagree by {first['largest_sampler_gap']:.3g} on a log-probability"
    if exact and at_base and abs(first["kl_loss"]) > 1e-4 * max(first["weight"], 1e-12):
        return f"the reference policy is not the base model: KL sum {first['kl_loss']:.3g} before the first step"
    return None
