r"""The arithmetic of mathematical answers: exact in fractions where that is possible, else to DIGITS digits in mpmath.

Every number is bounded, so that nothing takes long or fills the memory. Functions raise `Unreadable` beyond the bounds,
and where there is no value.
"""

import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

from .math_latex import Unreadable

MAX_ROOT = 20
MAX_BITS = 4096  # of a fraction's numerator and denominator
DIGITS = 120
LARGEST = 1e30  # the size of a number that is not a fraction is at most that, and at least 1 / LARGEST ...
ZERO = 1e-60  # ... but a sum, or a function as the sine of pi, that is smaller than this is 0 but for rounding
TOLERANCE = 1e-40  # relative, between numbers that are not both fractions

# The value of an expression: a Fraction, a real or complex number of mpmath, or a Group.
Value = Any

_OF_THREAD = threading.local()
_RECIPROCALS = {"sec": "cos", "csc": "sin", "cot": "tan", "sech": "cosh", "csch": "sinh", "coth": "tanh"}
_MPMATH_NAMES = {"log": "log10", "arcsin": "asin", "arccos": "acos", "arctan": "atan"}


class Part(NamedTuple):
    """One value of a group, and how it is written."""

    value: Value
    is_plain: bool = False  # a number without any calculation, or a fraction
    is_calculation: bool = False  # a calculation that is still to be done


class Group(NamedTuple):
    """Several values as one: a tuple, an interval, a set, a union, a matrix, ..."""

    kind: str  # for tuples and intervals the two brackets, for sets "{}"
    parts: tuple[Part, ...]


def group_of(kind: str, *values: Value) -> Group:
    """A group of which it doesn't matter how the values are written."""
    return Group(kind, tuple(map(Part, values)))


UNORDERED = frozenset(("{}", "cup"))


def same_value(given: Value, expected: Value) -> bool:
    """Whether two values are the same; the order counts, but for sets and unions. `same_part` judges a group's parts.

    >>> same_value(power(Fraction(8), Fraction(1, 2)), multiply(Fraction(2), power(Fraction(2), Fraction(1, 2))))
    True
    >>> one, two = Fraction(1), Fraction(2)
    >>> [same_value(group_of(kind, one, two), group_of(kind, two, one)) for kind in ("{}", "()")]
    [True, False]
    """
    if isinstance(given, Group) and isinstance(expected, Group):
        if given.kind != expected.kind or len(given.parts) != len(expected.parts):
            return False
        if given.kind in UNORDERED:
            return match_all(given.parts, expected.parts, same_part)
        return all(map(same_part, given.parts, expected.parts))
    if isinstance(given, Group) or isinstance(expected, Group):
        return False
    if isinstance(given, Fraction) and isinstance(expected, Fraction):
        return given == expected
    given, expected = _inexact(given), _inexact(expected)
    return bool(abs(given - expected) <= TOLERANCE * max(abs(given), abs(expected)))


def same_part(given: Part, expected: Part) -> bool:
    """Whether two values are the same; where a number is expected, a calculation is none.

    >>> three = Fraction(3)
    >>> same_part(Part(three, is_plain=True), Part(three)), same_part(Part(three, False, True), Part(three, True))
    (True, False)
    """
    return not (expected.is_plain and given.is_calculation) and same_value(given.value, expected.value)


def match_all(given: tuple[Any, ...], expected: tuple[Any, ...], same: Callable[[Any, Any], bool]) -> bool:
    """Whether every one of `given` is the same as another one of `expected`, and none is left over."""
    left = list(expected)
    for value in given:
        index = next((i for i, other in enumerate(left) if same(value, other)), None)
        if index is None:
            return False
        del left[index]
    return not left


def _arithmetic() -> Any:
    """mpmath with a precision of our own, so that nobody else's is changed; one for each thread: it has a state."""
    if not hasattr(_OF_THREAD, "arithmetic"):
        from mpmath.ctx_mp import MPContext  # here: `import rewards` imports the standard library only

        _OF_THREAD.arithmetic = MPContext()
        _OF_THREAD.arithmetic.dps = DIGITS
    return _OF_THREAD.arithmetic


def pi() -> Value:
    return +_arithmetic().pi


def euler() -> Value:
    return +_arithmetic().e


def imaginary_unit() -> Value:
    return _arithmetic().mpc(0, 1)


def digits_of(value: Value) -> str:
    """The first 30 digits, or the fraction."""
    return str(value) if isinstance(value, Fraction) else _arithmetic().nstr(value, 30)


def _inexact(value: Value) -> Value:
    return _arithmetic().mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def keep(value: Value, rounds: bool = False) -> Value:
    """`value`, if it is not too large or too small to go on with; where what it comes from `rounds`, ZERO is 0."""
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Unreadable(f"a number of more than {MAX_BITS} bits")
        return value
    size = abs(value)
    if size == 0 or rounds and size < ZERO:
        return Fraction(0)
    if not 1 / LARGEST <= size <= LARGEST:  # nor NaN
        raise Unreadable("a number too large or too small")
    return value


def add(a: Value, b: Value) -> Value:
    exact = are_exact(a, b)
    return keep(a + b if exact else _inexact(a) + _inexact(b), rounds=True)


def multiply(a: Value, b: Value) -> Value:
    exact = are_exact(a, b)
    return keep(a * b if exact else _inexact(a) * _inexact(b))


def are_exact(*values: Value) -> bool:
    if any(isinstance(value, Group) for value in values):
        raise Unreadable("arithmetic with several values at once")
    return all(isinstance(value, Fraction) for value in values)


def absolute(value: Value) -> Value:
    are_exact(value)
    return abs(value)


def power(base: Value, exponent: Value) -> Value:
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
    if exact and base < 0 and exponent.denominator % 2:  # the real root, as sqrt[3]{-8} is -2
        return multiply(Fraction((-1) ** (exponent.numerator % 2)), power(-base, exponent))
    base, exponent = _inexact(base), _inexact(exponent)
    if abs(exponent) * (abs(_arithmetic().ln(abs(base))) + 1) > MAX_BITS:
        raise Unreadable("a power too large or too small")
    return keep(_arithmetic().power(base, exponent))


def ratio(numerator: Value, denominator: Value) -> Value:
    return multiply(numerator, power(denominator, Fraction(-1)))


def root(value: Value, index: Value) -> Value:
    if not isinstance(index, Fraction) or index.denominator != 1 or not 2 <= index <= MAX_ROOT:
        raise Unreadable(f"a root of index {index}")
    return power(value, 1 / index)


def apply(name: str, argument: Value) -> Value:
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
