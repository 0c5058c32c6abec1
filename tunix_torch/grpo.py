"""The mathematics of GRPO and its variants: advantages, KL, ratios, aggregation, loss. All are pure functions.

The numerics follow google-tunix 0.1.7 (`rl/algo_core.py`, `rl/common.py`) unless a docstring says otherwise.
The letters of the shapes: N groups, G rows in a group, B = N * G rows (completions), C completion tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ALGORITHMS = ("grpo", "gspo", "dr_grpo", "dapo", "rloo")
KL_ESTIMATORS = ("k1", "k2", "k3")
LOSS_AGGREGATIONS = (
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-scale",
    "seq-mean-token-sum",
    "sequence-mean-token-sum-norm",
)
LARGEST_EXPONENT = 80.0  # its exp, about 1e35, is finite in float32 and above any sensible `kl_clamp`
ROUNDING = 8 * 2.0**-52  # rewards that differ by less, relative to the largest, count as equal: it is float64 rounding


def compute_group_advantages(
    rewards: Tensor, group_size: int, algorithm: str = "grpo", normalize: bool = True, epsilon: float = 1e-8
) -> Tensor:
    """How much better each completion is than the mean of its group.

    grpo, gspo, dapo: (r - mean) / (std + epsilon), std with ddof = 1 (DeepSeekMath, arXiv 2402.03300, section 4.1.2);
    without `normalize`, and for dr_grpo (arXiv 2503.20783): r - mean; rloo (arXiv 2402.14740): r - mean of the others.

    Args:
        rewards: (B,), rows of a group side by side.
        group_size: G, at least 2.

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
        centred = centred / (centred.std(dim=1, keepdim=True) + epsilon)
    spread = grouped.amax(dim=1, keepdim=True) - grouped.amin(dim=1, keepdim=True)
    # else a residue of rounding, divided by itself, would count in full
    equal = spread <= ROUNDING * grouped.abs().amax(dim=1, keepdim=True)
    return torch.where(equal, 0.0, centred).flatten().float()


def per_token_kl(logps: Tensor, ref_logps: Tensor, estimator: str, clamp: float | None = None) -> Tensor:
    """KL(policy || reference) estimated at each token, (B, C); see http://joschu.net/blog/kl-approx.html.

    With the log-ratio, logps - ref_logps: k1 is the log-ratio; k2 is half its square; k3 is exp(-log-ratio) - 1 +
    log-ratio, which is never negative. google-tunix calls them "kl", "mse_kl" and "low_var_kl". `clamp` limits the
    absolute value of the estimate; where it does, the gradient is 0.
    """
    difference = ref_logps - logps
    if clamp is not None:  # exp of a larger difference overflows, and the gradient would be 0 * inf
        difference = difference.clamp(max=LARGEST_EXPONENT)
    if estimator == "k1":
        kl = -difference
    elif estimator == "k2":
        kl = 0.5 * difference.square()
    elif estimator == "k3":
        kl = torch.expm1(difference) - difference
    else:
        raise ValueError(f"kl_estimator={estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}")
    return kl if clamp is None else kl.clamp(-clamp, clamp)


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


@dataclass
class LossTerms:
    """The terms of a micro-batch's loss, float32. Scalars are weighted already, so those of micro-batches add up."""

    loss: Tensor  # policy_loss + beta * kl_loss, with gradient
    policy_loss: Tensor
    kl_loss: Tensor  # 0 without a reference
    clipped_weight: Tensor  # the weight of the tokens whose loss is that of the clipped ratio
    ratio_gap: Tensor  # (B,) the largest |ratio - 1| of each row
    largest_kl: Tensor  # (B,) the largest |KL estimate| of each row


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    epsilon_c: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = None,
    sequence_level: bool = False,
) -> LossTerms:
    """The clipped policy loss plus the KL penalty (arXiv 2402.03300, equation 3).

    Args:
        logps, old_logps, ref_logps: (B, C) float32. Without `old_logps` they are `logps` without a gradient.
        advantages: (B,) float32.
        token_weights: (B, C) float32 from `aggregation_weights`, 0 where masked.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high].
        epsilon_c: the dual clip: with a negative advantage the loss is at most -epsilon_c * advantage.
        sequence_level: GSPO (arXiv 2507.18071): all tokens of a row share one ratio, exp(mean of their log-ratios), and
            each has its own gradient.
    """
    mask = token_weights > 0
    old_logps = logps.detach() if old_logps is None else old_logps
    log_ratio = (logps - old_logps).clamp(-20.0, 20.0)  # as in google-tunix, like the clamp below
    if sequence_level:
        row_mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = (logps - logps.detach() + row_mean.detach()).clamp(max=10.0)
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    plain_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1 - epsilon, 1 + epsilon_high)
    per_token_loss = torch.maximum(plain_loss, clipped_loss)
    if epsilon_c is not None:
        capped_loss = torch.minimum(per_token_loss, -advantages * epsilon_c)
        per_token_loss = torch.where(advantages < 0, capped_loss, per_token_loss)
    policy_loss = (per_token_loss * token_weights).sum()
    kl = torch.zeros_like(logps)  # (B, C)
    if ref_logps is not None:
        kl = per_token_kl(logps, ref_logps, kl_estimator, kl_clamp)
    kl_loss = (kl * token_weights).sum()
    return LossTerms(
        loss=policy_loss + beta * kl_loss,
        policy_loss=policy_loss.detach(),
        kl_loss=kl_loss.detach(),
        clipped_weight=((clipped_loss > plain_loss) * token_weights).sum(),
        ratio_gap=((ratio - 1).abs() * mask).amax(dim=1).detach(),
        largest_kl=(kl.abs() * mask).amax(dim=1).detach(),
    )
