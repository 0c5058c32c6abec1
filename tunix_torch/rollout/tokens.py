"""How a token is chosen: temperature, the top-k / top-p candidates, and one random number for each row and token.

Randomness belongs to the row: one uniform number is drawn per row and token, and a token is found by inverting the
cumulative distribution of the candidates. So a rollout is the same on every device, but where two numbers differ by
rounding only. It does not depend on how rows are batched, and a resumed run draws as if never interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The order is that of Transformers: temperature, then top-k, then top-p."""

    max_new_tokens: int  # C
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    truncated_logps: bool = False  # log-probabilities among the candidates, not in the whole vocabulary


def draw_uniforms(seed: Sequence[int], rows: Sequence[int], num_tokens: int) -> Tensor:
    """One number in [0, 1) per row and token, (len(rows), num_tokens) float32, a function of (seed, row) only."""
    draws = [np.random.Generator(np.random.Philox([*seed, row])).random(num_tokens, np.float32) for row in rows]
    return torch.from_numpy(np.stack(draws))


def choose_tokens(scores: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Turn one uniform number a row into one token a row by inverse CDF within the top-k / top-p candidates.

    Args:
        scores: (B, V) float32 logits.
        uniforms: (B,) float32 in [0, 1).

    Returns:
        tokens (B,) int64, and their log-probabilities (B,) float32 under softmax(scores / temperature) over the whole
        vocabulary, as `learn/logprobs.py` computes them too, or with `truncated_logps` among the candidates. With
        temperature 0: argmax, scored at temperature 1.
    """
    logps = torch.log_softmax(scores / (params.temperature or 1.0), dim=-1)
    if params.temperature == 0:
        tokens = logps.argmax(dim=-1)
        return tokens, logps.gather(-1, tokens[:, None])[:, 0]
    top_k = min(params.top_k, scores.shape[-1])
    if top_k > 0:
        candidates, ids = logps.topk(top_k, dim=-1)  # (B, K), best first
    elif params.top_p < 1:
        candidates, ids = logps.sort(dim=-1, descending=True)
    else:
        candidates, ids = logps, None
    probs = candidates.exp()
    if params.top_p < 1:
        share = probs / probs.sum(-1, keepdim=True)
        probs = probs * (share.cumsum(-1) - share < params.top_p)  # keeps the first one that reaches top_p
    if ids is not None:  # walk candidates in vocabulary order: near-ties in rank then can't change the token
        ids, order = ids.sort(dim=-1)
        probs = probs.gather(-1, order)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, total * (1 - 2**-22))  # by 4 units of rounding below the total
    reached = (cdf > target) & (probs > 0)  # a cumsum in parallel may not be quite monotone
    chosen = reached.int().argmax(dim=-1, keepdim=True)  # the first one that is reached
    tokens = chosen if ids is None else ids.gather(-1, chosen)
    token_logps = logps.gather(-1, tokens)[:, 0]
    return tokens[:, 0], token_logps - total[:, 0].log() if params.truncated_logps else token_logps
