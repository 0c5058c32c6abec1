"""The reward for correctness: whether the text in the answer tags states the expected answer."""

from collections.abc import Sequence

from .answers import answers_match, extract_answer, score_against_answers
from .conversations import takes_conversations


@takes_conversations
def correctness_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """1.0 where the answer tags hold the expected answer, 0.0 where not, None where the expected answer is None.

    This is the outcome reward of GRPO on problems that can be checked (DeepSeek-R1, arXiv:2501.12948, section 2.2.2).
    `answers_match` says which answers are equal.

    A policy can add words: a word after the number counts as a unit, unless `rewards.units` lists it among those that
    change the number.

    Raises:
        ValueError: `answer` does not have one value for every completion.

    >>> completions = ["<answer>$72</answer>", "<answer>27</answer>", "It is 72.", "<answer>72</answer>"]
    >>> correctness_reward(["How much?"] * 4, completions, answer=["72", "72", "72", None])
    [1.0, 0.0, 0.0, None]
    """
    return score_against_answers(completions, answer, _score)


def _score(completion: str, expected: str) -> float:
    given = extract_answer(completion)
    return float(given is not None and answers_match(given, expected))
