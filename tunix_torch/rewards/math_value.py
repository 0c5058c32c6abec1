r"""Computes the value of one mathematical expression from its tokens.

A small parser computes while it reads: exactly in fractions where that is possible, otherwise in mpmath, which is
sympy's arithmetic. The library does not use sympy itself, because its parser of plain text is built on eval(), and its
simplifier may run for ever. The length of the text, the depth of its brackets and every number on the way are bounded,
so that reading takes milliseconds.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction

from .math_latex import CLOSING, OPENING, Unreadable
from .math_numbers import (
    Compound,
    Part,
    Value,
    absolute,
    add,
    apply,
    compound_of,
    digits_of,
    euler,
    imaginary_unit,
    keep,
    multiply,
    pi,
    power,
    ratio,
    root,
)
from .math_written import as_part, variable
from .units import FUNCTIONS, GREEK

MAX_DEPTH = 20  # of nested powers and brackets
MAX_ATOMS = 300  # the most numbers, variables and brackets that are read; a plus-minus sign makes some count twice
MAX_FACTORIAL = 300
MAX_VALUES = 40  # the most values in one pair of brackets

# Functions of an angle, in which "°" means pi / 180.
_CIRCULAR = frozenset(("sin", "cos", "tan", "sec", "csc", "cot"))
_UNKNOWN_FUNCTIONS = frozenset("fghFGH")  # functions without a definition: "f(2)" is not f times 2
_STARTS_VALUE = frozenset("( [ { [[ sqrt frac binom repeating pi infty".split()) | FUNCTIONS | GREEK


def read_value(tokens: list[str], point: int = 0) -> tuple[list[Value], int]:
    r"""Compute the values of an expression, and count its calculations.

    Args:
        tokens: the expression, from `split_tokens`.
        point: a number from 0 that chooses the values of the variables, see `variable`.

    Returns:
        the value, or two values where the tokens have a plus-minus sign; and the number of sums, products, quotients
        and the like, without fractions that are written with `frac`.

    Raises:
        Unreadable: the tokens are no mathematics that is read here, or a number on the way is too large.

    >>> from tunix_torch.rewards.math_latex import split_tokens
    >>> read_value(split_tokens("1 + 2 * 3^2")), read_value(split_tokens(r"1\frac{1}{2}"))
    (([Fraction(19, 1)], 2), ([Fraction(3, 2)], 0))
    >>> read_value(split_tokens(r"\pm 2")), read_value(split_tokens("[1, 1 + 1)"))[0][0].kind
    (([Fraction(2, 1), Fraction(-2, 1)], 0), '[)')
    >>> read_value(split_tokens("[1, 1 + 1)"))[0][0].parts[1]
    Part(value=Fraction(2, 1), is_plain=False, is_calculation=True)
    >>> read_value(split_tokens("9^9^9"))
    Traceback (most recent call last):
    tunix_torch.rewards.math_latex.Unreadable: a number of more than 4096 bits
    """
    reader = _Reader(tokens, point)
    values = reader.alternatives()
    if reader.position < len(tokens):
        raise Unreadable(f"{reader.peek()!r} where the expression should end")
    return values, reader.operations


class _Reader:
    """Computes the value of one expression while it reads it, by recursive descent through this grammar:

    union: sum ("cup" sum)*;  sum: product (("+" | "-") product)*;  product: power (("*" | "/" | nothing) power)*;
    power: atom ("!" | "°")* ("^" power)?
    """

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens = list(tokens)
        self.point = point
        self.position = self.depth = self.operations = self.bars = self.atoms = 0
        self.plus_minus = 1  # the sign that a plus-minus sign means in this reading
        self.has_plus_minus = False  # whether this reading has met a plus-minus sign
        self.in_circular = False  # whether the parser reads the argument of a function of an angle

    def peek(self) -> str:
        """The next token, or "" at the end."""
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, wanted: str | None = None) -> str:
        """Read the next token. It must be `wanted`, where that is given."""
        token = self.peek()
        if not token or wanted not in (None, token):
            raise Unreadable(f"{token!r} where {wanted or 'a value'!r} should stand")
        self.position += 1
        return token

    def accept(self, token: str) -> bool:
        """Read the next token if it is this one, and say whether it was."""
        if self.peek() != token:
            return False
        self.position += 1
        return True

    def alternatives(self) -> list[Value]:
        """Read a union; one with a plus-minus sign is read twice, and has two values."""
        start, self.has_plus_minus = self.position, False
        values = [self.union()]
        if self.has_plus_minus:
            self.position, self.plus_minus = start, -1
            values.append(self.union())
            self.plus_minus = 1
        return values

    def union(self) -> Value:
        values = [self.sum()]
        while self.accept("cup"):
            values.append(self.sum())
        if len(values) > 1 and not all(isinstance(value, Compound) for value in values):
            raise Unreadable("a union of numbers")
        return values[0] if len(values) == 1 else compound_of("cup", *values)

    def sign(self) -> int:
        token = self.take()
        if token in ("+-", "-+"):
            self.has_plus_minus = True
            return self.plus_minus if token == "+-" else -self.plus_minus
        return 1 if token == "+" else -1

    def sum(self) -> Value:
        value = self.product()
        while self.peek() in ("+", "-", "+-", "-+"):
            self.operations += 1
            sign = self.sign()
            value = add(value, multiply(Fraction(sign), self.product()))
        return value

    def product(self) -> Value:
        value = self.signed()
        while True:
            if self.accept("*"):
                value = multiply(value, self.signed())
            elif self.accept("/"):
                value = ratio(value, self.signed())
            elif self.starts_value():  # a product without a sign, as "2x" and "2(x + 1)", but not "2 3"
                value = multiply(value, self.power())
            else:
                return value
            self.operations += 1

    def starts_value(self) -> bool:
        token = self.peek()
        return token in _STARTS_VALUE or _is_letter(token) or token == "|" and not self.bars

    def signed(self) -> Value:
        sign = 1
        while self.peek() in ("+", "-", "+-", "-+"):
            sign *= self.sign()
        value = self.power()
        return value if sign == 1 else multiply(Fraction(sign), value)

    def power(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable(f"deeper than {MAX_DEPTH}")
        value = self.atom()
        while self.peek() in ("!", "°"):
            value = self.factorial(value) if self.take() == "!" else self.degrees(value)
        if self.accept("^"):
            value = power(value, self.signed())
        self.depth -= 1
        return value

    def factorial(self, value: Value) -> Value:
        self.operations += 1
        if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= MAX_FACTORIAL:
            return keep(Fraction(math.factorial(value.numerator)))
        return self.unknown("!", [value])

    def degrees(self, value: Value) -> Value:
        """A number of degrees: an angle in the argument of a function such as sin, else the plain number."""
        return multiply(value, multiply(pi(), Fraction(1, 180))) if self.in_circular else value

    def atom(self) -> Value:
        """Read a number, a variable, a pair of brackets, or a function with its argument."""
        self.atoms += 1
        if self.atoms > MAX_ATOMS:
            raise Unreadable(f"more than {MAX_ATOMS} numbers, variables and brackets")
        token = self.take()
        if token[0].isdecimal() or token[0] == "." and len(token) > 1:
            return variable(token + self.subscript(), self.point) if self.peek() == "_" else self.mixed_number(token)
        if token == "[[":
            return self.matrix()
        if token == "\\{" and self.accept("\\}"):
            return Compound("{}", ())
        if token in OPENING:
            return self.bracketed(token)
        if token == "|":
            self.bars += 1
            value = self.sum()
            self.take("|")
            self.bars -= 1
            return absolute(value)
        return self.named(token)

    def named(self, token: str) -> Value:
        """Read the rest of an atom that begins with a name: a command, a function, a constant or a variable."""
        if token == "sqrt":
            index = Fraction(2)
            if self.accept("["):
                index = self.sum()
                self.take("]")
            return root(self.atom(), index)
        if token == "frac":
            return ratio(self.argument(), self.argument())
        if token == "binom":
            self.operations += 1
            return self.choose(self.argument(), self.argument())
        if token == "repeating":
            return self.repeating_decimal()
        if token in FUNCTIONS:
            return self.function(token)
        if token == "pi":
            return pi()
        if token == "emptyset":
            return Compound("{}", ())
        if token in ("e", "i") and self.peek() != "_":
            return euler() if token == "e" else imaginary_unit()
        if token in _UNKNOWN_FUNCTIONS and self.peek() == "(" or self.applies_to_letter(token):
            self.take()
            return self.unknown(token, [part.value for part in self.until_closed("(")[0]])
        if token in GREEK or token == "infty" or _is_letter(token):
            return variable(token + self.subscript(), self.point)
        raise Unreadable(f"{token!r} where a value should stand")

    def applies_to_letter(self, token: str) -> bool:
        """Whether the tokens are a function of a letter, as p(x), which is not p times x."""
        opening, argument, closing = [*self.tokens[self.position : self.position + 3], "", "", ""][:3]
        return (_is_letter(token) or token in GREEK) and opening == "(" and _is_letter(argument) and closing == ")"

    def bracketed(self, opening: str) -> Value:
        """Read the rest of a pair of brackets: a value in brackets, a tuple, an interval or a set."""
        parts, closing = self.until_closed(opening)
        if opening == "\\{" or opening == "{" and len(parts) > 1:
            return Compound("{}", tuple(parts))
        if len(parts) == 1 and closing == OPENING[opening]:
            return parts[0].value
        if len(parts) == 1:
            raise Unreadable(f"{opening!r} closed by {closing!r}")
        return Compound("()" if opening == "<<" else opening + closing, tuple(parts))

    def part(self, read: Callable[[], list[Value]]) -> list[Part]:
        """The values that `read` reads, each with how it is written."""
        start, operations = self.position, self.operations
        values = read()
        return [as_part(value, self.tokens[start : self.position], self.operations - operations) for value in values]

    def until_closed(self, opening: str) -> tuple[list[Part], str]:
        """Read values between commas, and the closing bracket, which for "(" and "[" may be either ")" or "]"."""
        bars, self.bars = self.bars, 0
        parts: list[Part] = []
        if opening == "\\{" or opening == "{" and self.has_comma_before("}"):
            plus_minus = self.plus_minus, self.has_plus_minus  # each plus-minus sign in a set makes two elements
            self.plus_minus = 1
            while not parts or self.accept(","):
                parts.extend(self.part(self.alternatives))
            self.plus_minus, self.has_plus_minus = plus_minus
        else:
            while not parts or self.accept(","):
                parts.extend(self.part(lambda: [self.union()]))
        self.bars = bars
        if len(parts) > MAX_VALUES:
            raise Unreadable(f"more than {MAX_VALUES} values")
        closing = self.take()
        if closing not in ((")", "]") if opening in ("(", "[") else (OPENING[opening],)):
            raise Unreadable(f"{opening!r} closed by {closing!r}")
        return parts, closing

    def has_comma_before(self, closing: str) -> bool:
        """Whether a comma follows, outside of further brackets, before the closing bracket."""
        depth = 0
        for token in self.tokens[self.position :]:
            if depth == 0 and token in (",", closing):
                return token == ","
            depth += (token in OPENING) - (token in CLOSING)
        return False

    def matrix(self) -> Compound:
        """Read the rest of a matrix after its opening bracket."""
        rows: list[list[Part]] = [[]]
        while True:
            rows[-1].extend(self.part(lambda: [self.sum()]))
            separator = self.take()
            if separator == ";;" and self.peek() != "]]":
                rows.append([])
            elif separator == "]]" or separator == ";;" and self.accept("]]"):
                return compound_of("matrix", *(Compound("row", tuple(row)) for row in rows))
            elif separator != "&":
                raise Unreadable(f"{separator!r} in a matrix")

    def argument(self) -> Value:
        r"""Read one argument of \frac: an expression in braces, or a single digit or letter."""
        token = self.peek()
        if token.isdecimal() and len(token) > 1:  # \frac12 is one half
            self.tokens[self.position : self.position + 1] = [token[0], token[1:]]
        elif token != "{" and not token.isdecimal() and not _is_letter(token) and token != "pi":
            raise Unreadable("an argument without braces")
        return self.atom()

    def subscript(self) -> str:
        """Read the subscript of a variable, or of a number in another base, as a part of its name."""
        if not self.accept("_"):
            return ""
        if not self.accept("{"):
            return "_" + self.take()
        end = self.tokens.index("}", self.position) if "}" in self.tokens[self.position :] else len(self.tokens)
        name = "_" + "".join(self.tokens[self.position : end])
        self.position = end
        self.take("}")
        return name

    def mixed_number(self, token: str) -> Fraction:
        r"""The number `token` plus a fraction right after it: "1 1/2" and "1\frac{1}{2}" are 3/2."""
        after = " ".join(self.tokens[self.position : self.position + 7])
        written = re.match(r"([0-9]+) / ([0-9]+)(?= |$)", after)
        written = written or re.match(r"frac (?:\{ )?([0-9]+)(?: \})? (?:\{ )?([0-9]+)(?: \})?(?= |$)", after)
        written = written or re.match(r"frac ([0-9])([0-9])(?= |$)", after)
        if written and token.isdecimal() and int(written[1]) < int(written[2]):
            self.position += written[0].count(" ") + 1
            return keep(_to_fraction(token) + Fraction(int(written[1]), int(written[2])))
        return keep(_to_fraction(token))

    def repeating_decimal(self) -> Fraction:
        """Read {whole part}{decimals}{repeating decimals}, any of which but the last may be empty."""
        parts = []
        for _ in range(3):
            self.take("{")
            parts.append("" if self.peek() == "}" else self.take())
            self.take("}")
        whole, start, period = parts
        fixed = Fraction(int(whole + start or 0), 10 ** len(start))
        return keep(fixed + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(start)))

    def choose(self, n: Value, k: Value) -> Value:
        """The binomial coefficient, or the value of an unknown function where n or k is no small whole number."""
        whole = all(isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= MAX_FACTORIAL for x in (n, k))
        return Fraction(math.comb(n.numerator, k.numerator)) if whole else self.unknown("binom", [n, k])

    def unknown(self, name: str, arguments: list[Value]) -> Fraction:
        """A value for an unknown function, which depends on its name and its arguments only."""
        if any(isinstance(argument, Compound) for argument in arguments):
            raise Unreadable(f"{name!r} of several values at once")
        texts = map(digits_of, arguments)
        return variable(f"{name}({','.join(texts)})", self.point)

    def function(self, name: str) -> Value:
        """Read the rest of a function after its name: its base, its exponent and its argument."""
        exponent = base = None
        if name == "log" and self.accept("_"):
            base = self.argument()
        if self.accept("^"):
            exponent = self.atom()  # as in \sin^2 x
            if not isinstance(exponent, Fraction) or exponent < 1:  # \sin^{-1} means the inverse function
                raise Unreadable(f"{name}^{exponent}")
        outside, self.in_circular = self.in_circular, name in _CIRCULAR
        is_bracketed = self.peek() in ("(", "{", "[")
        argument = self.power() if not is_bracketed else self.atom()
        while not is_bracketed and (self.peek() == "pi" or _is_letter(self.peek())):
            argument = multiply(argument, self.power())  # as in \sin 2x
        self.in_circular = outside
        value = apply(name, argument)
        if base is not None:
            value = ratio(apply("ln", argument), apply("ln", base))
        return value if exponent is None else power(value, exponent)


def _is_letter(token: str) -> bool:
    return len(token) == 1 and token.isascii() and token.isalpha()


def _to_fraction(token: str) -> Fraction:
    return Fraction(token.replace(",", ""))
