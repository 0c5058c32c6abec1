"""How an answer writes a value, which tells an answer from a task; and the values that variables have."""

import re
import zlib
from fractions import Fraction

from .math_numbers import Part, Value

_INTEGER, _NUMBER = r"[0-9]+(?:,[0-9]{3})*", r"(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)"
# A fraction of two numbers, written with "/" or in LaTeX; and what else is a number without a calculation.
_FRACTION = re.compile(rf"\{{?{_NUMBER}\}}?/\{{?{_NUMBER}\}}?|frac\{{?{_INTEGER}\}}?\{{?{_INTEGER}\}}?")
_PLAIN_NUMBER = re.compile(
    rf"{_NUMBER}|[0-9.]+[eE][-+]?[0-9]+|(?:{_INTEGER})?(?:{_FRACTION.pattern})"
    rf"|{_NUMBER}\*10\^(?:\{{-?[0-9]+\}}|-?[0-9]+)|repeating.*"
)
# A single pair of round brackets around the whole.
_BRACKETED = re.compile(r"\([^()]*\)")


def as_part(value: Value, tokens: list[str], operations: int) -> Part:
    """A value together with how it is written.

    Args:
        tokens: the tokens that state the value.
        operations: how many calculations `read_value` counts in them.

    >>> [as_part(Fraction(3), text.split(), n)[1:] for text, n in (("3", 0), ("1 + 2", 1), ("6 / 2", 1))]
    [(True, False), (False, True), (True, True)]
    >>> as_part(Fraction(3, 2), ["3", "/", "2"], 1)[1:]
    (True, False)
    """
    written = "".join(tokens).lstrip("+-")
    written = written[1:-1] if _BRACKETED.fullmatch(written) else written
    is_plain = _PLAIN_NUMBER.fullmatch(written) is not None
    is_whole = isinstance(value, Fraction) and value.denominator == 1
    is_division = is_plain and is_whole and _FRACTION.fullmatch(written) is not None  # as "84/7" for 12
    return Part(value, is_plain, operations > 0 and not is_plain or is_division)


def variable(name: str, point: int) -> Fraction:
    """The value of a variable in [-2, 2]: never 0, different for every name and point, and negative at odd points."""
    size = Fraction(zlib.crc32(f"{name} {point}".encode()) % 999_983 + 1, 500_009)
    return -size if point % 2 else size
