"""On-policy distillation: how far the policy is from a teacher at every token that the policy has sampled.

The measure is the reverse KL, KL(policy || teacher) = sum over v of p(v) * (log p(v) - log q(v)), of the distributions
of the next token over the whole vocabulary (arXiv 2306.13649, the generalised Jensen-Shannon divergence with beta 1).
Both are softmax(logits / temperature) at the sampling temperature, which is that of every other log-probability here.
What was sampled counts as given, so no gradient flows through the choice of tokens.
"""

import torch
from torch import Tensor, nn

from ..model.forward import logits
from ..model.teacher import Teacher
from .logprobs import in_chunks, scores_of, token_logps, token_states
from .passes import Pass


def reverse_kl(logps: Tensor, teacher_logps: Tensor) -> Tensor:
    """KL(policy || teacher) of distributions: two tensors (..., V) of log-probabilities -> (...).

    The gradient with respect to the policy's logits is exact: where both are equal it is exactly 0. (The gradient of
    sum(p * log p) has a part that sums to 0 over the vocabulary but for rounding, and it is left out.)
    """
    return (logps.exp() * (logps - teacher_logps).detach()).sum(-1)


def token_scores(
    model: nn.Module, rows: Pass, temperature: float, teacher: Teacher | None, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `token_logps` returns and, where there is a teacher, the reverse KL from it at each token.

    The logits of both models are computed for a chunk of tokens at a time, and again in the backward pass.

    Returns:
        logps (B, C) float32 with gradient, entropy (B, C) float32 as there, and the KL (B, C) float32 in nats, with
        gradient, or None; all are 0 where masked.
    """
    if teacher is None:
        return *token_logps(model, rows, temperature, entropy_gradient), None
    with teacher.teaching():
        their_hidden, _ = token_states(teacher.model, rows)
    hidden, ids = token_states(model, rows)

    def score(hidden: Tensor, their_hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logps = torch.log_softmax(logits(model, hidden) / temperature, dim=-1)  # (rows, columns, V)
        with torch.no_grad():
            teacher_logps = torch.log_softmax(teacher.logits(their_hidden) / temperature, dim=-1)
        return *scores_of(logps, ids, entropy_gradient), reverse_kl(logps, teacher_logps)

    logps, entropy, kl = in_chunks(model, rows, score, (hidden, their_hidden, ids), num_heads=2)
    return logps, entropy if entropy_gradient else entropy.detach(), kl
