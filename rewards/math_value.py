r"""Read the value of a mathematical expression, in plain text or LaTeX.

The text is never given to eval(), on which sympy's parser of plain text is built, nor to a symbolic simplifier, which
may run for ever. A small parser computes as it reads: exactly in fractions where that is possible, otherwise to DIGITS
digits in mpmath, sympy's arithmetic. The length of the text, the depth of its brackets and every number on the way are
bounded, so reading takes milliseconds.
"""

import functools
import re
import zlib
from fractions import Fraction
from typing import Any, NamedTuple

from rewards.answers import DECIMAL

MAX_CHARS = 300
MAX_DEPTH = 20
MAX_BITS = 4096  # of a fraction's numerator and denominator
DIGITS = 120
LARGEST = 1e30  # the size of a number that is not a fraction is at most that, and at least 1 / LARGEST ...
ZERO = 1e-60  # ... or so small that it is 0 but for rounding
TOLERANCE = 1e-40  # relative, between numbers that are not both fractions

# The value of an expression: a Fraction, or a real or complex number of mpmath.
Value = Any

_COSMETICS = re.compile(
    r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;:! ]|\$|(?<=\\)[dt](?=frac)|\^\s*(?:\\circ|\{\s*\\circ\s*\})"
)
_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_BARE_FRACTION = re.compile(r"\\frac\s*([0-9])\s*([0-9])")
_BARE_ROOT = re.compile(r"\\sqrt\s*([0-9])")
_LEFT_SIDE = re.compile(r"\s*[a-zA-Z]\s*=(?!=)")

_TOKEN = re.compile(rf"(?P<number>{DECIMAL})|(?P<name>\\?[a-zA-Z]+)|(?P<sign>\*\*|\\[{{}}]|\S)")
_SYNONYMS = {
    "**": "^",
    "\\cdot": "*",
    "\\times": "*",
    "×": "*",
    "·": "*",
    "\\div": "/",
    "÷": "/",
    "\u2212": "-",
    "\u2013": "-",
    "π": "pi",
    "√": "sqrt",
}
_FUNCTIONS = frozenset(("sin", "cos", "tan", "ln", "log"))
_KEYWORDS = _FUNCTIONS | {"pi", "sqrt", "frac"}
_GREEK = frozenset(("alpha", "beta", "gamma", "theta", "lambda", "mu", "phi", "infty"))
_PRODUCT_LETTERS = frozenset("abcxyz")  # "xy" is x times y, but "dog" is not "god"
_BRACKETS = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}


class Unreadable(Exception):
    """The text is not mathematics that is read here, or too large."""


class Values(NamedTuple):
    """The value of an expression, or those of a tuple or list with its brackets."""

    values: list[Value]
    brackets: tuple[str, str]  # ("", "") for an expression and for a list without brackets


def simplify_latex(text: str) -> str:
    r"""`text` without what only changes its looks, and of `x = 5` the right side.

    >>> simplify_latex(r"$x = \left(\dfrac12\right)\,\text{cm}$."), simplify_latex(r"\boxed{50\%}")
    ('(\\frac{1}{2})cm', '50%')
    """
    text = _TEXT.sub(r"\1", _COSMETICS.sub("", text)).replace("\\%", "%")
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", _BARE_FRACTION.sub(r"\\frac{\1}{\2}", text)).strip("*` \n").rstrip(" .;")
    if text.startswith("\\boxed{") and text.endswith("}"):
        text = text[len("\\boxed{") : -1]
    left = _LEFT_SIDE.match(text)
    return (text[left.end() :] if left else text).strip()


def read_values(text: str, point: int = 0) -> Values:
    r"""The values that `text` states, its variables having the values that belong to `point`.

    Raises:
        Unreadable: the text is not mathematics that is read here, or too large.

    >>> read_values("1 + 2 * 3^2")
    Values(values=[Fraction(19, 1)], brackets=('', ''))
    >>> read_values(r"(1\frac{1}{2}, -2)")
    Values(values=[Fraction(3, 2), Fraction(-2, 1)], brackets=('(', ')'))
    >>> read_values("9^9^9")
    Traceback (most recent call last):
    rewards.math_value.Unreadable: a number of more than 4096 bits
    """
    if len(text) > MAX_CHARS:
        raise Unreadable(f"more than {MAX_CHARS} characters")
    tokens = _split_tokens(text)
    if len(tokens) > 2 and tokens[0] in _BRACKETS and tokens[-1] in _BRACKETS.values():
        pieces = _split_at_commas(tokens[1:-1])
        if len(pieces) > 1:  # one piece in brackets is an expression like any other
            return Values([_Reader(piece, point).read() for piece in pieces], (tokens[0], tokens[-1]))
    return Values([_Reader(piece, point).read() for piece in _split_at_commas(tokens)], ("", ""))


def agree(given: Values, expected: Values) -> bool:
    """Whether the values are the same; the order counts in round and square brackets only.

    >>> agree(read_values("1, 2"), read_values("2, 1")), agree(read_values("(1, 2)"), read_values("(2, 1)"))
    (True, False)
    >>> agree(read_values("sqrt(8)"), read_values("2 sqrt(2)")), agree(read_values("1/3"), read_values("0.333"))
    (True, False)
    """
    if given.brackets != expected.brackets or len(given.values) != len(expected.values):
        return False
    if given.brackets[0] in ("(", "["):
        return all(map(_same, given.values, expected.values))
    left = list(expected.values)
    for value in given.values:
        index = next((i for i, other in enumerate(left) if _same(value, other)), None)
        if index is None:
            return False
        del left[index]
    return True


def _split_tokens(text: str) -> list[str]:
    r"""Numbers, signs, and names without their backslash; a product of letters letter by letter.

    >>> _split_tokens(r"2xy + \frac{\pi}{1,000}")
    ['2', 'x', 'y', '+', 'frac', '{', 'pi', '}', '{', '1,000', '}']
    """
    tokens = []
    for match in _TOKEN.finditer(text):
        token = _SYNONYMS.get(match[0], match[0])
        name = token.removeprefix("\\")
        if match["name"] is None or token != match[0]:
            tokens.append(token)
        elif name in _KEYWORDS or name in _GREEK:
            tokens.append(name)
        elif len(token) == 1 or _PRODUCT_LETTERS.issuperset(token):
            tokens.extend(token)
        else:
            raise Unreadable(f"the word {token!r}")
    return tokens


def _split_at_commas(tokens: list[str]) -> list[list[str]]:
    pieces: list[list[str]] = [[]]
    depth = 0
    for token in tokens:
        depth += (token in _BRACKETS) - (token in _BRACKETS.values())
        if token == "," and depth == 0:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return pieces


class _Reader:
    """Computes the value of one expression while reading it, by recursive descent.

    sum: product (("+" | "-") product)*;  product: power (("*" | "/" | nothing) power)*;  power: atom ("^" power)?
    """

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens = tokens
        self.point = point
        self.position = 0
        self.depth = 0

    def read(self) -> Value:
        value = self.sum()
        if self.position < len(self.tokens):
            raise Unreadable(f"{self.peek()!r} where the expression should end")
        return value

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, wanted: str | None = None) -> str:
        token = self.peek()
        if not token or wanted not in (None, token):
            raise Unreadable(f"{token!r} where {wanted or 'a value'!r} should stand")
        self.position += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.position += 1
        return True

    def sum(self) -> Value:
        value = self.product()
        while self.peek() in ("+", "-"):
            operator = self.take()
            term = self.product()
            value = _add(value, term if operator == "+" else _multiply(Fraction(-1), term))
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            if self.accept("*"):
                value = _multiply(value, self.signed())
            elif self.accept("/"):
                value = _multiply(value, _power(self.signed(), Fraction(-1)))
            elif self.peek() in ("(", "[", "{") or self.peek()[:1].isalpha():  # "2x", "2(x + 1)", but not "2 3"
                value = _multiply(value, self.power())
            else:
                return value

    def signed(self) -> Value:
        sign = 1
        while self.peek() in ("+", "-"):
            sign *= -1 if self.take() == "-" else 1
        return _multiply(Fraction(sign), self.power())

    def power(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"deeper than {MAX_DEPTH}")
        value = self.atom()
        if self.accept("^"):
            value = _power(value, self.signed())
        self.depth -= 1
        return value

    def atom(self) -> Value:
        token = self.take()
        if token[0].isdecimal() or token[0] == "." and len(token) > 1:
            return self.mixed_number(token)
        if token in ("(", "[", "{"):
            value = self.sum()
            self.take(_BRACKETS[token])
            return value
        if token == "sqrt":
            index = Fraction(2)
            if self.accept("["):
                index = self.sum()
                self.take("]")
            return _root(self.atom(), index)
        if token == "frac":
            return _multiply(self.group(), _power(self.group(), Fraction(-1)))
        if token in _FUNCTIONS:
            return self.function(token)
        if token == "pi":
            return +_arithmetic().pi
        if token == "e":
            return +_arithmetic().e
        if token in _GREEK or len(token) == 1 and token.isascii() and token.isalpha():
            return _variable(token, self.point)
        raise Unreadable(f"{token!r} where a value should stand")

    def group(self) -> Value:
        if self.peek() != "{":
            raise Unreadable("an argument without braces")
        return self.atom()

    def mixed_number(self, token: str) -> Fraction:
        r"""The number `token`, and the fraction after it: "1 1/2" and "1\frac{1}{2}" are 3/2."""
        after = self.tokens[self.position : self.position + 7]
        parts = after[:3:2] if after[1:2] == ["/"] else after[2:6:3]
        layout = after[1:2] == ["/"] or [*after[:2], *after[3:5], *after[6:]] == ["frac", "{", "}", "{", "}"]
        if layout and len(parts) == 2 and all(re.fullmatch("[0-9]+", part) for part in (token, *parts)):
            numerator, denominator = map(int, parts)
            if numerator < denominator:
                self.position += 3 if after[1] == "/" else 7
                return _keep(_to_fraction(token) + Fraction(numerator, denominator))
        return _keep(_to_fraction(token))

    def function(self, name: str) -> Value:
        exponent = base = None
        if name == "log" and self.accept("_"):
            base = self.atom()
        if self.accept("^"):
            exponent = self.atom()  # \sin^2 x
            if not isinstance(exponent, Fraction) or exponent < 1:  # \sin^{-1} is no power
                raise Unreadable(f"{name}^{exponent}")
        bracketed = self.peek() in ("(", "{", "[")
        argument = self.atom() if bracketed else self.power()
        while not bracketed and (self.peek() == "pi" or len(self.peek()) == 1 and self.peek().isalpha()):
            argument = _multiply(argument, self.power())  # \sin 2x
        value = _apply(name, argument)
        if base is not None:
            value = _multiply(_apply("ln", argument), _power(_apply("ln", base), Fraction(-1)))
        return value if exponent is None else _power(value, exponent)


def _to_fraction(token: str) -> Fraction:
    return Fraction(token.replace(",", ""))


@functools.cache
def _arithmetic() -> Any:
    """mpmath with a precision of our own, so that nobody else's is changed."""
    from mpmath.ctx_mp import MPContext  # here: `import rewards` imports the standard library only

    arithmetic = MPContext()
    arithmetic.dps = DIGITS
    return arithmetic


def _variable(name: str, point: int) -> Fraction:
    """In [-2, 2], not 0; different for every name and point, negative at odd points."""
    size = Fraction(zlib.crc32(f"{name} {point}".encode()) % 999_983 + 1, 500_009)
    return -size if point % 2 else size


def _inexact(value: Value) -> Value:
    return _arithmetic().mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _keep(value: Value) -> Value:
    """`value`, if it is not too large to go on with."""
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise Unreadable(f"a number of more than {MAX_BITS} bits")
        return value
    size = abs(value)
    if size < ZERO:
        return Fraction(0)
    if not 1 / LARGEST <= size <= LARGEST:  # nor NaN
        raise Unreadable("a number too large or too small")
    return value


def _same(given: Value, expected: Value) -> bool:
    if isinstance(given, Fraction) and isinstance(expected, Fraction):
        return given == expected
    given, expected = _inexact(given), _inexact(expected)
    return bool(abs(given - expected) <= TOLERANCE * max(abs(given), abs(expected)))


def _add(a: Value, b: Value) -> Value:
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    return _keep(a + b if exact else _inexact(a) + _inexact(b))


def _multiply(a: Value, b: Value) -> Value:
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    return _keep(a * b if exact else _inexact(a) * _inexact(b))


def _power(base: Value, exponent: Value) -> Value:
    if base == 0:
        if isinstance(exponent, Fraction) and exponent > 0:
            return Fraction(0)
        raise Unreadable("a power of 0")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * bits > MAX_BITS:
            raise Unreadable(f"a number of more than {MAX_BITS} bits")
        return base**exponent.numerator
    base, exponent = _inexact(base), _inexact(exponent)
    if abs(exponent) * (abs(_arithmetic().ln(abs(base))) + 1) > MAX_BITS:
        raise Unreadable("a power too large or too small")
    return _keep(_arithmetic().power(base, exponent))


def _root(value: Value, index: Value) -> Value:
    if not isinstance(index, Fraction) or index.denominator != 1 or not 2 <= index <= MAX_DEPTH:
        raise Unreadable(f"a root of index {index}")
    if isinstance(value, Fraction) and value < 0 and index % 2:
        return _multiply(Fraction(-1), _power(-value, 1 / index))
    return _power(value, 1 / index)


def _apply(name: str, argument: Value) -> Value:
    if name in ("ln", "log") and argument == 0:
        raise Unreadable("a logarithm of 0")
    argument = _inexact(argument)
    if abs(argument) > LARGEST:
        raise Unreadable("an argument too large")
    function = {"log": "log10"}.get(name, name)
    return _keep(getattr(_arithmetic(), function)(argument))
