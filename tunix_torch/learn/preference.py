"""The mathematics of learning from preferences: DPO, IPO, SimPO and ORPO. All are pure functions on tensors.

A pair is two completions of one prompt, of which the chosen one is preferred to the rejected one. N is the number of
pairs. Every loss is (N,) float32, one number for each pair, and what it learns from is the log-probabilities of whole
completions: their sum over tokens, or their mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..config.checks import WITH_REFERENCE


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation: -log sigmoid(beta * (chosen - rejected)) (arXiv 2305.18290, equation 7).

    Args:
        chosen, rejected: (N,) the sums of log-probabilities by the policy minus those by the reference policy.
        label_smoothing: the probability, below 0.5, that a pair is labelled the wrong way round. The loss is the
            expectation over both ways, as in google-tunix (`sft/dpo/dpo_trainer.py`).
    """
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation: (chosen - rejected - 1 / (2 beta))^2 (arXiv 2310.12036, equation 17).

    Args:
        chosen, rejected: (N,) the means over tokens of the log-probabilities by the policy minus those by the reference
            policy. The paper writes sums; TRL takes means, after asking its authors, and so does this function.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, gamma: float, label_smoothing: float = 0.0) -> Tensor:
    """Simple preference optimisation: -log sigmoid(beta * (chosen - rejected) - gamma) (arXiv 2405.14734, equation 6).

    Args:
        chosen, rejected: (N,) the means over tokens of the policy's log-probabilities. There is no reference policy.
        gamma: the margin that the difference of rewards, beta * (chosen - rejected), should reach.
        label_smoothing: see `dpo_loss`.
    """
    return _smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Odds ratio preference optimisation: -chosen + beta * -log sigmoid(log odds ratio) (arXiv 2403.07691, equation 6).

    The first term is the loss of supervised fine-tuning on the chosen completion. The odds of a completion are
    p / (1 - p), where log p is the mean of its log-probabilities.

    Args:
        chosen, rejected: (N,) the means over tokens of the policy's log-probabilities. There is no reference policy.
        beta: the paper's lambda.
        label_smoothing: see `dpo_loss`; it acts on the second term.
    """
    return -chosen + beta * _smoothed(log_odds(chosen) - log_odds(rejected), label_smoothing)


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of probabilities that are given as their logarithms, which are at most 0.

    A probability of almost 1 counts as 1 - 1e-6, since the odds of 1 are infinite.
    """
    logps = logps.clamp(max=-1e-6)
    return logps - torch.log(-torch.expm1(logps))


def _smoothed(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid(margin), and with `label_smoothing` also that of a pair labelled the wrong way round."""
    loss = -logsigmoid(margin)
    return loss if label_smoothing == 0 else loss * (1 - label_smoothing) - logsigmoid(-margin) * label_smoothing


@dataclass
class PairTerms:
    """What a batch of pairs gives, each (N,) float32. Only `loss` has a gradient."""

    loss: Tensor
    chosen_logps: Tensor  # the log-probabilities that the loss learns from: sums with dpo and ipo, means otherwise
    rejected_logps: Tensor
    chosen_rewards: Tensor  # beta times these; with dpo and ipo times their differences from the reference policy's
    rejected_rewards: Tensor


def preference_terms(
    kind: str,
    logps: Tensor,
    ref_logps: Tensor | None,
    mask: Tensor,
    *,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> PairTerms:
    """The loss of each pair, and what is logged about it. The rewards are those that TRL logs.

    Args:
        kind: dpo, ipo, simpo or orpo.
        logps, ref_logps: (2N, C) float32, 0 where masked. Rows 2i and 2i + 1 are the chosen and the rejected completion
            of pair i. `ref_logps` is given with dpo and ipo.
        mask: (2N, C) bool.
        beta, gamma, label_smoothing: see the functions of the losses.
    """
    lengths = mask.sum(dim=1).clamp(min=1)  # (2N,)
    ratios = (logps if ref_logps is None else logps - ref_logps).sum(dim=1)  # (2N,)
    chosen, rejected = (ratios if kind == "dpo" else ratios / lengths).view(-1, 2).unbind(1)  # (N,) each
    if kind == "dpo":
        loss = dpo_loss(chosen, rejected, beta, label_smoothing)
    elif kind == "ipo":
        loss = ipo_loss(chosen, rejected, beta)
    elif kind == "simpo":
        loss = simpo_loss(chosen, rejected, beta, gamma, label_smoothing)
    else:
        loss = orpo_loss(chosen, rejected, beta, label_smoothing)
    sums = logps.detach().sum(dim=1)
    ratios = ratios.detach()
    if kind not in WITH_REFERENCE:
        sums, ratios = sums / lengths, ratios / lengths
    return PairTerms(loss, *sums.view(-1, 2).unbind(1), *(beta * ratios).view(-1, 2).unbind(1))
