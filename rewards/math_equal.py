"""A verifier of mathematics: does the answer have the value of the expected one, however it is written?"""

import re
from collections.abc import Sequence

from rewards.answers import extract_answer, final_answer, score_against_answers
from rewards.conversations import takes_conversations
from rewards.math_answer import agree, read_items
from rewards.math_latex import Unreadable, simplify_latex

MAX_CHARS = 300
POINTS = 3  # two expressions that agree for so many values of their variables are taken for the same

_LONE_LETTER = re.compile(r"\(([a-zA-Z])\)")
_PROSE = re.compile(r"(?=.*[a-z]{2}|.*[ap]\.m)(?!.*[0-9][a-z])[\w\s.,:;'()-]*", re.IGNORECASE)


@takes_conversations
def math_equal_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    r"""1.0 where the answer tags hold the value of the expected answer, else 0.0; None where that is None.

    >>> texts = ["0.5", r"\frac{1}{2}", r"\frac{\sqrt{4}}{4}", "2^{-1}", "0.33", "half"]
    >>> math_equal_reward(["?"] * 6, [f"<answer>{text}</answer>" for text in texts], answer=["1/2"] * 6)
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    >>> math_equal_reward(["?"] * 2, ["<answer>$x^2 + 2x + 1$</answer>"] * 2, answer=["(x+1)^2", None])
    [1.0, None]
    """
    return score_against_answers(completions, answer, _score)


def _score(completion: str, expected: str) -> float:
    given = extract_answer(completion)
    return float(given is not None and math_equal(given, final_answer(expected)))


def math_equal(given: str, expected: str) -> bool:
    if max(len(given), len(expected)) > MAX_CHARS:
        return _as_text(given) == _as_text(expected)
    given, expected = simplify_latex(given), simplify_latex(expected)
    if _as_text(given) == _as_text(expected):
        return True
    try:
        return all(agree(read_items(given, point), read_items(expected, point)) for point in range(POINTS))
    except Unreadable:
        return False


def _as_text(text: str) -> str:
    text = _LONE_LETTER.sub(r"\1", re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.split())))
    return text.casefold() if _PROSE.fullmatch(text) else text
