"""The three rewards of a notebook on reasoning with Tunix: format, correctness and the quality of the reasoning.

They come from aabhimittal/Training-Reasoning-Models-with-Tunix-GRPO, whose README gives them the weights 0.3, 0.5 and
0.2. Two things differ: here words are whole words ("also" has no "so", "address" no "add"), and "0.15" does not end a
sentence.

A policy can exploit that the tags, and the words that the quality counts, earn 0.3 + 0.2 without the right answer.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from .answers import (
    OPERATION,
    answers_match,
    extract_answer,
    extract_reasoning,
    extract_steps,
    final_answer,
    parse_number,
    score_against_answers,
    stated_number,
)
from .conversations import takes_conversations

TOLERANCE = Fraction(1, 100)  # numbers that differ by less are equal
MAX_ANSWER_WORDS = 20  # a longer answer earns nothing for containing the expected one
STEP_WORDS = frozenset("first then next finally step therefore so because".split())
_WORD = re.compile(r"-?[0-9]+(?:[.,][0-9]+)*|[^\W0-9]+")
# Each pattern is one mark of mathematics.
_MATHEMATICS = [
    OPERATION,
    re.compile("="),
    re.compile(r"\bmultipl(?:y|ie[sd]|ying)\b"),
    re.compile(r"\bdivid(?:e|es|ed|ing)\b"),
    re.compile(r"\badd(?:s|ed|ing)?\b"),
    re.compile(r"\bsubtract(?:s|ed|ing)?\b"),
]


@takes_conversations
def notebook_format_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: 0.5 for a reasoning part and 0.5 for an answer part, wherever they stand.

    >>> notebook_format_reward(["?"] * 2, ["<reasoning>6 * 12</reasoning> <answer>72</answer>", "<answer>72</answer>"])
    [1.0, 0.5]
    """
    return [
        0.5 * sum(part is not None for part in (extract_reasoning(completion), extract_answer(completion)))
        for completion in completions
    ]


@takes_conversations
def notebook_correctness_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """In [0, 1]: 1.0 for the expected answer, 0.7 for an answer that contains it, else 0.0; None where that is None.

    An answer is the expected one if it is equal by `answers_match`, or is a number less than TOLERANCE away, whatever
    its unit. It contains the expected one if it has its words as whole words, and at most MAX_ANSWER_WORDS words in
    all. An expected number has to be the only number that the answer states (`stated_number`). The notebook itself pays
    0.7 wherever the expected text occurs, so that "0 1 2 3" earns it for many numbers.

    A policy can still earn 0.7 by putting several words into one answer, as in "yes or no".

    Raises:
        ValueError: `answer` does not have one value for every completion.

    >>> texts = ["36", "36.001", "The total is 36 dollars.", "36 or 37", "136", ""]
    >>> notebook_correctness_reward(["?"] * 6, [f"<answer>{text}</answer>" for text in texts], answer=["36"] * 6)
    [1.0, 1.0, 0.7, 0.0, 0.0, 0.0]
    """
    return score_against_answers(completions, answer, _score_correctness)


@takes_conversations
def notebook_reasoning_quality_reward(
    prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[float]:
    """In [0, 1]: the sum of four parts about the text in the reasoning tags; 0.0 without such text.

    - length: 0.3 for 10 to 200 words, 0.1 for 6 to 9 words and for more than 200;
    - steps: 0.1 for each different word of STEP_WORDS, at most 0.3;
    - mathematics: 0.1 for each of these that occurs, at most 0.2: a calculation, "=", multiply, divide, add, subtract;
    - sentences: 0.2 for two or more sentences or lines.

    >>> good = "First, convert 15% to 0.15. Then multiply: 0.15 x 240 = 36. So the answer is 36."
    >>> completions = [f"<reasoning>{text}</reasoning>" for text in (good, "0.15 * 240 = 36", "")]
    >>> notebook_reasoning_quality_reward(["?"] * 3, completions)
    [1.0, 0.2, 0.0]
    """
    return [_score_quality(completion) for completion in completions]


def _score_correctness(completion: str, expected: str) -> float:
    given = extract_answer(completion)
    if not given:
        return 0.0
    given_number, expected_number = parse_number(given), parse_number(expected)
    if given_number is not None and expected_number is not None and abs(given_number - expected_number) < TOLERANCE:
        return 1.0
    if answers_match(given, expected):
        return 1.0
    if expected_number is not None:
        return 0.7 if stated_number(given) == expected_number else 0.0
    words, given_words = _as_words(final_answer(expected)), _as_words(given)
    contains = words.strip() and words in given_words and len(given_words.split()) <= MAX_ANSWER_WORDS
    return 0.7 if contains else 0.0


def _as_words(text: str) -> str:
    """The words of a text with one space before and after each. A number with its sign and decimals is one word.

    >>> _as_words("It's -0.5,  not $5.")
    ' it s -0.5 not 5 '
    """
    return f" {' '.join(_WORD.findall(text.casefold()))} "


def _score_quality(completion: str) -> float:
    reasoning = (extract_reasoning(completion) or "").casefold()
    num_words = len(reasoning.split())
    # All parts are in tenths, so that their sum is exact.
    length = 3 if 10 <= num_words <= 200 else int(num_words > 5)
    steps = min(len(STEP_WORDS.intersection(re.findall(r"\w+", reasoning))), 3)
    mathematics = min(sum(mark.search(reasoning) is not None for mark in _MATHEMATICS), 2)
    sentences = 2 if len(extract_steps(completion)) >= 2 else 0
    return (length + steps + mathematics + sentences) / 10
