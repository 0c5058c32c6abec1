"""The reward for structure: whether the reasoning has connected steps, and arithmetic that is true."""

import re
from collections.abc import Sequence
from fractions import Fraction

from .answers import DECIMAL, MAX_NUMBER_CHARS, STEP_END, extract_reasoning
from .conversations import takes_conversations

FULL_STEPS = 3  # so many different steps earn the full quarter
FULL_TRANSITIONS = 2  # so many different transition words earn the full quarter
TRANSITIONS = frozenset(
    "first firstly second secondly third next then after so since because therefore thus hence finally".split()
)

_LIST_MARKER = re.compile(r"^[ \t]*(?:[-*•]|[0-9]+[.)])[ \t]+", re.MULTILINE)
_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "×": "*", "·": "*", "÷": "/", "$": None, "€": None, "£": None})
_TIMES_X = re.compile(r"(?<=[0-9]) ?x ?(?=[0-9])")
_CLAUSE_END = re.compile(r"[.,;:!?](?:\s|$)|\n")
_EQUATION = re.compile(r"[-+*/^%=0-9., ]+")  # characters of equations; `_evaluate` refuses those with "^" or "%"
_TERM = re.compile(rf"([-+*/])\s*(-?{DECIMAL})\s*")
_TERMS = re.compile(rf"(?:{_TERM.pattern})+")


@takes_conversations
def reasoning_coherence_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: the sum of four quarters about the text in the reasoning tags; 0.0 without such text.

    - presence: 0.25 for any text;
    - steps: 0.25 for three different steps, and a third of it for each step below; a step is a line or a sentence of
      three or more words;
    - transitions: 0.25 for two different words of TRANSITIONS, and half of it for one;
    - arithmetic: 0.25 times the share of equations, such as `2 + 3 * 4 = 14`, that are exactly true; 0 without one.
      Expressions with letters, brackets, powers or percentages are not judged.

    These parts are this project's own measure of structure. Checking the written calculations follows the calculator
    annotations of GSM8K (Cobbe et al. 2021, arXiv:2110.14168). The reward looks at the form only, so give it a small
    weight beside correctness.

    >>> good = "First, 48 / 2 = 24 clips in May.\\nThen 48 + 24 = 72 in both months.\\nSo the answer is 72."
    >>> wrong = "First, 48 / 2 = 24 clips in May.\\nThen 48 + 24 = 62 in both months.\\nSo the answer is 62."
    >>> completions = [f"<reasoning>{text}</reasoning>" for text in (good, wrong, "72", "")]
    >>> reasoning_coherence_reward(["?"] * 4, completions)
    [1.0, 0.875, 0.25, 0.0]
    """
    return [_score(extract_reasoning(completion)) for completion in completions]


def _score(reasoning: str | None) -> float:
    if not reasoning:
        return 0.0
    steps = {step for step in STEP_END.split(reasoning.casefold()) if len(step.split()) >= 3}
    transitions = TRANSITIONS.intersection(re.findall(r"[a-z]+", reasoning.casefold()))
    verdicts = _judge_equations(reasoning)
    true_share = sum(verdicts) / len(verdicts) if verdicts else 0.0
    return (
        0.25
        + 0.25 * min(len(steps) / FULL_STEPS, 1.0)
        + 0.25 * min(len(transitions) / FULL_TRANSITIONS, 1.0)
        + 0.25 * true_share
    )


def _judge_equations(reasoning: str) -> list[bool]:
    """Whether each equation in the text is true. Equations that can't be evaluated are left out.

    >>> _judge_equations("2 + 3 = 5. Total = $4 x 2 = $8, then 10 - 1 = 8; x + 3 = 7 and 7 = 7")
    [True, True, False]
    """
    text = _TIMES_X.sub("*", _LIST_MARKER.sub("", reasoning.translate(_SIGNS)))
    verdicts = []
    for clause in _CLAUSE_END.split(text):
        for run in _EQUATION.findall(clause):
            sides = [side for side in run.split("=") if side.strip()]  # "Total = 3 + 4 = 7" has an empty first side
            if len(run) > MAX_NUMBER_CHARS or len(sides) < 2 or not any(_calculates(side) for side in sides):
                continue
            values = [_evaluate(side) for side in sides]
            if None not in values:
                verdicts.append(len(set(values)) == 1)
    return verdicts


def _calculates(side: str) -> bool:
    """Whether a side of an equation has an operator, other than the sign of its first number."""
    return any(operator in side.strip()[1:] for operator in "+-*/")


def _evaluate(expression: str) -> Fraction | None:
    """The exact value of a sum of products and quotients; None for anything else, and for a division by zero.

    >>> _evaluate("2 + 3 * -4 / 8"), _evaluate("1,000 - .5"), _evaluate("+ 3"), _evaluate("1 / 0")
    (Fraction(1, 2), Fraction(1999, 2), None, None)
    """
    signed = "+" + expression
    if not _TERMS.fullmatch(signed):
        return None
    terms = []
    for operator, digits in _TERM.findall(signed):
        number = Fraction(digits.replace(",", ""))
        if operator == "/" and number == 0:
            return None
        match operator:
            case "+":
                terms.append(number)
            case "-":
                terms.append(-number)
            case "*":
                terms[-1] *= number
            case "/":
                terms[-1] /= number
    return sum(terms, Fraction(0))
