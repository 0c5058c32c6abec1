"""Finds the answer and the reasoning in a completion, and compares answers exactly.

A completion has the form `<reasoning>...</reasoning> <answer>...</answer>`. No function here raises an error for any
text, and each takes time linear in its length.
"""

import decimal
import math
import numbers
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from .units import SCALES, changes_value, may_be_unit, normalise_unit, starts_unit, units_agree

REASONING_TAGS = ("<reasoning>", "</reasoning>")
ANSWER_TAGS = ("<answer>", "</answer>")

# A longer text is not read as a number. The limit is above any number that a person writes, below Python's limit on the
# digits of int(), and bounds the time of every regular expression here.
MAX_NUMBER_CHARS = 200
MAX_ANSWER_BITS = 14_000  # of a whole number as an expected answer: 4,214 digits. Python writes at most 4,300 as text.
# Digits with or without thousands separators, or a decimal without a whole part, as ".5".
DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"

STEP_END = re.compile(r"\n|(?<=[.!?])\s")  # a step of reasoning is a line or a sentence
# A calculation, counted at its operator: "2 + 3 * 4" has two, "$4 x 2" one.
OPERATION = re.compile(r"[0-9] ?[-+*/×·÷x](?= ?[$€£]?[0-9])")

# A number within other text. No letter or further digit touches it, so that no 2 is found in "x2" and no 1234 in
# "1e1234". A minus sign belongs to it unless there is something before it to subtract from.
_NUMBER = re.compile(
    rf"(?:(?<![\w)%])(?P<sign>-)[$€£¥₹]?)?(?<!\w)(?P<digits>{DECIMAL}(?:e[+-]?[0-9]{{1,3}})?)(?![0-9])"
)

# A text that is one number, with at most a lead-in and a currency sign before it and words after it; `units.py` says
# which words make a unit. The exponent has at most three digits, because an exact 1e999999999 would fill the memory,
# and the denominator is not zero. A unit has no digits but the 2 and 3 of "m2" and "cm^3".
_WORD = r"(?:[%°$€£¥₹][^\W\d_]*|[µμ]?[^\W\d_]+(?:['’.·-][^\W\d_]+)*)(?:\^?[23]|[²³])?"
_QUANTITY = re.compile(
    rf"""
    (?:(?:(?:the\ )?(?:final\ )?answer(?:\ is:?|:)|about|approximately|around|roughly|=)\ ?)?
    (?P<prefix>[+-]?(?:[$€£¥₹]\ ?)?|[$€£¥₹]\ ?[+-])
    (?:
        (?:(?P<whole>[0-9]+)\ )?(?P<fraction>[0-9]+\ ?/\ ?0*[1-9][0-9]*)
      | (?P<decimal>{DECIMAL}(?:e[+-]?[0-9]{{1,3}})?)
    )
    (?:[ -]?(?P<scale>{"|".join(SCALES)})s?\b)?
    (?P<space>[ ]?)(?P<unit>(?:/[ ]?)?\(?{_WORD}\)?[.,!]?(?:(?:[ ]|[ ]?/[ ]?)\(?{_WORD}\)?[.,!]?)*)?
    """,
    re.VERBOSE,
)
# What stands before and after the marker "####" of a GSM8K solution where it shares its line with other text.
_BEFORE_MARKED_NUMBER = tuple(".!?=0123456789)>")
_MARKED_NUMBER = re.compile(
    r"[-+]?\s?[$€£¥₹]?\s?[-+]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+|(?:[0-9]+\s)?[0-9]+\s?/\s?[0-9]+)\s?[%$€£¥₹]?\.?"
)
_EQUALS = re.compile(r"(?<![<>!~≈])=")
_HEADING = re.compile(r"[ \t]*#[ #]")  # a heading of Markdown
_MINUS_SIGNS = str.maketrans("\u2212\u2013", "--")


class _Quantity(NamedTuple):
    value: Fraction
    unit: tuple[str, ...]  # the words of the unit, normalised; empty where the text names no unit


def extract_answer(completion: str) -> str | None:
    """The text in the last complete `<answer>...</answer>`, stripped, or None where there is none.

    >>> extract_answer("<reasoning>6 * 12</reasoning> <answer> 72 </answer>")
    '72'
    >>> extract_answer("<answer>70</answer> No: <answer>72</answer> <answer>7")
    '72'
    >>> extract_answer("The answer is 72.") is None
    True
    """
    verbatim = extract_verbatim_answer(completion)
    return None if verbatim is None else verbatim.strip()


def extract_verbatim_answer(completion: str) -> str | None:
    """The text that `extract_answer` finds, with the white space around it.

    >>> extract_verbatim_answer("<answer> 72</answer>")
    ' 72'
    """
    return _last_between(completion, *ANSWER_TAGS)


def extract_reasoning(completion: str) -> str | None:
    """The text in the last complete `<reasoning>...</reasoning>`, stripped, or None where there is none.

    >>> extract_reasoning("<reasoning> 6 * 12 = 72 </reasoning> <answer>72</answer>")
    '6 * 12 = 72'
    """
    reasoning = _last_between(completion, *REASONING_TAGS)
    return None if reasoning is None else reasoning.strip()


def extract_steps(completion: str) -> list[str]:
    """The lines and sentences of the reasoning, stripped, without empty ones.

    >>> extract_steps("<reasoning>We add 1.5 and 2. That is 3.5.\\n\\nDone</reasoning>")
    ['We add 1.5 and 2.', 'That is 3.5.', 'Done']
    """
    return [step.strip() for step in STEP_END.split(extract_reasoning(completion) or "") if step.strip()]


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of a text that states one number; None for any other text.

    The number may have a sign, thousands separators, a currency sign, an exponent, a scale word ("3 million"), a unit
    after it, a short lead-in ("about", "the answer is") and a final period, and may be a fraction or a mixed number. Of
    a GSM8K solution only the text after the "####" counts (Cobbe et al. 2021, arXiv:2110.14168). A percentage is the
    number before its sign.

    Texts that state no number are those with other words in front ("Apollo 11"), a word after the number that changes
    its value ("3 quarters"), a variable ("2x"), a second number ("between 3 and 5"), a division without a remainder
    ("84/7" is a task, not its answer), a denominator of zero, an exponent of four digits, or more than MAX_NUMBER_CHARS
    characters.

    >>> parse_number("$1,234.50"), parse_number("-1 1/2"), parse_number("50%")
    (Fraction(2469, 2), Fraction(-3, 2), Fraction(50, 1))
    >>> parse_number("48 / 2 = 24 clips, so 48 + 24 = 72. #### 72")
    Fraction(72, 1)
    >>> parse_number("**72**"), parse_number(r"\boxed{72}")
    (Fraction(72, 1), Fraction(72, 1))
    >>> [parse_number(text) for text in ("between 3 and 5", "1/0", "3 quarters", "2x", "7 is wrong", "84/7")]
    [None, None, None, None, None, None]
    """
    quantity = _parse_quantity(_normalise(text))
    return None if quantity is None else quantity.value


def find_numbers(text: str) -> list[Fraction]:
    """The exact values of all numbers in a text, in order, with signs, thousands separators and short exponents.

    A text that as a whole states one number (`parse_number`) has only that one: "1/2" holds one number, but "1/2 or 3"
    holds three.

    >>> find_numbers("She pays -$5, then 1,234.5 of 10-3."), find_numbers("1/2"), find_numbers("none")
    ([Fraction(-5, 1), Fraction(2469, 2), Fraction(10, 1), Fraction(3, 1)], [Fraction(1, 2)], [])
    """
    number = parse_number(text)
    if number is not None:
        return [number]
    matches = _NUMBER.finditer(text.translate(_MINUS_SIGNS).casefold())
    return [
        Fraction((match["sign"] or "") + match["digits"].replace(",", ""))
        for match in matches
        if len(match["digits"]) <= MAX_NUMBER_CHARS
    ]


def split_marked_answer(solution: str) -> tuple[str, str]:
    """Split a GSM8K solution at its "####" into the reasoning before it and the final answer after it, both stripped.

    A text without such a marker is the final answer as it is, and its reasoning is "".

    The last "####" is a marker where it begins the last line and no other line is a Markdown heading ("# ..." or
    "##..."). It is also one where a number that ends the text follows it, and the end of a sentence or of a calculation
    stands before it. Any other "####" is part of the answer.

    >>> split_marked_answer("48 + 24 = 72\\n#### 72"), split_marked_answer(" 72")
    (('48 + 24 = 72', '72'), ('', ' 72'))
    >>> split_marked_answer("48 + 24 = 72. #### 72"), split_marked_answer("Write #### 5")
    (('48 + 24 = 72.', '72'), ('', 'Write #### 5'))
    >>> split_marked_answer("# Title\\n#### Heading")
    ('', '# Title\\n#### Heading')
    """
    reasoning, marker, final = solution.rpartition("####")
    final = final.strip()
    if not marker or "\n" in final:
        return "", solution
    *other_lines, line = reasoning.split("\n")
    begins_last_line = not line.strip() and not any(map(_HEADING.match, other_lines))
    follows_end = reasoning[-1:].isspace() and reasoning.rstrip().endswith(_BEFORE_MARKED_NUMBER)
    if begins_last_line or follows_end and _MARKED_NUMBER.fullmatch(final.translate(_MINUS_SIGNS)):
        return reasoning.strip(), final
    return "", solution


def final_answer(solution: str) -> str:
    """The final answer of a GSM8K solution, as `split_marked_answer` finds it; another text as it is.

    >>> final_answer("48 + 24 = 72\\n#### 72"), final_answer(" 72")
    ('72', ' 72')
    """
    return split_marked_answer(solution)[1]


def stated_number(answer: str) -> Fraction | None:
    """The one number that an answer states: alone, in a sentence without another number, or after the last "=".

    It is None where there are several numbers, as in a list, a date or a time, and where the words around the number
    make another number, a bound or no answer of it (`changes_value`).

    >>> stated_number("150 × 4 = 600"), stated_number("She pays $600 in all.")
    (Fraction(600, 1), Fraction(600, 1))
    >>> [stated_number(text) for text in ("1 2 3 600", "12:30", "2024-05-06", "3 quarters of it", "none")]
    [None, None, None, None, None]
    >>> [stated_number(text) for text in ("at least 600", "x >= 600", "It is not 600.")]
    [None, None, None]
    """
    number = parse_number(answer)
    if number is not None:
        return number
    result = _EQUALS.split(answer)[-1]
    found = find_numbers(result)
    return found[0] if len(found) == 1 and not changes_value(result) else None


def answer_text(answer: object) -> str | None:
    """An expected answer of a data set as a text: a text unchanged, a number as Python writes it, and None for None.

    An exponent is written out where that takes fewer than MAX_NUMBER_CHARS digits.

    Raises:
        ValueError: the answer is anything else, such as a list or NaN, or has more digits than MAX_ANSWER_BITS make.

    >>> answer_text("72"), answer_text(72), answer_text(145.0), answer_text(1e-05), answer_text(None)
    ('72', '72', '145.0', '0.00001', None)
    """
    if answer is None or isinstance(answer, str):
        return answer
    if not isinstance(answer, (numbers.Real, decimal.Decimal)):
        raise ValueError(f"answer={answer!r:.60}: is a {type(answer).__name__}, expected a text, a number or None")
    if isinstance(answer, numbers.Rational):  # which may be too large for a float, and so for math.isfinite
        if max(abs(int(answer.numerator)), int(answer.denominator)).bit_length() > MAX_ANSWER_BITS:
            raise ValueError("answer: a number of more than 4,000 digits; give it as a text, which is compared as one")
    elif not math.isfinite(answer):
        raise ValueError(f"answer={answer}: expected a finite number, a text or None")
    text = str(answer)
    if isinstance(answer, bool) or "e" not in text.casefold():
        return text
    number = decimal.Decimal(text)  # exactly what Python writes: 0.00001 for the float 1e-05
    is_short = abs(number.adjusted()) + len(number.as_tuple().digits) < MAX_NUMBER_CHARS
    return f"{number:f}" if is_short else text


def score_against_answers(
    completions: Sequence[str], answer: Sequence[object], score: Callable[[str, str], float]
) -> list[float | None]:
    """Call `score(completion, expected answer as a text)` for every row. The value is None where no answer is expected.

    Raises:
        ValueError: `answer` does not have one value for every completion, or has one that `answer_text` refuses.
    """
    if len(answer) != len(completions):
        raise ValueError(
            f"answer has {len(answer)} values; it needs one for each of the {len(completions)} completions"
        )
    return [
        None if expected is None else score(completion, expected)
        for completion, expected in zip(completions, map(answer_text, answer), strict=True)
    ]


def answers_match(given: str, expected: str) -> bool:
    """Whether two answers are equal: as numbers where both state one, and as texts otherwise.

    Numbers are compared exactly (0.33 is not 1/3). Where both name a unit, the words of the units have to agree, apart
    from case, plural and currency sign, and as far as the shorter unit goes ("72 apples" and "72 apples in all" agree).
    No unit is converted: "50%" matches "50" but not "0.5". Texts are compared without regard to case, white space and
    final periods.

    >>> answers_match("$72.00", "72 dollars"), answers_match("72 km", "72"), answers_match(" new  york.", "New York")
    (True, True, True)
    >>> answers_match("72 km", "72 miles"), answers_match("50%", "50 km"), answers_match("0.33", "1/3")
    (False, False, False)
    """
    given, expected = _normalise(given), _normalise(expected)
    given_quantity, expected_quantity = _parse_quantity(given), _parse_quantity(expected)
    if given_quantity is None or expected_quantity is None:
        return given == expected
    return given_quantity.value == expected_quantity.value and units_agree(given_quantity.unit, expected_quantity.unit)


def _last_between(text: str, opening: str, closing: str) -> str | None:
    """The text in the last pair of these tags, or None where there is no pair."""
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.find(closing, start)]


def _normalise(text: str) -> str:
    """The final answer in small letters, with single spaces, and without Markdown, a LaTeX box and a final period."""
    final = final_answer(text).translate(_MINUS_SIGNS)
    final = " ".join(final.casefold().split()).strip("*` ").rstrip(" .,;")
    if final.startswith("\\boxed{") and final.endswith("}"):
        final = final[len("\\boxed{") : -1].strip()
    return final


def _parse_quantity(text: str) -> _Quantity | None:
    """The number and the unit of a normalised text, or None where it states no single number."""
    match = _QUANTITY.fullmatch(text) if len(text) <= MAX_NUMBER_CHARS else None
    if match is None:
        return None
    number = (match["fraction"] or match["decimal"]).replace(",", "").replace(" ", "")
    value = Fraction(number)
    if match["fraction"] and value.denominator == 1:
        return None  # "84/7" is a task, 12 its answer
    value += int(match["whole"] or 0)
    value *= SCALES.get(match["scale"], 1) * (-1 if "-" in match["prefix"] else 1)
    words = (match["unit"] or "").replace("(", "").replace(")", "").split()
    if words and not _is_unit(words, attached=not match["space"] and match["scale"] is None):
        return None
    return _Quantity(value, normalise_unit([match["prefix"].strip("+- "), *words]))


def _is_unit(words: list[str], attached: bool) -> bool:
    """Whether the words after a number are a unit; `attached` when there is no space between."""
    first = re.match(r"/?([^\W\d_²³]*)", words[0])[1]
    begins = words[0][0] in "/%°$€£¥₹" or starts_unit(first, attached, letters=True)
    return begins and may_be_unit(" ".join(words))
