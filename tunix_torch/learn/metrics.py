"""The numbers that a step logs, under the names that TRL and Tunix use."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..config.loss import loss_type_of
from ..grpo import LossTerms


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
        totals: (B,) float64, the weighted totals; NaN in groups that were dropped, of which only the lengths count.
    """
    lengths = mask.sum(dim=1).double()  # (B,)
    ended = (torch.isin(ids, torch.tensor(eos_ids)) & mask).any(dim=1)
    grouped = totals.view(-1, group_size)
    grouped = grouped[~grouped.isnan().any(dim=1)]
    metrics = {}
    if names:  # with a teacher there need not be any
        metrics |= {
            "reward": grouped.mean(),
            "reward_std": grouped.std(dim=1).mean(),
            "frac_reward_zero_std": (grouped == grouped[:, :1]).all(dim=1).double().mean(),
        }
    metrics |= {
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


def loss_numbers(
    batch: TrainBatch, terms: LossTerms, logps: Tensor, entropy: Tensor, ratios: Tensor | None, args: GRPOConfig
) -> dict[str, Tensor]:
    """The numbers of a micro-batch that only some losses have: scalars on the device that add up over micro-batches.

    Args:
        logps, entropy: (B, C) float32, without gradient.
        ratios: what `sampler_ratios` returned.
    """
    mask, loss_type = batch.token_weights > 0, loss_type_of(args)
    numbers = {}
    if loss_type == "vespo":
        rows = mask.any(dim=1)
        numbers |= {"phi": (terms.phi[:, 0] * rows).sum(), "phi_rows": rows.sum()}
    elif loss_type == "cispo":
        numbers["cispo_clipped_weight"] = terms.clipped_weight
    elif loss_type != "sapo":
        numbers["high_clipped_weight"] = terms.high_clipped_weight
    if ratios is not None:
        own = logps if batch.old_per_token_logps is None else batch.old_per_token_logps
        difference = (own - batch.sampler_logps).abs() * batch.completion_mask
        numbers |= {"sampler_difference": difference.sum(), "sampler_ratio": (ratios * mask).sum()}
        numbers["ratio_tokens"] = mask.sum()
    if batch.entropy_weights is not None:
        kept = mask if batch.policy_mask is None else mask & batch.policy_mask
        numbers |= {"kept_entropy": (entropy * kept).sum(), "kept_tokens": kept.sum()}
    return numbers


def sum_up(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """The scalars of what `learn` returned, summed over micro-batches. The host waits for the device once."""
    names, sums = _sums(parts)
    return dict(zip(names, sums.tolist(), strict=True))


def look_at(parts: Sequence[dict[str, Tensor]]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """`sum_up(parts)`, and the numbers of each row by their names, (B,) float32 in main memory. The host waits once."""
    names, sums = _sums(parts)
    of_rows = [name for name in parts[0] if name.startswith("row_")]
    columns = torch.stack([torch.cat([part[name].float() for part in parts]) for name in of_rows])  # (names, B)
    numbers = torch.cat((sums, columns.flatten())).cpu()
    rows = numbers[len(sums) :].view(columns.shape)
    return dict(zip(names, numbers[: len(sums)].tolist(), strict=True)), dict(zip(of_rows, rows, strict=True))


def _sums(parts: Sequence[dict[str, Tensor]]) -> tuple[list[str], Tensor]:
    """The names of the scalars of what `learn` returned, and their sums over micro-batches."""
    names = [name for name in parts[0] if parts[0][name].ndim == 0]
    columns = torch.stack([torch.stack([part[name].float() for name in names]) for part in parts])  # (parts, names)
    return names, columns.sum(dim=0)


def add_up(numbers: Sequence[dict[str, float]]) -> dict[str, float]:
    """The sum of each number over the batches of an optimizer step."""
    return {name: sum(of_batch[name] for of_batch in numbers) for name in numbers[0]}


def learning_metrics(first: dict[str, float], last: dict[str, float], beta: float) -> dict[str, float]:
    """Return what is logged about the first and the last time that a batch was learned from.

    Args:
        first, last: the sums over micro-batches of what `learn_micro_batch` returned.
        beta: the weight of the KL penalty; 0: there is no reference.
    """
    weight, tokens = max(last["weight"], 1e-12), max(last["tokens"], 1.0)
    difference = first.get("sampler_difference", first["sampler_gap"]) / max(first["tokens"], 1.0)
    kl = {"kl": last["kl_loss"] / weight} if beta > 0 else {}
    if "teacher_kl" in last:
        kl["teacher_kl"] = last["teacher_kl"] / weight
    if "kept_entropy" in last and "teacher_kl" not in last:  # the loss without the entropy bonus
        kl["policy_loss"] = last["policy_loss"] + beta * last["kl_loss"]
    return kl | {
        "pg_loss": last["policy_loss"],
        **_ratio_metrics(last, weight),
        "entropy": last["entropy"] / tokens,
        "sampling/sampling_logp_difference/mean": difference,
    }


def _ratio_metrics(last: dict[str, float], weight: float) -> dict[str, float]:
    """What is logged about clipped and corrected ratios: shares of the weight of all tokens, and means."""
    metrics = {}
    if "high_clipped_weight" in last:
        low = last["clipped_weight"] - last["high_clipped_weight"]
        metrics["clip_ratio/region_mean"] = last["clipped_weight"] / weight
        metrics |= {"clip_ratio/low_mean": low / weight, "clip_ratio/high_mean": last["high_clipped_weight"] / weight}
    if "cispo_clipped_weight" in last:
        metrics["cispo_clip_ratio"] = last["cispo_clipped_weight"] / weight
    if "phi" in last:
        metrics["vespo/phi_seq_mean"] = last["phi"] / max(last["phi_rows"], 1.0)
    if "sampler_ratio" in last:
        metrics["sampling/importance_sampling_ratio/mean"] = last["sampler_ratio"] / max(last["ratio_tokens"], 1.0)
    return metrics
