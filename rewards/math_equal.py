"""A verifier of mathematics: does the answer have the value of the expected one, however it is written?"""

from collections.abc import Sequence

from rewards.answers import answers_match, extract_answer, final_answer, score_against_answers
from rewards.math_value import MAX_CHARS, Unreadable, agree, read_values, simplify_latex

POINTS = 3  # two expressions that agree for so many values of their variables are taken for the same


def math_equal_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str | None], **columns: object
) -> list[float | None]:
    r"""1.0 where the answer tags hold the value of the expected answer, else 0.0; None where that is None.

    Answers are equal by `answers_match`, or as mathematics: numbers, + - * / ^, brackets, roots, pi, e, sin, cos, tan,
    ln, log (base 10), variables of one letter, tuples, lists in any order, and their LaTeX. "0.33" is not 1/3, and a
    percentage is not converted. What cannot be read, or is longer than MAX_CHARS characters, equals only what
    `answers_match` says; nothing is ever evaluated as Python (`math_value.py` has the bounds).

    Expressions with variables are compared at POINTS points, by the lemma that a polynomial other than 0 is seldom 0
    (Schwartz 1980, doi:10.1145/322217.322225).

    Raises:
        ValueError: `answer` has not one value for every completion.

    >>> texts = ["0.5", r"\frac{1}{2}", r"\frac{\sqrt{4}}{4}", "2^{-1}", "0.33", "half"]
    >>> math_equal_reward(["?"] * 6, [f"<answer>{text}</answer>" for text in texts], answer=["1/2"] * 6)
    [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    >>> math_equal_reward(["?"] * 2, ["<answer>$x^2 + 2x + 1$</answer>"] * 2, answer=["(x+1)^2", None])
    [1.0, None]
    """
    return score_against_answers(completions, answer, _score)


def _score(completion: str, expected: str) -> float:
    given, expected = extract_answer(completion), final_answer(expected)
    if given is None:
        return 0.0
    return float(answers_match(given, expected) or _same_mathematics(given, expected))


def _same_mathematics(given: str, expected: str) -> bool:
    if max(len(given), len(expected)) > MAX_CHARS:
        return False
    given, expected = simplify_latex(given), simplify_latex(expected)
    if answers_match(given, expected):
        return True
    try:
        return all(agree(read_values(given, point), read_values(expected, point)) for point in range(POINTS))
    except Unreadable:
        return False
