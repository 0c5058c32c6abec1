"""How a token is chosen: penalty, temperature, the candidates, and one random number for each row and token.

Randomness belongs to the row: one uniform number is drawn per row and token, and a token is found by inverting the
cumulative distribution of the candidates. So a rollout is the same on every device, but where two numbers differ by
rounding only. It does not depend on how rows are batched, and a resumed run draws as if never interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config.grpo import GRPOConfig
from ..runtime import together


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The order is that of Transformers: penalty, temperature, top-k, top-p, min-p."""

    max_new_tokens: int  # C
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # the least probability of a candidate, relative to that of the likeliest token; 0: off
    repetition_penalty: float = 1.0  # above 1, tokens that stand in the prompt or completion become less likely; 1: off
    truncated_logps: bool = False  # log-probabilities among the candidates, not in the whole vocabulary

    @classmethod
    def of_rollouts(cls, args: GRPOConfig) -> "SamplingParams":
        """How the completions are sampled that a run learns from."""
        return cls(
            args.generation_max_length,
            args.generation_temperature,
            args.generation_top_k,
            args.generation_top_p,
            args.min_p or 0.0,
            args.repetition_penalty,
            args.corrects_sampler,
        )

    @property
    def needs_seen_tokens(self) -> bool:
        """Whether the choice depends on which tokens a row has already."""
        return self.repetition_penalty != 1.0


class RowNumbers:
    """Counts the rows that are sampled in a step, over all processes: their random numbers depend on these numbers."""

    def __init__(self) -> None:
        self.step, self.drawn = -1, 0  # the step that rows were drawn in last, and how many it has drawn

    def take(self, step: int, num_rows: int, rows_at_once: int) -> list[int]:
        """The numbers of the next `num_rows` rows of this process, in batches of `rows_at_once` rows a process."""
        if step != self.step:
            self.step, self.drawn = step, 0
        numbers: list[int] = []
        while len(numbers) < num_rows:
            count = min(rows_at_once, num_rows - len(numbers))
            first, total = together.own_share(count)
            numbers += range(self.drawn + first, self.drawn + first + count)
            self.drawn += total
        return numbers


def draw_uniforms(seed: Sequence[int], rows: Sequence[int], num_tokens: int) -> Tensor:
    """One number in [0, 1) per row and token, (len(rows), num_tokens) float32, a function of (seed, row) only."""
    draws = [np.random.Generator(np.random.Philox([*seed, row])).random(num_tokens, np.float32) for row in rows]
    return torch.from_numpy(np.stack(draws))


def tokens_in_prompts(prompt_ids: Tensor, prompt_mask: Tensor, num_completions: int, num_tokens: int) -> Tensor:
    """Which tokens each row's prompt has: left-padded (N, P) int64 and bool -> (N * num_completions, V) bool.

    Args:
        num_tokens: V.
    """
    ids = torch.where(prompt_mask, prompt_ids, prompt_ids[:, -1:])  # the last column is never padding
    seen = torch.zeros(len(ids), num_tokens, dtype=torch.bool, device=ids.device).scatter(1, ids, True)
    return seen.repeat_interleave(num_completions, dim=0)


def penalize_repetition(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive logits of seen tokens by the penalty and multiply their negative ones by it.

    This is the penalty of CTRL (arXiv 1909.05858, section 4.1) in the form that Transformers gives it. Padding does not
    count as seen, so a row is not changed by the other rows of its batch.

    Args:
        scores: (B, V) float32.
        seen: (B, V) bool.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def choose_tokens(
    scores: Tensor, uniforms: Tensor, params: SamplingParams, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Turn one uniform number a row into one token a row by inverse CDF within the candidates.

    Args:
        scores: (B, V) float32 logits.
        uniforms: (B,) float32 in [0, 1).
        seen: (B, V) bool, the tokens that a row has already. It is needed where there is a repetition penalty.

    Returns:
        tokens (B,) int64, and their log-probabilities (B,) float32 under softmax(scores / temperature) over the whole
        vocabulary, as `learn/logprobs.py` computes them too: neither the penalty nor the choice of candidates changes
        them. With `truncated_logps` they are those of the choice: after the penalty, among the candidates. With
        temperature 0: argmax, scored at temperature 1.
    """
    temperature = params.temperature or 1.0
    logps = weighed = torch.log_softmax(scores / temperature, dim=-1)
    if params.needs_seen_tokens:
        assert seen is not None, "a repetition penalty needs the tokens that were seen"
        weighed = torch.log_softmax(penalize_repetition(scores, seen, params.repetition_penalty) / temperature, dim=-1)
    if params.temperature == 0:
        tokens = weighed.argmax(dim=-1)
        return tokens, logps.gather(-1, tokens[:, None])[:, 0]
    top_k = min(params.top_k, scores.shape[-1])
    if top_k > 0:
        candidates, ids = weighed.topk(top_k, dim=-1)  # (B, K), best first
    elif params.top_p < 1:
        candidates, ids = weighed.sort(dim=-1, descending=True)
    else:
        candidates, ids = weighed, None
    probs = candidates.exp()
    if params.top_p < 1:
        share = probs / probs.sum(-1, keepdim=True)
        probs = probs * (share.cumsum(-1) - share < params.top_p)  # keeps the first one that reaches top_p
    if params.min_p > 0:
        probs = probs * (probs >= params.min_p * probs.amax(dim=-1, keepdim=True))
    if ids is not None:  # walk candidates in vocabulary order: near-ties in rank then can't change the token
        ids, order = ids.sort(dim=-1)
        probs = probs.gather(-1, order)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, total * (1 - 2**-22))  # by 4 units of rounding below the total
    reached = (cdf > target) & (probs > 0)  # a cumsum in parallel may not be quite monotone
    chosen = reached.int().argmax(dim=-1, keepdim=True)  # the first one that is reached
    tokens = chosen if ids is None else ids.gather(-1, chosen)
    if params.truncated_logps:
        return tokens[:, 0], weighed.gather(-1, tokens)[:, 0] - total[:, 0].log()
    return tokens[:, 0], logps.gather(-1, tokens)[:, 0]
