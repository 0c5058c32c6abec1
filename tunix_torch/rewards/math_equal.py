"""The reward for mathematics: whether the answer has the value of the expected one, however it is written."""

import re
from collections.abc import Sequence

from .answers import extract_answer, final_answer, score_against_answers
from .conversations import takes_conversations
from .math_answer import agree, read_items
from .math_latex import Unreadable, simplify_latex

MAX_CHARS = 300  # a longer answer is compared as a text
POINTS = 3  # expressions that agree at so many values of their variables are taken for equal

_LONE_LETTER = re.compile(r"\([a-zA-Z]\)")
_PROSE = re.compile(r"(?=.*[a-z]{2}|.*[ap]\.m)(?!.*[0-9][a-z])[\w\s.,:;'()-]*", re.IGNORECASE)


@takes_conversations
def math_equal_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    r"""1.0 where the answer tags hold the value of the expected answer, else 0.0; None where that is None.

    `math_equal` says which answers are equal.

    Raises:
        ValueError: `answer` does not have one value for every completion, or has one that is neither a text nor a
            number.

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
    r"""Whether two answers are equal, as texts or as mathematics, in LaTeX or plain text.

    The mathematics that is read has numbers, + - * / ^ !, roots, binomials, pi, e, i, sin, cos, tan and their
    relatives, ln, log (base 10), exp, absolute values, variables, f(x), tuples, intervals, unions, sets, matrices,
    plus-minus signs, equations and inequalities, and lists in any order. An answer that can't be read, or is longer
    than MAX_CHARS characters, equals the same text only, up to the case of words. No answer is ever evaluated as
    Python, and none takes longer than 0.1 seconds.

    - "0.33" is not 1/3, and a percentage is not converted. A unit agrees with the same unit, and with no unit.
    - "x = 5" equals 5, but 2x + 3 = 13 does not equal x = 5. Where the expected answer is an equation that is not
      solved for anything, any multiple of it is equal.
    - An answer is a value and not the task: where a number is expected, "47 + 38" and "84/7" are not equal to it, also
      inside points, sets, intervals and inequalities. But a root, a power or a function of numbers may equal a number,
      and any form of an expression equals another: (x+1)^2 equals x^2 + 2x + 1. So a policy that is asked to simplify,
      factor or evaluate an expression can repeat it.

    Expressions with variables are compared at POINTS points, because a polynomial other than 0 is seldom 0 at a point
    (Schwartz 1980, doi:10.1145/322217.322225).

    >>> math_equal(r"\frac{1}{3}\text{ meters}", "1/3"), math_equal("2", "2x"), math_equal("3 quarters", "3")
    (True, False, False)
    >>> math_equal(r"(0,1) \cup (2,3)", r"(2,3)\cup(0,1)"), math_equal("47 + 38", "85"), math_equal("85", "85")
    (True, False, True)
    """
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
    """The text in the form in which texts are compared: no spaces beside signs, no brackets around a letter, no case.

    >>> _as_text("(x + 1) ^2"), _as_text("New York"), _as_text("(C)"), _as_text("f(x)"), _as_text("32, 349")
    ('(x+1)^2', 'new york', 'C', 'f(x)', '32, 349')
    """
    text = re.sub(r"\s*([^\w\s,])\s*", r"\1", " ".join(text.split()))
    text = text[1:-1] if _LONE_LETTER.fullmatch(text) else text
    return text.casefold() if _PROSE.fullmatch(text) else text
