"""The reward for conciseness: whether the reasoning is neither too short nor too long, and does not repeat itself."""

from collections.abc import Sequence

from .answers import extract_reasoning
from .conversations import takes_conversations

MIN_WORDS = 20  # the length factor is 1 from this number of words ...
MAX_WORDS = 150  # ... to this one
ZERO_WORDS = 300  # and it is 0 from this number on


@takes_conversations
def explanation_quality_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: a length factor times the share of distinct word trigrams, both of the text in the reasoning tags.

    The length factor is 1 from MIN_WORDS to MAX_WORDS words and falls linearly to 0 at no words and at ZERO_WORDS. The
    share of distinct trigrams is the distinct-n of Li et al. 2016 (arXiv:1510.03055) with n = 3; it is 1 for
    fewer than three words. Without a reasoning text the reward is 0.0.

    >>> texts = [" ".join(map(str, range(n))) for n in (10, 50, 225, 300)] + ["so it is " * 20]
    >>> rewards = explanation_quality_reward(["?"] * 5, [f"<reasoning>{text}</reasoning>" for text in texts])
    >>> [round(reward, 2) for reward in rewards]
    [0.5, 1.0, 0.5, 0.0, 0.05]
    """
    return [_score(extract_reasoning(completion) or "") for completion in completions]


def _score(reasoning: str) -> float:
    words = reasoning.casefold().split()
    return _length_factor(len(words)) * _distinct_share(list(zip(words, words[1:], words[2:], strict=False)))


def _length_factor(num_words: int) -> float:
    rising = num_words / MIN_WORDS
    falling = (ZERO_WORDS - num_words) / (ZERO_WORDS - MAX_WORDS)
    return max(0.0, min(rising, falling, 1.0))


def _distinct_share(trigrams: list[tuple[str, str, str]]) -> float:
    return len(set(trigrams)) / len(trigrams) if trigrams else 1.0
