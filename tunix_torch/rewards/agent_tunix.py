"""The four rewards of agent-tunix: for the exact format, the approximate format, the answer, and the number in it.

They come from agent-tunix's README (kzhou003/agent-tunix), which follows the Tunix GRPO demo. One thing differs: here
numbers are parsed by `rewards.answers`, so that "-5" is -5 and "1,234" is 1234.

A policy can exploit that 5.0 of the 9.5 points are for the tags, whatever they enclose. With a wrong number in the
answer it earns 4.0 in all, with words or a date 4.5, within 20% of the right number 5.25, and within 10% 5.5. An answer
of several numbers of which the first is right ("600, 5 or 7") earns 6.0.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

from .answers import (
    ANSWER_TAGS,
    REASONING_TAGS,
    extract_verbatim_answer,
    final_answer,
    find_numbers,
    parse_number,
    score_against_answers,
)
from .conversations import takes_conversations
from .units import changes_value

TAGS = REASONING_TAGS + ANSWER_TAGS

# The first number of a text, with the words around it.
_FIRST_NUMBER = re.compile(r"[^0-9]*[0-9]+(?:[.,][0-9]+)*[^0-9,;.!?\n]*")


@takes_conversations
def match_format_exactly(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """3.0 for a reasoning part and then an answer part, neither of them empty, else 0.0.

    Each tag has to occur once. Before the first and after the last tag there may be white space only; between the two
    parts there may be any text.

    >>> match_format_exactly(["?"] * 2, ["<reasoning>6 * 12</reasoning> so <answer>72</answer>", "<answer>72</answer>"])
    [3.0, 0.0]
    """
    return [3.0 if _has_exact_format(completion.strip()) else 0.0 for completion in completions]


@takes_conversations
def match_format_approximately(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [-2, 2]: the sum over the four tags of 0.5 for a tag that occurs exactly once, and -0.5 for any other.

    >>> match_format_approximately(["?"] * 2, ["<answer>72</answer>", "<answer>7</answer><answer>72</answer>"])
    [0.0, -2.0]
    """
    return [sum(0.5 if completion.count(tag) == 1 else -0.5 for tag in TAGS) for completion in completions]


@takes_conversations
def check_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """In [-1, 3]: how near the text in the answer tags is to the expected answer; None where that is None.

    - 3.0 for the same text;
    - 1.5 for the same text with other white space around it, and for exactly the expected number written in another way
      (agent-tunix gives that 0.5, as for a number that is near);
    - 0.5 for a number within 10% of the expected one, 0.25 within 20%; only 0 itself is that near to 0;
    - -1.0 for any other number;
    - -0.5 where the answer or the expected answer is not a number;
    - 0.0 for no answer.

    A policy can earn 0.5 by a guess that is near. An answer of several numbers loses 0.5 here, but earns 1.5 with
    `check_numbers` if the first of them is right.

    Raises:
        ValueError: `answer` does not have one value for every completion.

    >>> texts = ["72", " 72", "72.0", "70", "60", "27", "many"]
    >>> check_answer(["?"] * 7, [f"<answer>{text}</answer>" for text in texts], answer=["72"] * 7)
    [3.0, 1.5, 1.5, 0.5, 0.25, -1.0, -0.5]
    >>> check_answer(["?"] * 3, ["72", "<answer>-5</answer>", "<answer>72</answer>"], answer=["72", "5", None])
    [0.0, -1.0, None]
    """
    return score_against_answers(completions, answer, _score_answer)


@takes_conversations
def check_numbers(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """1.5 where the first number in the answer tags is exactly the expected one, else 0.0; None where that is None.

    It is 0.0, too, where the words around that number negate or bound it, or make another number of it
    (`changes_value`).

    Raises:
        ValueError: `answer` does not have one value for every completion.

    >>> texts = ["1,234", "She has 1234.0 clips.", "-1234", "many", "not 1234"]
    >>> check_numbers(["?"] * 5, [f"<answer>{text}</answer>" for text in texts], answer=["#### 1234"] * 5)
    [1.5, 1.5, 0.0, 0.0, 0.0]
    """
    return score_against_answers(completions, answer, _score_number)


def _has_exact_format(completion: str) -> bool:
    if any(completion.count(tag) != 1 for tag in TAGS):
        return False
    starts = [completion.index(tag) for tag in TAGS]
    parts = [completion[starts[i] + len(TAGS[i]) : starts[i + 1]] for i in (0, 2)]
    in_order = starts == sorted(starts)
    return in_order and starts[0] == 0 and completion.endswith(TAGS[-1]) and all(part.strip() for part in parts)


def _score_answer(completion: str, expected: str) -> float:
    given, expected = extract_verbatim_answer(completion), final_answer(expected)
    if given is None or not given.strip():
        return 0.0
    if given == expected:
        return 3.0
    if given.strip() == expected.strip():
        return 1.5
    given_number, expected_number = parse_number(given), parse_number(expected)
    if given_number is None or expected_number is None:
        return -0.5
    difference = abs(given_number - expected_number)
    if difference == 0:
        return 1.5
    if difference <= abs(expected_number) * Fraction(1, 10):
        return 0.5
    return 0.25 if difference <= abs(expected_number) * Fraction(1, 5) else -1.0


def _score_number(completion: str, expected: str) -> float:
    given, expected_number = extract_verbatim_answer(completion) or "", parse_number(expected)
    if parse_number(given) is None and (around := _FIRST_NUMBER.match(given)) and changes_value(around[0]):
        return 0.0
    numbers = find_numbers(given)
    return 1.5 if numbers and numbers[0] == expected_number else 0.0
