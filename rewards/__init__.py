"""Reward functions: pure, standard library only, `(prompts, completions, **columns) -> list[float | None]`.

`REWARDS` names those that need nothing but a completion (and, for correctness, the `answer` column).
"""

import difflib

from rewards.answers import answers_match, extract_answer, extract_reasoning, parse_number
from rewards.composite_reward import (
    RewardBreakdown,
    RewardComponent,
    RewardFn,
    composite_reward,
    score_with_breakdown,
)
from rewards.correctness_reward import correctness_reward
from rewards.explanation_quality_reward import explanation_quality_reward
from rewards.format_reward import format_reward
from rewards.reasoning_coherence_reward import reasoning_coherence_reward

__all__ = [
    "REWARDS",
    "RewardBreakdown",
    "RewardComponent",
    "RewardFn",
    "answers_match",
    "composite_reward",
    "correctness_reward",
    "explanation_quality_reward",
    "extract_answer",
    "extract_reasoning",
    "format_reward",
    "get_reward",
    "parse_number",
    "reasoning_coherence_reward",
    "score_with_breakdown",
]

REWARDS: dict[str, RewardFn] = {
    "correctness": correctness_reward,
    "format": format_reward,
    "reasoning_coherence": reasoning_coherence_reward,
    "explanation_quality": explanation_quality_reward,
}


def get_reward(name: str) -> RewardFn:
    """The reward function of that name in `REWARDS`.

    Raises:
        ValueError: there is none of that name.

    >>> get_reward("format") is format_reward
    True
    >>> get_reward("corectness")
    Traceback (most recent call last):
    ValueError: reward 'corectness' is unknown; the names are correctness, format, reasoning_coherence, \
explanation_quality; did you mean 'correctness'?
    """
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"reward {name!r} is unknown; the names are {', '.join(REWARDS)}{hint}")
    return REWARDS[name]
