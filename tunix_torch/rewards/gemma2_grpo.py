"""The five rewards of gemma2-grpo-reasoning: format, logic, accuracy, and bonuses for self-correction and length.

They come from mlvpatel/gemma2-grpo-reasoning, whose README gives the first three the weights 0.25, 0.30 and 0.45 and
adds the bonuses unweighted. One thing differs: here words are whole words ("also" has no "so", "awaiting" no "wait").

A policy can exploit that logic and the bonuses count words, steps and phrases. A completion with both parts that is
stuffed with them earns 0.25 + 0.30 + 0.10 + 0.05 = 0.70 with a wrong answer, as much as a short right one, which earns
0.25 + 0.45. That is the system's formula; where it matters, give gemma2_accuracy more weight.
"""

import re
from collections.abc import Sequence

from .answers import (
    ANSWER_TAGS,
    OPERATION,
    REASONING_TAGS,
    answers_match,
    extract_answer,
    extract_reasoning,
    parse_number,
    score_against_answers,
    stated_number,
)
from .conversations import takes_conversations

TRANSITIONS = frozenset(
    "therefore because since so thus hence first second third then next finally "
    "step calculate compute multiply divide add subtract".split()
)
CORRECTIONS = (
    "wait",
    "actually",
    "correction",
    "let me recalculate",
    "let me redo",
    "i made an error",
    "i made a mistake",
    "re-checking",
    "rechecking",
    "that's not right",
    "that is not right",
)

_CORRECTION = re.compile(rf"\b(?:{'|'.join(CORRECTIONS)})\b")
_STEP_NUMBER = re.compile(r"\bstep ?#?([0-9]{1,3})\b")
_EQUALS = re.compile(r"=|\bequals?\b")


@takes_conversations
def gemma2_format_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: 1.0 for a reasoning and then an answer part, 0.5 for the wrong order, 0.3 for one part, else 0.0.

    >>> parts = ["<reasoning>6 * 12</reasoning>", "<answer>72</answer>"]
    >>> gemma2_format_reward(["?"] * 4, ["".join(parts), "".join(reversed(parts)), parts[1], "72"])
    [1.0, 0.5, 0.3, 0.0]
    """
    return [_score_format(completion) for completion in completions]


@takes_conversations
def gemma2_logic_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: the sum of four parts about the text in the reasoning tags; 0.0 without such text.

    - transitions: 0.05 for each different word of TRANSITIONS, at most 0.4;
    - steps: 0.1 for each different N in "step N", at most 0.3;
    - expressions: 0.05 for each calculation such as `150 × 4`, at most 0.2;
    - equals: 0.02 for each "=" or "equals", at most 0.1.

    >>> text = "Step 1: Find the price. Step 2: 150 × 4 = 600. Therefore, the total is 600."
    >>> gemma2_logic_reward(["?"] * 2, [f"<reasoning>{text}</reasoning>", text])  # 0.10 + 0.20 + 0.05 + 0.02
    [0.37, 0.0]
    """
    return [_score_logic(completion) for completion in completions]


@takes_conversations
def gemma2_accuracy_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """In [0, 1]: how near the number that the answer tags state is to the expected one; None where that is None.

    It is 1.0 for exactly the same number, 0.9 within 1%, 0.5 within 10%, else 0.0. `stated_number` says which number an
    answer states; the original system takes the last number of any text. Where the expected answer is not one number (a
    date, a time, a list, words), the reward is 1.0 or 0.0 by `answers_match`.

    A policy can earn 0.9 or 0.5 by a guess that is near.

    Raises:
        ValueError: `answer` does not have one value for every completion.

    >>> texts = ["600", "150 × 4 = 600", "605", "650", "-600"]
    >>> gemma2_accuracy_reward(["?"] * 5, [f"<answer>{text}</answer>" for text in texts], answer=["600"] * 5)
    [1.0, 1.0, 0.9, 0.5, 0.0]
    """
    return score_against_answers(completions, answer, _score_accuracy)


@takes_conversations
def gemma2_self_correction_bonus(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 0.1]: 0.03 for each different phrase of CORRECTIONS in the completion, at most 0.10.

    It looks at phrases only, so that a model can earn it without any correction. Keep its weight small.

    >>> texts = ["600", "Wait, that's not right.", "Wait. Actually, let me redo this: I made an error."]
    >>> gemma2_self_correction_bonus(["?"] * 3, texts)
    [0.0, 0.06, 0.1]
    """
    phrases = [_CORRECTION.findall(completion.replace("\u2019", "'").casefold()) for completion in completions]
    return [min(3 * len(set(found)), 10) / 100 for found in phrases]


@takes_conversations
def gemma2_length_bonus(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 0.05]: 0.05 for 100 to 400 words in the completion, 0.02 for 50 to 99 or 401 to 600, else 0.0.

    >>> gemma2_length_bonus(["?"] * 4, ["word " * n for n in (49, 50, 400, 600)])
    [0.0, 0.02, 0.05, 0.02]
    """
    return [_score_length(len(completion.split())) for completion in completions]


def _score_format(completion: str) -> float:
    num_parts = sum(part is not None for part in (extract_reasoning(completion), extract_answer(completion)))
    if num_parts == 2:
        in_order = completion.find(REASONING_TAGS[1]) < completion.rfind(ANSWER_TAGS[0])
        return 1.0 if in_order else 0.5
    return 0.3 * num_parts


def _score_logic(completion: str) -> float:
    reasoning = (extract_reasoning(completion) or "").casefold()
    # All parts are in hundredths, so that their sum is exact.
    transitions = min(5 * len(TRANSITIONS.intersection(re.findall(r"\w+", reasoning))), 40)
    steps = min(10 * len(set(_STEP_NUMBER.findall(reasoning))), 30)
    expressions = min(5 * len(OPERATION.findall(reasoning)), 20)
    equals = min(2 * len(_EQUALS.findall(reasoning)), 10)
    return (transitions + steps + expressions + equals) / 100


def _score_accuracy(completion: str, expected: str) -> float:
    given = extract_answer(completion)
    if given is None:
        return 0.0
    expected_number = parse_number(expected)
    if expected_number is None:
        return float(answers_match(given, expected))
    given_number = stated_number(given)
    if given_number is None:
        return 0.0
    difference = abs(given_number - expected_number)
    if difference == 0:
        return 1.0
    if difference * 100 <= abs(expected_number):
        return 0.9
    return 0.5 if difference * 10 <= abs(expected_number) else 0.0


def _score_length(num_words: int) -> float:
    if 100 <= num_words <= 400:
        return 0.05
    return 0.02 if 50 <= num_words <= 600 else 0.0
