"""Find the answer and the reasoning in a completion, and compare answers exactly.

A completion has the form `<reasoning>...</reasoning> <answer>...</answer>`. Nothing here raises on any text, and the
time taken is linear in its length.
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

# Longer than any number a person writes. Below Python's limit on the digits of int(), and it bounds every regex.
MAX_NUMBER_CHARS = 200
# Digits with or without thousands separators, or a bare ".5".
DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"

STEP_END = re.compile(r"\n|(?<=[.!?])\s")  # a step of reasoning is a line or a sentence
# A calculation, counted at its operator: "2 + 3 * 4" has two, "$4 x 2" one.
OPERATION = re.compile(r"[0-9] ?[-+*/×·÷x](?= ?[$€£]?[0-9])")

# A number within other text. No digits or letters touch it, so that "x2" and "1e1234" hold none of 2 and 1234; a minus
# sign counts unless something to subtract from stands before it.
_NUMBER = re.compile(
    rf"(?:(?<![\w)%])(?P<sign>-)[$€£¥₹]?)?(?<!\w)(?P<digits>{DECIMAL}(?:e[+-]?[0-9]{{1,3}})?)(?![0-9])"
)

# One number and nothing else but a lead-in, a currency sign and words after it; `units.py` says which make a unit. The
# exponent has at most three digits, since an exact 1e999999999 would fill the memory; the denominator is not zero. The
# only digits of a unit are the 2 and 3 of "m2", "cm^3".
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
# What may stand before and after a GSM8K solution's marker that is on a line with other text.
_BEFORE_MARKED_NUMBER = tuple(".!?=0123456789)>")
_MARKED_NUMBER = re.compile(
    r"[-+]?\s?[$€£¥₹]?\s?[-+]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+|(?:[0-9]+\s)?[0-9]+\s?/\s?[0-9]+)\s?[%$€£¥₹]?\.?"
)
_EQUALS = re.compile(r"(?<![<>!~≈])=")
_HEADING = re.compile(r"[ \t]*#[ #]")  # of Markdown
_MINUS_SIGNS = str.maketrans("\u2212\u2013", "--")


class _Quantity(NamedTuple):
    value: Fraction
    unit: tuple[str, ...]  # normalised words; empty when the text names no unit


def extract_answer(completion: str) -> str | None:
    """Content of the last complete `<answer>...</answer>`, stripped; None when there is none.

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
    """What `extract_answer` finds, with the white space around it.

    >>> extract_verbatim_answer("<answer> 72</answer>")
    ' 72'
    """
    return _last_between(completion, *ANSWER_TAGS)


def extract_reasoning(completion: str) -> str | None:
    """Content of the last complete `<reasoning>...</reasoning>`, stripped; None when there is none.

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
    r"""The one number that `text` states, exactly, or None.

    A sign, thousands separators, a currency sign, a fraction, a mixed number, an exponent, a scale word ("3 million"),
    a unit after it, a short lead-in ("about", "the answer is") and a final period are understood; of a GSM8K solution
    only what follows the "####" counts (Cobbe et al. 2021, arXiv:2110.14168). A percentage is the number before
    its sign. Other words in front ("Apollo 11"), a word after it that changes the value ("3 quarters"), a variable
    ("2x"), a second number ("between 3 and 5"), a division without a remainder ("84/7" is a task, not its answer), a
    zero denominator, an exponent of four digits, or more than MAX_NUMBER_CHARS characters: None.

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
    """Every number in `text`, exactly and in order: signs, thousands separators and exponents of up to three digits.

    Of text that as a whole states one number (`parse_number`), that one; so "1/2" holds one number, "1/2 or 3" three.

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


def final_answer(solution: str) -> str:
    """What follows the "####" of a GSM8K solution, stripped; a text without such a marker as it is.

    The last "####" is a marker where it begins the last line and no other line is a heading of Markdown ("# ..." or
    "##..."), or where a number follows it that ends the text, and the end of a sentence or calculation stands before.
    Any other "####" is part of the answer.

    >>> final_answer("48 + 24 = 72\\n#### 72"), final_answer("48 + 24 = 72. #### 72"), final_answer(" 72")
    ('72', '72', ' 72')
    >>> final_answer("Write #### 5"), final_answer("# Title\\n#### Heading")
    ('Write #### 5', '# Title\\n#### Heading')
    """
    before, marker, final = solution.rpartition("####")
    final = final.strip()
    if not marker or "\n" in final:
        return solution
    *other_lines, line = before.split("\n")
    begins_last_line = not line.strip() and not any(map(_HEADING.match, other_lines))
    follows_end = before[-1:].isspace() and before.rstrip().endswith(_BEFORE_MARKED_NUMBER)
    if begins_last_line or follows_end and _MARKED_NUMBER.fullmatch(final.translate(_MINUS_SIGNS)):
        return final
    return solution


def stated_number(answer: str) -> Fraction | None:
    """The one number that an answer states: alone, in a sentence without another one, or after the last "=".

    None where there are several, as in a list, a date or a time, or where the text makes it another number, a bound or
    no answer (`changes_value`).

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
    """An expected answer of a data set as text: texts as they are, numbers as Python writes them, None as None.

    An exponent is written out, where that takes less than MAX_NUMBER_CHARS digits.

    Raises:
        ValueError: it is anything else, such as a list or NaN.

    >>> answer_text("72"), answer_text(72), answer_text(145.0), answer_text(1e-05), answer_text(None)
    ('72', '72', '145.0', '0.00001', None)
    """
    if answer is None or isinstance(answer, str):
        return answer
    if not isinstance(answer, (numbers.Real, decimal.Decimal)):
        raise ValueError(f"answer={answer!r:.60}: is a {type(answer).__name__}, expected a text, a number or None")
    if not math.isfinite(answer):
        raise ValueError(f"answer={answer}: expected a finite number, a text or None")
    text = str(answer)
    if isinstance(answer, bool) or "e" not in text.casefold():
        return text
    number = decimal.Decimal(text)  # of the digits that Python writes: 0.00001 for the float 1e-05
    is_short = abs(number.adjusted()) + len(number.as_tuple().digits) < MAX_NUMBER_CHARS
    return f"{number:f}" if is_short else text


def score_against_answers(
    completions: Sequence[str], answer: Sequence[object], score: Callable[[str, str], float]
) -> list[float | None]:
    """`score(completion, expected)` of every row, None where the expected answer is None. A number counts as its text.

    Raises:
        ValueError: `answer` has not one value for every completion, or one that `answer_text` refuses.
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
    """Whether two answers state the same: the same number if both are numbers, otherwise the same text.

    Numbers are compared exactly (0.33 is not 1/3). If both name a unit, the units have to agree in their words, up to
    case, plural and currency sign, as far as the shorter one goes ("72 apples" and "72 apples in all" agree). Nothing
    is converted: "50%" matches "50" but not "0.5". Text is compared without regard to case, white space and final
    periods.

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
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    start += len(opening)
    return text[start : text.find(closing, start)]


def _normalise(text: str) -> str:
    final = final_answer(text).translate(_MINUS_SIGNS)
    final = " ".join(final.casefold().split()).strip("*` ").rstrip(" .,;")  # Markdown's bold and code
    if final.startswith("\\boxed{") and final.endswith("}"):  # LaTeX
        final = final[len("\\boxed{") : -1].strip()
    return final


def _parse_quantity(text: str) -> _Quantity | None:
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
    first = re.match(r"/?([^\W\d_²³]*)", words[0])[1]
    begins = words[0][0] in "/%°$€£¥₹" or starts_unit(first, attached, letters=True)
    return begins and may_be_unit(" ".join(words))
