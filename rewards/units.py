"""Which words after a number are a unit: those that name what is counted or measured, and leave its value alone.

A word that changes the value ("3 quarters", "5 squared") is none, nor is mathematics ("2x", "4 sqrt 2", "3 pi").
"""

import re
from collections.abc import Sequence

SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1_000,
    "million": 1_000_000,
    "billion": 1_000_000_000,
    "trillion": 1_000_000_000_000,
}
FUNCTIONS = frozenset("sin cos tan sec csc cot arcsin arccos arctan ln log exp".split())
GREEK = frozenset("alpha beta gamma delta epsilon theta lambda mu rho sigma tau phi omega".split())

_NUMBER_WORDS = frozenset(
    "zero two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety".split()
)
_PARTS = "third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth twentieth hundredth thousandth millionth"
_CHANGES_VALUE = frozenset(
    [
        *_NUMBER_WORDS,
        *SCALES,
        *(f"{scale}s" for scale in SCALES),
        *_PARTS.split(),
        *(f"{part}s" for part in _PARTS.split()),
        *"half halves quarter quarters gross lakh lakhs crore crores mil mln mn bn".split(),
        *"squared cubed root factorial doubled tripled halved twice".split(),
        *"negative negated inverse reciprocal repeating recurring choose mod modulo not below".split(),
    ]
)
# Words that go on to another number, or take the first one back, and the names of mathematics.
_NEVER_IN_A_UNIT = _CHANGES_VALUE | frozenset(
    [
        *"and or but if unless except plus minus times divided multiplied added subtracted than".split(),
        *"least most score".split(),
        *FUNCTIONS,
        *GREEK,
        *"pi sqrt frac inf infinity infty".split(),
    ]
)
_NEVER_FIRST = frozenset("is are was were to".split())  # "7 is wrong", but "7 miles to go"
# Short units, which otherwise could be a product of variables, as "ab" is. After a space, more of them are unambiguous.
_ATTACHED_UNITS = frozenset(
    "km cm mm kg mg lb lbs oz ft kb mb gb hz khz mhz ghz kw kwh kj mph kph kmh hrs mins secs th st nd rd μm".split()
)
_SHORT_UNITS = _ATTACHED_UNITS | frozenset(
    "nm in yd mi ml cl dl hr min sec ms am pm tb mw cal pts pt px usd eur gbp gm gms pct sq cu μs μl μg of".split()
)
# With a space before them, and in plain text only: in mathematics they are variables.
_LETTER_UNITS = frozenset("mgshl")
_PRODUCT_LETTERS = frozenset("abcdwxyz")
_VOWELS = frozenset("aeiouyäöüéèáàíóúæøå")

_SPELLINGS = {
    **{"dollar": "$ usd", "euro": "€ eur", "pound": "£ gbp", "yen": "¥", "rupe": "₹"},
    **{"%": "percent percentag pct", "°": "degre"},
    **{"mm": "millimeter millimetr", "cm": "centimeter centimetr", "m": "meter metr", "km": "kilometer kilometr"},
    **{
        "in": "inch",
        "ft": "foot feet",
        "yd": "yard",
        "mi": "mil",
        "g": "gram gm gms",
        "kg": "kilogram",
        "l": "liter litr",
    },
    **{"hr": "hour hrs h", "min": "minut mins", "sec": "second secs s"},
}
_ALIASES = {other: one for one, others in _SPELLINGS.items() for other in others.split()}
_POWERS = {"square": "2", "sq": "2", "cubic": "3", "cu": "3"}
_SUPERSCRIPTS = str.maketrans({"²": "2", "³": "3", "^": None, "{": None, "}": None, "(": None, ")": None})
# "miles" and "mile", "inches" and "inch", "glasses" and "glass"; too short a word ("ms", "s") is left alone.
_WORD_ENDING = re.compile(r"(?<=\w\w)(?:es|(?<!s)s|e)\b")
_LETTERS = re.compile(r"[^\W\d_]+")


def changes_value(text: str) -> bool:
    """Whether a word of `text`, which stands beside a number, makes it another number.

    >>> changes_value("quarters of it"), changes_value("clips in all"), changes_value("ten-thousandths")
    (True, False, True)
    """
    return not _CHANGES_VALUE.isdisjoint(_LETTERS.findall(text.casefold()))


def may_be_unit(text: str) -> bool:
    """Whether no word of `text`, which stands after a number, changes its value, states another one, or is mathematics.

    >>> may_be_unit("clips in all"), may_be_unit("quarters"), may_be_unit("apples or seven")
    (True, False, False)
    """
    return _NEVER_IN_A_UNIT.isdisjoint(_LETTERS.findall(text.casefold()))


def starts_unit(word: str, attached: bool, letters: bool = False) -> bool:
    """Whether a word right after a number can begin a unit; `attached` when no space is between the two.

    A letter is a unit only where the text has `letters` for units, and only some of them; in "2x" it is a variable.

    >>> starts_unit("clips", False), starts_unit("km", True), starts_unit("x", True), starts_unit("ab", False)
    (True, True, False, False)
    """
    folded = word.casefold().rstrip(".")
    if folded in (_ATTACHED_UNITS if attached else _SHORT_UNITS):
        return True
    if len(folded) == 1:
        return letters and not attached and word in _LETTER_UNITS
    if _PRODUCT_LETTERS.issuperset(folded) or folded in _NEVER_FIRST or not may_be_unit(folded):
        return False
    return len(folded) >= (4 if attached else 3) and not _VOWELS.isdisjoint(folded)


def normalise_unit(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a unit without their plural, in one spelling.

    >>> normalise_unit(["$"]), normalise_unit(["Inches"]), normalise_unit(["cm^{2}"]), normalise_unit(["square", "cm"])
    (('dollar',), ('in',), ('cm2',), ('cm2',))
    """
    folded = [word.casefold().translate(_SUPERSCRIPTS).rstrip(".,!") for word in words]
    if folded[:2] == ["per", "cent"]:
        folded[:2] = ["%"]
    if len(folded) > 1 and folded[0] in _POWERS:
        folded[:2] = [folded[1] + _POWERS[folded[0]]]
    return tuple(map(_in_one_spelling, filter(None, folded)))


def _in_one_spelling(word: str) -> str:
    stem = word.rstrip("23")
    singular = _WORD_ENDING.sub("", stem)
    return _ALIASES.get(stem, _ALIASES.get(singular, singular)) + word[len(stem) :]


def units_agree(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether two units are the same in their words, as far as the shorter one goes; a missing one agrees with any."""
    return all(x == y for x, y in zip(a, b, strict=False))
