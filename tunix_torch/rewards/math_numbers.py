"""The arithmetic of mathematical answers: exact in fractions where that is possible, else with DIGITS digits in mpmath.

Every number is bounded, so that no answer takes long or fills the memory. The functions raise `Unreadable` beyond these
bounds, and where a calculation has no value.
"""

import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from .math_latex import Unreadable

MAX_ROOT = 20  # the largest index of a root
MAX_BITS = 4096  # the largest size of a fraction's numerator and denominator
DIGITS = 120
LARGEST = 1e30  # a number that is no fraction has a size from 1 / LARGEST to LARGEST, or is 0
ZERO = 1e-60  # a smaller sum, or value of a function such as the sine of pi, differs from 0 only by rounding
TOLERANCE = 1e-40  # the relative difference up to which numbers are equal that are not both fractions

# The value of an expression is a Fraction, a real or complex number of mpmath, or a Compound.
Value = Any

_OF_THREAD = threading.local()
# Functions that are computed as 1 / another one, and those with another name in mpmath.
_RECIPROCALS = {"sec": "cos", "csc": "sin", "cot": "tan", "sech": "cosh", "csch": "sinh", "coth": "tanh"}
_MPMATH_NAMES = {"log": "log10", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}


class Part(NamedTuple):
    """One value, and how the answer writes it."""

    value: Value
    is_plain: bool = False  # it is written as a number without any calculation, or as a fraction
    is_calculation: bool = False  # it is written as a calculation that is still to be done


class Compound(NamedTuple):
    """Several values that make one: a tuple, an interval, a set, a union, a matrix or the like."""

    kind: str  # the two brackets of a tuple or an interval, "{}" for a set, "cup" for a union, and so on
    parts: tuple[Part, ...]


def compound_of(kind: str, *values: Value) -> Compound:
    """A compound of values for which it does not matter how they are written."""
    return Compound(kind, tuple(map(Part, values)))


UNORDERED = frozenset(("{}", "cup"))  # the kinds of compounds in which the order of values does not count


def same_value(given: Value, expected: Value) -> bool:
    """Whether two values are equal. Order counts in compounds other than sets and unions; `same_part` compares parts.

    >>> same_value(power(Fraction(8), Fraction(1, 2)), multiply(Fraction(2), power(Fraction(2), Fraction(1, 2))))
    True
    >>> one, two = Fraction(1), Fraction(2)
    >>> [same_value(compound_of(kind, one, two), compound_of(kind, two, one)) for kind in ("{}", "()")]
    [True, False]
    """
    if isinstance(given, Compound) and isinstance(expected, Compound):
        if given.kind != expected.kind or len(given.parts) != len(expected.parts):
            return False
        if given.kind in UNORDERED:
            return match_all(given.parts, expected.parts, same_part)
        return all(map(same_part, given.parts, expected.parts))
    if isinstance(given, Compound) or isinstance(expected, Compound):
        return False
    if isinstance(given, Fraction) and isinstance(expected, Fraction):
        return given == expected
    given, expected = _inexact(given), _inexact(expected)
    return bool(abs(given - expected) <= TOLERANCE * max(abs(given), abs(expected)))


def same_part(given: Part, expected: Part) -> bool:
    """Whether two values are equal. A calculation that is still to be done does not equal a number that is expected.

    >>> three = Fraction(3)
    >>> same_part(Part(three, is_plain=True), Part(three)), same_part(Part(three, False, True), Part(three, True))
    (True, False)
    """
    return not (expected.is_plain and given.is_calculation) and same_value(given.value, expected.value)


def match_all(given: tuple[Any, ...], expected: tuple[Any, ...], same: Callable[[Any, Any], bool]) -> bool:
    """Whether `given` and `expected` have the same values in any order, each as often."""
    left = list(expected)
    for value in given:
        index = next((i for i, other in enumerate(left) if same(value, other)), None)
        if index is None:
            return False
        del left[index]
    return not left


def _arithmetic() -> Any:
    """mpmath with a precision of its own, for each thread separately because it has state. Other users keep theirs."""
    if not hasattr(_OF_THREAD, "arithmetic"):
        from mpmath.ctx_mp import MPContext  # imported here, so that the package needs only the standard library

        _OF_THREAD.arithmetic = MPContext()
        _OF_THREAD.arithmetic.dps = DIGITS
    return _OF_THREAD.arithmetic


def pi() -> Value:
    """The number pi."""
    return +_arithmetic().pi


def euler() -> Value:
    """Euler's number e."""
    return +_arithmetic().e


def imaginary_unit() -> Value:
    """The imaginary unit i."""
    return _arithmetic().mpc(0, 1)


def digits_of(value: Value) -> str:
    """The value as a text: the fraction, or the first 30 digits."""
    return str(value) if isinstance(value, Fraction) else _arithmetic().nstr(value, 30)


def _inexact(value: Value) -> Value:
    """The value as a number of mpmath."""
    return _arithmetic().mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def keep(value: Value, rounds: bool = False) -> Value:
    """Return the value, or raise Unreadable where it is too large or too small.

    Args:
        rounds: the value comes from a calculation whose rounding may hide a 0, so that a size below ZERO means 0.
    """
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Unreadable(f"a number of more than {MAX_BITS} bits")
        return value
    size = abs(value)
    if size == 0 or rounds and size < ZERO:
        return Fraction(0)
    if not 1 / LARGEST <= size <= LARGEST:  # true for NaN, too
        raise Unreadable("a number too large or too small")
    return value


def add(a: Value, b: Value) -> Value:
    """a + b."""
    exact = are_exact(a, b)
    return keep(a + b if exact else _inexact(a) + _inexact(b), rounds=True)


def multiply(a: Value, b: Value) -> Value:
    """a * b."""
    exact = are_exact(a, b)
    return keep(a * b if exact else _inexact(a) * _inexact(b))


def are_exact(*values: Value) -> bool:
    """Whether all values are fractions. Raises Unreadable where one of them is a compound."""
    if any(isinstance(value, Compound) for value in values):
        raise Unreadable("arithmetic with several values at once")
    return all(isinstance(value, Fraction) for value in values)


def absolute(value: Value) -> Value:
    """The absolute value of a number."""
    are_exact(value)
    return abs(value)


def power(base: Value, exponent: Value) -> Value:
    """base ** exponent. Of a negative fraction, a root with an odd index is the real one."""
    exact = are_exact(base, exponent)
    if base == 0:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise Unreadable("a power of 0")
    if exact and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > MAX_BITS:
            raise Unreadable(f"a number of more than {MAX_BITS} bits")
        return base**exponent.numerator
    if exact and base < 0 and exponent.denominator % 2:  # sqrt[3]{-8} is -2
        return multiply(Fraction((-1) ** (exponent.numerator % 2)), power(-base, exponent))
    base, exponent = _inexact(base), _inexact(exponent)
    if abs(exponent) * (abs(_arithmetic().ln(abs(base))) + 1) > MAX_BITS:
        raise Unreadable("a power too large or too small")
    return keep(_arithmetic().power(base, exponent))


def ratio(numerator: Value, denominator: Value) -> Value:
    """numerator / denominator."""
    return multiply(numerator, power(denominator, Fraction(-1)))


def root(value: Value, index: Value) -> Value:
    """The root of an index from 2 to MAX_ROOT."""
    if not isinstance(index, Fraction) or index.denominator != 1 or not 2 <= index <= MAX_ROOT:
        raise Unreadable(f"a root of index {index}")
    return power(value, 1 / index)


def apply(name: str, argument: Value) -> Value:
    """The value of a function in `units.FUNCTIONS`."""
    are_exact(argument)
    if name in ("ln", "log") and argument == 0:
        raise Unreadable("a logarithm of 0")
    if name in _RECIPROCALS:
        return ratio(Fraction(1), apply(_RECIPROCALS[name], argument))
    if name == "exp":
        return power(euler(), argument)
    argument = _inexact(argument)
    if abs(argument) > LARGEST:
        raise Unreadable("an argument too large")
    return keep(getattr(_arithmetic(), _MPMATH_NAMES.get(name, name))(argument), rounds=True)
