"""Reads mathematical answers, such as lists, points, sets, intervals and equations with units, and compares them."""

import re
from fractions import Fraction
from typing import NamedTuple

from .math_latex import CLOSING, OPENING, SCALE, UNIT, Unreadable, split_tokens
from .math_numbers import Compound, Part, Value, add, compound_of, match_all, multiply, ratio, same_part, same_value
from .math_value import MAX_VALUES, read_value
from .math_written import as_part, variable
from .units import FUNCTIONS, GREEK, SCALES, normalise_unit, units_agree

# An equation is known by how the difference of its sides at one point relates to that at this point, because this
# ratio is the same for every multiple of the equation.
REFERENCE = 99

_TURNED = {">": "<", ">=": "<="}
_RELATIONS = frozenset(("=", "<", "<=", ">", ">=", "!=", "in"))
_CURRENCIES = frozenset("$€£")
# The left side of a solved equation: x, x_1, f(x), P(A), p(x), AB or (x,y).
_NAME = re.compile(
    rf"(?:[a-zA-Z]|{'|'.join(sorted(GREEK))})(?:_[a-zA-Z0-9]+)?|[A-Z]{{2,3}}|[fghA-Z]\([a-zA-Z0-9,]+\)"
    r"|[a-df-hj-z]\([a-zA-Z]\)"
    r"|\([a-zA-Z](?:,[a-zA-Z])+\)"
)


class Item(NamedTuple):
    """One of the values of an answer."""

    part: Part
    name: str = ""  # the name that the answer gives to the value: "x" in "x = 5"
    unit: tuple[str, ...] = ()  # the words of its unit, normalised
    equation: Value = None  # the equation that the value comes from, if any

    @property
    def value(self) -> Value:
        return self.part.value


def read_items(text: str, point: int = 0) -> list[Item]:
    r"""The values that an answer states.

    Args:
        text: the answer from `simplify_latex`.
        point: a number from 0 that chooses the values of the variables, see `variable`.

    Raises:
        Unreadable: the text is no mathematics that is read here, or is too large.

    >>> [(item.name, item.value) for item in read_items("x = 5, x = 1/2")]
    [('x', Fraction(5, 1)), ('x', Fraction(1, 2))]
    >>> [(item.value, item.unit, item.part.is_calculation) for item in read_items("47 + 38 cm")]
    [(Fraction(85, 1), ('cm',), True)]
    """
    pieces = _split(split_tokens(text), {","})
    if len(pieces) > MAX_VALUES:
        raise Unreadable(f"more than {MAX_VALUES} values")
    items = [item for piece, _ in pieces for item in _read_piece(piece, point)]
    if len(items) == 1 and isinstance(items[0].value, Compound) and items[0].value.kind == "{}":
        return [Item(part) for part in items[0].value.parts]
    if len(items) > 1 and all(item.name == items[0].name != "" and _is_interval(item.value) for item in items):
        return [Item(Part(compound_of("cup", *(item.value for item in items))), items[0].name)]  # x < -1 or x > 1
    return items


def agree(given: list[Item], expected: list[Item]) -> bool:
    r"""Whether two answers state the same values. Their order counts only where just one answer names its values.

    >>> agree(read_items("2, 1"), read_items("1, 2")), agree(read_items("(2, 1)"), read_items("(1, 2)"))
    (True, False)
    >>> agree(read_items("2, 1"), read_items("x = 1, y = 2")), agree(read_items("47 + 38"), read_items("85"))
    (False, False)
    """
    names = [{item.name for item in items} for items in (given, expected)]
    if any(len(several - {""}) > 1 for several in names) and {""} in names:
        return len(given) == len(expected) and all(map(_same_item, given, expected))
    return match_all(tuple(given), tuple(expected), _same_item)


def _is_interval(value: Value) -> bool:
    return isinstance(value, Compound) and value.kind in ("()", "(]", "[)", "[]") and len(value.parts) == 2


def _same_item(given: Item, expected: Item) -> bool:
    if given.name and expected.name and given.name != expected.name:
        return False
    if not units_agree(given.unit, expected.unit):
        return False
    is_equation = isinstance(expected.value, Compound) and expected.value.kind == "equation"
    if is_equation and given.equation is not None:
        return same_value(given.equation, expected.value)
    return same_part(given.part, expected.part)


def _split(tokens: list[str], separators: frozenset[str] | set[str]) -> list[tuple[list[str], str]]:
    """The parts between those separators that stand outside all brackets, each with the separator before it."""
    parts: list[tuple[list[str], str]] = [([], "")]
    depth = 0
    for token in tokens:
        depth += (token in OPENING) - (token in CLOSING)
        if token in separators and depth == 0:
            parts.append(([], token))
        else:
            parts[-1][0].append(token)
    return parts


def _read_piece(tokens: list[str], point: int) -> list[Item]:
    """The values of one part of an answer: an expression, an equation or an inequality."""
    tokens, unit, scale = _take_unit(tokens)
    sides = _split(tokens, _RELATIONS)
    if len(sides) == 1:
        return _read_side(tokens, point, "", unit, scale)
    relations = [relation for _, relation in sides[1:]]
    parts = [part for part, _ in sides]
    if set(relations) == {"="}:
        return _read_equation(parts, point, unit, scale)
    if scale != 1:
        raise Unreadable("a scale in a relation")
    if relations == ["in"] and (name := _name_of(parts[0])):
        return _read_side(parts[1], point, name)
    return [_read_inequality(parts, relations, point)]


def _read_side(tokens: list[str], point: int, name: str = "", unit: tuple[str, ...] = (), scale: int = 1) -> list[Item]:
    values, operations = read_value(tokens, point)
    parts = [as_part(value, tokens, operations) for value in values]
    if scale != 1:
        parts = [part._replace(value=multiply(part.value, Fraction(scale))) for part in parts]
    return [Item(part, name, unit) for part in parts]


def _read_equation(sides: list[list[str]], point: int, unit: tuple[str, ...], scale: int) -> list[Item]:
    if len(sides) == 2 and not _name_of(sides[0]) and _name_of(sides[1]):
        sides = sides[::-1]  # "5 = x" is read as "x = 5"
    equation = None
    if len(sides) == 2 and scale == 1:
        try:
            equation = compound_of("equation", ratio(_difference(sides, point), _difference(sides, REFERENCE)))
        except Unreadable:  # the sides have no difference, as in "(x, y) = (1, 2)", or it is 0, as in "5 = 5"
            equation = None
    name = _name_of(sides[0])
    if not name and equation is not None and not same_value(equation.parts[0].value, Fraction(1)):
        return [Item(Part(equation), equation=equation)]
    steps = [read_value(side, point)[0] for side in sides[1 if name else 0 :]]
    if any(len(step) != len(steps[-1]) or not all(map(same_value, steps[-1], step)) for step in steps):
        raise Unreadable("the sides of an equation are not equal")
    name = name or "".join(sides[0])  # the name is "cos(0)" in "cos(0) = 1"
    return [item._replace(equation=equation) for item in _read_side(sides[-1], point, name, unit, scale)]


def _difference(sides: list[list[str]], point: int) -> Value:
    """The left side of an equation minus the right one."""
    left, right = _one_part_each(sides, point)
    return add(left.value, multiply(Fraction(-1), right.value))


def _one_part_each(sides: list[list[str]], point: int) -> list[Part]:
    """The value of each side of a relation; a side with a plus-minus sign has two, and raises Unreadable."""
    parts = []
    for side in sides:
        values, operations = read_value(side, point)
        if len(values) > 1:
            raise Unreadable("a plus-minus sign in a relation")
        parts.append(as_part(values[0], side, operations))
    return parts


def _read_inequality(sides: list[list[str]], relations: list[str], point: int) -> Item:
    """An interval for "x > 5" and "0 <= x < 1"; for other inequalities the values of the sides from small to large."""
    if all(relation in _TURNED for relation in relations):
        sides, relations = sides[::-1], [_TURNED[relation] for relation in reversed(relations)]
    elif "in" in relations or len({relation[0] for relation in relations}) > 1:
        raise Unreadable(f"the relations {relations}")
    names = [_name_of(side) for side in sides]
    parts = _one_part_each(sides, point)
    infinity = variable("infty", point)
    if relations[0] != "!=" and len(sides) == 2 and bool(names[0]) != bool(names[1]):
        if names[0]:
            return Item(Part(Compound("(]" if relations[0] == "<=" else "()", (Part(-infinity), parts[1]))), names[0])
        return Item(Part(Compound("[)" if relations[0] == "<=" else "()", (parts[0], Part(infinity)))), names[1])
    if len(sides) == 3 and names[1] and not names[0] and not names[2]:
        brackets = ("[" if relations[0] == "<=" else "(") + ("]" if relations[1] == "<=" else ")")
        return Item(Part(Compound(brackets, (parts[0], parts[2]))), names[1])
    return Item(Part(Compound(" ".join(relations), tuple(parts))))


def _name_of(tokens: list[str]) -> str:
    """The name that a side of an equation consists of, or "" where it is no name."""
    written = "".join(tokens).replace("{", "").replace("}", "")
    return written if _NAME.fullmatch(written) and written not in ("e", "i") else ""


def _take_unit(tokens: list[str]) -> tuple[list[str], tuple[str, ...], int]:
    """The tokens without a unit and a scale word, the unit before or after them, and the factor of the scale word."""
    before = next((i for i, token in enumerate(tokens[:-1]) if token in _CURRENCIES), None)
    words = [] if before is None else [tokens[before]]
    tokens = tokens if before is None else tokens[:before] + tokens[before + 1 :]
    end = len(tokens)
    # After a function, "°" is no unit of the answer: in "sin 15°" it belongs to the angle.
    signs = _CURRENCIES | ({"%", "°"} if FUNCTIONS.isdisjoint(tokens) else {"%"})
    while end and (tokens[end - 1].startswith(UNIT) or tokens[end - 1] in signs):
        end -= 2 if end > 1 and tokens[end - 2] == "/" else 1
    words += [token.removeprefix(UNIT) for token in tokens[end:] if token != "/"]
    scale = 1
    if end and tokens[end - 1].startswith(SCALE):
        scale, end = SCALES[tokens[end - 1].removeprefix(SCALE)], end - 1
    if not end:
        raise Unreadable("no value")
    return tokens[:end], normalise_unit(words), scale
