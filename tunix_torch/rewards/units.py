"""Decides which words after a number are a unit: words that name what is counted or measured.

A word is no unit if it changes the number's value ("3 quarters", "5 squared"), takes it back ("5 is wrong"), or belongs
to mathematics ("2x", "4 sqrt 2", "3 pi"). Such words are listed here; a word that no list has counts as a unit.
"""

import re
from collections.abc import Sequence

# Words that multiply the number before them.
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1_000,
    "million": 1_000_000,
    "billion": 1_000_000_000,
    "trillion": 1_000_000_000_000,
}
FUNCTIONS = frozenset("sin cos tan sec csc cot arcsin arccos arctan sinh cosh tanh sech csch coth ln log exp".split())
GREEK = frozenset(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron rho sigma tau upsilon phi chi "
    "psi omega varepsilon vartheta varkappa varrho varsigma varphi".split()
)

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
        *(f"{word}fold" for word in _NUMBER_WORDS),
        *"half halfs halves quarter quarters gross lakh lakhs crore crores mil mln mn bn bln tn".split(),
        *"milliard milliards grand googol googols googolplex myriad myriads".split(),
        *"brace trio trios".split(),
        *"permille permil mille bps binary ternary octal hex hexadecimal".split(),
        *"squared cubed root factorial doubled tripled halved twice thrice".split(),
        *"negative negated inverse reciprocal repeating recurring choose mod modulo below".split(),
        # These words take the value back, or say that it may be another one.
        *"not never none nope nothing cannot isnt arent wasnt werent aint dont doesnt didnt cant".split(),
        *"wrong false incorrect untrue invalid inaccurate erroneous mistaken mistake mistakenly".split(),
        *"incorrectly wrongly impossible unlikely doubtful unsure uncertain unknown".split(),
        *"maybe perhaps possibly probably".split(),
    ]
)
# Words such as "quadrillion", "fourteenths", "twentieth", "nines", "sixes" and "twenties". "24 zeros" counts zeros.
_NUMBER_WORD = re.compile(
    rf"[a-z]*(?:illion|illionth|teenth|tieth)s?|(?:{'|'.join(sorted(_NUMBER_WORDS - {'zero'}))})e?s"
    r"|(?:twen|thir|for|fif|six|seven|eigh|nine)ties"
)
_NEGATION = re.compile(r"n['’]t\b")
# Words and signs that make a bound of a number ("at least 600", "over $600", "x >= 600") or a rank ("600th").
_BOUND = re.compile(
    r"\bat (?:the )?(?:very )?(?:least|most)\b"
    r"|\b(?:(?:more|less|fewer|greater|smaller|larger|bigger|higher|lower|other) than|over|under|above|beyond|between"
    r"|exceed(?:s|ing)?|up to|down to|nearly|almost)(?=[^\w.]*\.?[0-9])"
    r"|[<>≤≥≠±]|\\(?:[lg]eq?(?:slant)?|[lg]t|neq?|pm)(?![a-z])|[0-9](?:st|nd|rd|th)\b"
)
_NEVER_IN_A_UNIT = _CHANGES_VALUE | frozenset(
    [
        # These words lead to another number, ...
        *"and or but if unless except plus minus times divided multiplied added subtracted than".split(),
        *"basis score double triple quadruple".split(),
        # ... these bound the value or take it back, ...
        *"least most instead rather hardly barely likely".split(),
        # ... and these are mathematics. "min" is not listed, because "40 min" are minutes.
        *FUNCTIONS,
        *GREEK,
        *"pi sqrt frac inf infinity infty arccot arcsec arccsc arcsinh arccosh arctanh arsinh arcosh artanh".split(),
        *"asin acos atan sinc cis erf erfc lg det arg max argmax argmin sup lim limsup liminf gcd gcf lcm hcf".split(),
        *"sgn dim ker abs ceil sum prod var cov tr prob div grad nabla hbar ell aleph forall cdot cdots ldots".split(),
        *"sine cosine sines cosines logarithm squareroot cuberoot transpose conjugate equals".split(),
    ]
)
# Words that are no unit right after the number, but may stand later in one: "7 is wrong", but "7 miles to go".
_NEVER_FIRST = frozenset("is are was were to fold mega giga tera micro milli nano pico deca deci centi thou".split())
# Short units. Any other short word could be a product of variables, as "ab" is. Those of the first set are units even
# without a space after the number; those of the second only with a space.
_ATTACHED_UNITS = frozenset(
    "km cm mm kg mg lb lbs oz ft kb mb gb hz khz mhz ghz kw kwh kj mph kph kmh hrs mins secs th st nd rd μm".split()
)
_SHORT_UNITS = _ATTACHED_UNITS | frozenset(
    "nm in yd mi ml cl dl hr min sec ms am pm tb mw cal pts pt px usd eur gbp gm gms pct sq cu μs μl μg of".split()
)
# A single letter after a short unit or a word of mathematics is a variable, as in "2 cm x" and "2 over n"; the letter
# in "5 visits to company B" is none.
_VARIABLE = re.compile(
    rf"(?<![\w'’.-])(?:[a-z]|over|per|base|by|{'|'.join(sorted(_SHORT_UNITS - {'of', 'in', 'am'}))})(?:\^?[23]|[²³])? "
    r"(?:[bdeinpqrtuxyz]|[xyz]+)(?!\w|['’.-]\w)"
)
# Letters that are units after a space in plain text. In mathematics they are variables.
_LETTER_UNITS = frozenset("mgshl")
_PRODUCT_LETTERS = frozenset("abcdwxyz")
_VOWELS = frozenset("aeiouyäöüéèáàíóúæøå")

# One spelling of a unit -> its other spellings, without endings of the plural.
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
# The endings in which "miles" and "mile", "inches" and "inch", "glasses" and "glass" differ. Words as short as "ms"
# keep their "s".
_WORD_ENDING = re.compile(r"(?<=\w\w)(?:es|(?<!s)s|e)\b")
_LETTERS = re.compile(r"[^\W\d_]+")


def changes_value(text: str) -> bool:
    """Whether the words of a sentence make another number, a bound, or no answer of the number in it.

    >>> [changes_value(text) for text in ("3 quarters of it", "3 clips in all", "3 ten-thousandths", "it is not 3")]
    [True, False, True, True]
    >>> [changes_value(text) for text in ("at least 3", "over $3", "3 more than she has", "the 3rd of 5")]
    [True, True, False, True]
    """
    folded = text.casefold()
    return _has_word_of(_CHANGES_VALUE, folded) or _BOUND.search(folded) is not None


def may_be_unit(text: str) -> bool:
    """Whether a text after a number may be its unit.

    It is no unit if a word of it changes the value or takes it back, leads to another number, or is mathematics.

    >>> may_be_unit("clips in all"), may_be_unit("quarters"), may_be_unit("apples or seven"), may_be_unit("cm x")
    (True, False, False, False)
    >>> may_be_unit("quadrillion"), may_be_unit("isn't it"), may_be_unit("T-shirts")
    (False, False, True)
    """
    folded = text.casefold()
    return not _has_word_of(_NEVER_IN_A_UNIT, folded) and _VARIABLE.search(folded) is None


def is_short_unit(word: str) -> bool:
    """Whether a word is one of the listed short units, such as "cm".

    >>> is_short_unit("cm"), is_short_unit("gcd")
    (True, False)
    """
    return word.casefold() in _SHORT_UNITS


def starts_unit(word: str, attached: bool, letters: bool = False) -> bool:
    """Whether a word right after a number can begin a unit.

    Args:
        attached: there is no space between the number and the word.
        letters: a single letter may be a unit, as in plain text. In mathematics it is a variable.

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


def _has_word_of(words: frozenset[str], folded: str) -> bool:
    """Whether a text in small letters has one of the words, a word for a number, or a negation."""
    found = _LETTERS.findall(folded)
    return not words.isdisjoint(found) or any(map(_NUMBER_WORD.fullmatch, found)) or bool(_NEGATION.search(folded))


def normalise_unit(words: Sequence[str]) -> tuple[str, ...]:
    """The words of a unit in the singular and in one spelling, so that equal units compare equal.

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
    """Whether two units have the same words, as far as the shorter one goes. No unit agrees with any unit."""
    return all(x == y for x, y in zip(a, b, strict=False))
