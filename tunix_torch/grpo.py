"""The loss of GRPO and its variants: KL, ratios, clips, loss types. All are pure functions.

The numerics follow google-tunix 0.1.7 (`rl/algo_core.py`, `rl/common.py`), and where Tunix has no such loss TRL 1.16
(`trainer/grpo_trainer.py`), unless a docstring says otherwise.
Advantages are in `rewarding/advantages.py`, the weights of tokens in `learn/weights.py`.
The letters of the shapes: N groups, G rows in a group, B = N * G rows (completions), C completion tokens.
"""

import math
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
LOSS_TYPES = {  # TRL's names, each with the aggregation that it has there
    "grpo": "sequence-mean-token-mean",
    "bnpo": "token-mean",
    "dr_grpo": "sequence-mean-token-scale",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "sapo": "sequence-mean-token-mean",
    "luspo": "seq-mean-token-sum",
    "vespo": "token-mean",
}
LARGEST_EXPONENT = 80.0  # its exp, about 1e35, is finite in float32 and above any sensible `kl_clamp`


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


@dataclass
class LossTerms:
    """The terms of a micro-batch's loss, float32. Scalars are weighted already, so those of micro-batches add up."""

    loss: Tensor  # policy_loss + beta * kl_loss - the entropy bonus, with gradient
    policy_loss: Tensor
    kl_loss: Tensor  # 0 without a reference
    clipped_weight: Tensor  # the weight of the tokens whose ratio is clipped, in the direction that the advantage wants
    high_clipped_weight: Tensor  # that of those among them whose ratio is too high
    phi: Tensor  # (B, 1) the weight that VESPO gives each row; 1 in other losses
    ratio_gap: Tensor  # (B,) the largest |ratio - 1| of each row
    largest_kl: Tensor  # (B,) the largest |KL estimate| of each row


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    policy_weights: Tensor | None = None,
    sampler_ratios: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_weights: Tensor | None = None,
    loss_type: str = "grpo",
    epsilon: float = 0.2,
    epsilon_high: float = 0.2,
    epsilon_c: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_clamp: float | None = None,
    use_bias_correction_kl: bool = False,
    sequence_level: bool = False,
    sapo_temperatures: tuple[float, float] = (1.05, 1.0),
    vespo_pos: tuple[float, float] = (2.0, 3.0),
    vespo_neg: tuple[float, float] = (3.0, 2.0),
) -> LossTerms:
    """The policy loss, which `loss_type` names, plus the KL penalty (arXiv 2402.03300, equation 3).

    Args:
        logps, old_logps, ref_logps: (B, C) float32. Without `old_logps` they are `logps` without a gradient.
        advantages: (B,) float32.
        token_weights: (B, C) float32 from `aggregation_weights`, 0 where masked.
        policy_weights: (B, C) float32: those of the policy loss, where they differ; the KL penalty keeps the others.
        sampler_ratios: (B, C) float32: VESPO multiplies a row's ratio by these, since it is one of whole sequences.
        entropy, entropy_weights: (B, C) float32: sum(entropy * entropy_weights) is the bonus; none without weights.
        loss_type: of `LOSS_TYPES`. grpo, bnpo, dr_grpo, dapo and luspo clip the ratio; they differ in `token_weights`.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high]; cispo caps it at epsilon_high.
        epsilon_c: the dual clip: with a negative advantage the loss is at most -epsilon_c * advantage.
        delta: the ratio beside the clipped one is at most this (arXiv 2505.07291).
        use_bias_correction_kl: the KL estimate is multiplied by the ratio: its gradient is unbiased (arXiv 2512.02556).
        sequence_level: GSPO (arXiv 2507.18071): all tokens of a row share one ratio, exp(mean of their log-ratios), and
            each has its own gradient. (TRL gives each the row's mean, which is the same where a row's weights are.)
        sapo_temperatures: for advantages that are not positive, and for those that are.
        vespo_pos, vespo_neg: k and lambda of `vespo_phi` for advantages of at least 0, and for negative ones.
    """
    mask = token_weights > 0
    old_logps = logps.detach() if old_logps is None else old_logps
    log_ratio = token_log_ratio = (logps - old_logps).clamp(-20.0, 20.0)  # as in google-tunix, like the clamp below
    if sequence_level:
        row_mean = (log_ratio * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = (logps - logps.detach() + row_mean.detach()).clamp(max=10.0)
    ratio = log_ratio.exp()
    advantages = advantages[:, None]
    phi = torch.ones_like(advantages)
    clipped = torch.zeros_like(mask)
    if loss_type == "cispo":  # arXiv 2506.13585
        clipped = (ratio > epsilon_high) & (advantages > 0)
        per_token_loss = -ratio.clamp(max=epsilon_high).detach() * advantages * logps
    elif loss_type == "sapo":  # arXiv 2511.20347
        temperatures = torch.where(advantages > 0, sapo_temperatures[1], sapo_temperatures[0])  # (B, 1)
        per_token_loss = -advantages * torch.sigmoid(temperatures * (ratio - 1)) * 4 / temperatures
    elif loss_type == "vespo":
        phi = vespo_phi(token_log_ratio.detach() * mask, sampler_ratios, advantages, vespo_pos, vespo_neg)
        per_token_loss = -phi * advantages * logps
    else:
        plain_loss = -advantages * (ratio if delta is None else ratio.clamp(max=delta))
        clipped_loss = -advantages * ratio.clamp(1 - epsilon, 1 + epsilon_high)
        per_token_loss = torch.maximum(plain_loss, clipped_loss)
        clipped = clipped_loss > plain_loss
        if epsilon_c is not None:
            capped_loss = torch.minimum(per_token_loss, -advantages * epsilon_c)
            per_token_loss = torch.where(advantages < 0, capped_loss, per_token_loss)
    policy_loss = (per_token_loss * (token_weights if policy_weights is None else policy_weights)).sum()
    kl = torch.zeros_like(logps)  # (B, C)
    if ref_logps is not None:
        kl = per_token_kl(logps, ref_logps, kl_estimator, kl_clamp)
        kl = kl * ratio if use_bias_correction_kl else kl
    kl_loss = (kl * token_weights).sum()
    loss = policy_loss + beta * kl_loss
    return LossTerms(
        loss=loss if entropy_weights is None else loss - (entropy * entropy_weights).sum(),
        policy_loss=policy_loss.detach(),
        kl_loss=kl_loss.detach(),
        clipped_weight=(clipped * token_weights).sum(),
        high_clipped_weight=((clipped & (advantages > 0)) * token_weights).sum(),
        phi=phi,
        ratio_gap=((ratio - 1).abs() * mask).amax(dim=1).detach(),
        largest_kl=(kl.abs() * mask).amax(dim=1).detach(),
    )


def vespo_phi(
    log_ratio: Tensor,
    sampler_ratios: Tensor | None,
    advantages: Tensor,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Tensor:
    """VESPO's weight of each row, e^lambda * w^k * e^(-lambda * w) with the ratio w of a sequence (arXiv 2602.10693).

    Args:
        log_ratio: (B, C) float32 log-ratios of the tokens, 0 where masked.
        sampler_ratios: (B, C) float32, 1 where masked: w is multiplied by these.
        advantages: (B, 1) float32.
        positive, negative: k and lambda for advantages of at least 0, and for negative ones.

    Returns:
        (B, 1) float32, 1 where w is 1.
    """
    smallest = math.log(1e-8)
    log_w = log_ratio.sum(-1, keepdim=True)
    if sampler_ratios is not None:
        log_w = log_w + sampler_ratios.log().clamp(smallest, 20.0).sum(-1, keepdim=True)
    log_w = log_w.clamp(smallest, 20.0)
    k, decay = (torch.where(advantages >= 0, p, n) for p, n in zip(positive, negative, strict=True))
    decay = decay.clamp(min=1e-4)
    phi = (decay + k * log_w - decay * log_w.exp()).exp()
    return torch.where(phi.isinf(), 0.0, phi)
