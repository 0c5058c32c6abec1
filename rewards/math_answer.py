r"""Read whole mathematical answers and compare them: values, lists, points, sets, intervals, equations, with units."""

import re
from fractions import Fraction
from typing import NamedTuple

from rewards.math_latex import CLOSING, OPENING, SCALE, UNIT, Unreadable, split_tokens
from rewards.math_numbers import Group, Value, add, match_all, multiply, ratio, same_value
from rewards.math_value import MAX_VALUES, read_value, variable
from rewards.units import FUNCTIONS, GREEK, SCALES, normalise_unit, units_agree

REFERENCE = 99  # the point at which the two sides of an equation are compared with those at another point

_TURNED = {">": "<", ">=": "<="}
_RELATIONS = frozenset(("=", "<", "<=", ">", ">=", "!=", "in"))
_CURRENCIES = frozenset("$€£")
_INTEGER, _NUMBER = r"[0-9]+(?:,[0-9]{3})*", r"(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)"
_FRACTION = re.compile(rf"\{{?{_NUMBER}\}}?/\{{?{_NUMBER}\}}?|frac\{{?{_INTEGER}\}}?\{{?{_INTEGER}\}}?")
_PLAIN_NUMBER = re.compile(
    rf"{_NUMBER}|(?:{_INTEGER})?(?:{_FRACTION.pattern})|{_NUMBER}\*10\^(?:\{{-?[0-9]+\}}|-?[0-9]+)|repeating.*"
)
_BRACKETED = re.compile(r"\([^()]*\)")
# What is before the "=" of a solved equation: x, x_1, f(x), P(A), AB, (x,y).
_NAME = re.compile(
    rf"(?:[a-zA-Z]|{'|'.join(sorted(GREEK))})(?:_[a-zA-Z0-9]+)?|[A-Z]{{2,3}}|[fghA-Z]\([a-zA-Z0-9,]+\)"
    r"|\([a-zA-Z](?:,[a-zA-Z])+\)"
)


class Item(NamedTuple):
    """One of the values of an answer."""

    value: Value
    name: str = ""  # "x" of "x = 5"
    unit: tuple[str, ...] = ()
    is_plain: bool = False  # a number without any calculation, or a fraction
    is_calculation: bool = False  # a calculation that is still to be done
    equation: Value = None  # the whole equation


def read_items(text: str, point: int = 0) -> list[Item]:
    r"""The values that `text`, from `simplify_latex`, states; its variables have the values that belong to `point`.

    Raises:
        Unreadable: the text is not mathematics that is read here, or too large.

    >>> [(item.name, item.value) for item in read_items("x = 5, x = 1/2")]
    [('x', Fraction(5, 1)), ('x', Fraction(1, 2))]
    >>> [(item.value, item.unit, item.is_calculation) for item in read_items("47 + 38 cm")]
    [(Fraction(85, 1), ('cm',), True)]
    """
    pieces = _split(split_tokens(text), {","})
    if len(pieces) > MAX_VALUES:
        raise Unreadable(f"more than {MAX_VALUES} values")
    items = [item for piece, _ in pieces for item in _read_piece(piece, point)]
    if len(items) == 1 and isinstance(items[0].value, Group) and items[0].value.kind == "{}":
        return [Item(value) for value in items[0].value.values]
    if len(items) > 1 and all(item.name == items[0].name != "" and _is_interval(item.value) for item in items):
        return [Item(Group("cup", tuple(item.value for item in items)), items[0].name)]  # x < -1 or x > 1
    return items


def agree(given: list[Item], expected: list[Item]) -> bool:
    r"""Whether two answers state the same: the order does not count, unless only one of them names its values.

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
    return isinstance(value, Group) and value.kind in ("()", "(]", "[)", "[]") and len(value.values) == 2


def _same_item(given: Item, expected: Item) -> bool:
    if given.name and expected.name and given.name != expected.name:
        return False
    if expected.is_plain and given.is_calculation or not units_agree(given.unit, expected.unit):
        return False
    is_equation = isinstance(expected.value, Group) and expected.value.kind == "equation"
    if is_equation and given.equation is not None:
        return same_value(given.equation, expected.value)
    return same_value(given.value, expected.value)


def _split(tokens: list[str], separators: frozenset[str] | set[str]) -> list[tuple[list[str], str]]:
    """The parts between separators that are in no bracket, each with the separator before it."""
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
    written = "".join(tokens).lstrip("+-")
    written = written[1:-1] if _BRACKETED.fullmatch(written) else written
    is_plain = _PLAIN_NUMBER.fullmatch(written) is not None
    is_whole = isinstance(values[0], Fraction) and values[0].denominator == 1
    is_division = is_plain and is_whole and _FRACTION.fullmatch(written) is not None  # "84/7" for 12
    calculates = operations > 0 and not is_plain or is_division
    if scale != 1:
        values = [multiply(value, Fraction(scale)) for value in values]
    return [Item(value, name, unit, is_plain, calculates) for value in values]


def _read_equation(sides: list[list[str]], point: int, unit: tuple[str, ...], scale: int) -> list[Item]:
    if len(sides) == 2 and not _name_of(sides[0]) and _name_of(sides[1]):
        sides = sides[::-1]  # 5 = x
    equation = None
    if len(sides) == 2 and scale == 1:
        try:
            equation = Group("equation", (ratio(_difference(sides, point), _difference(sides, REFERENCE)),))
        except Unreadable:  # "(x, y) = (1, 2)", or "5 = 5"
            equation = None
    name = _name_of(sides[0])
    if not name and equation is not None and not same_value(equation.values[0], Fraction(1)):
        return [Item(equation, equation=equation)]
    steps = [read_value(side, point)[0] for side in sides[1 if name else 0 :]]
    if any(len(step) != len(steps[-1]) or not all(map(same_value, step, steps[-1])) for step in steps):
        raise Unreadable("the sides of an equation are not equal")
    name = name or "".join(sides[0])  # cos(0) of "cos(0) = 1"
    return [item._replace(equation=equation) for item in _read_side(sides[-1], point, name, unit, scale)]


def _difference(sides: list[list[str]], point: int) -> Value:
    left, right = _one_value_each(sides, point)
    return add(left, multiply(Fraction(-1), right))


def _one_value_each(sides: list[list[str]], point: int) -> list[Value]:
    values = [read_value(side, point)[0] for side in sides]
    if any(len(alternatives) > 1 for alternatives in values):
        raise Unreadable("a plus-minus sign in a relation")
    return [alternatives[0] for alternatives in values]


def _read_inequality(sides: list[list[str]], relations: list[str], point: int) -> Item:
    """An interval for "x > 5" and "0 <= x < 1", else the values of the sides in their order from small to large."""
    if all(relation in _TURNED for relation in relations):
        sides, relations = sides[::-1], [_TURNED[relation] for relation in reversed(relations)]
    elif "in" in relations or len({relation[0] for relation in relations}) > 1:
        raise Unreadable(f"the relations {relations}")
    names = [_name_of(side) for side in sides]
    values = _one_value_each(sides, point)
    infinity = variable("infty", point)
    if relations[0] != "!=" and len(sides) == 2 and bool(names[0]) != bool(names[1]):
        if names[0]:
            return Item(Group("(]" if relations[0] == "<=" else "()", (-infinity, values[1])), names[0])
        return Item(Group("[)" if relations[0] == "<=" else "()", (values[0], infinity)), names[1])
    if len(sides) == 3 and names[1] and not names[0] and not names[2]:
        brackets = ("[" if relations[0] == "<=" else "(") + ("]" if relations[1] == "<=" else ")")
        return Item(Group(brackets, (values[0], values[2])), names[1])
    return Item(Group(" ".join(relations), tuple(values)))


def _name_of(tokens: list[str]) -> str:
    written = "".join(tokens).replace("{", "").replace("}", "")
    return written if _NAME.fullmatch(written) and written not in ("e", "i") else ""


def _take_unit(tokens: list[str]) -> tuple[list[str], tuple[str, ...], int]:
    """The tokens without the unit before or after them, the unit, and the scale between the two."""
    before = next((i for i, token in enumerate(tokens[:-1]) if token in _CURRENCIES), None)
    words = [] if before is None else [tokens[before]]
    tokens = tokens if before is None else tokens[:before] + tokens[before + 1 :]
    end = len(tokens)
    signs = _CURRENCIES | ({"%", "°"} if FUNCTIONS.isdisjoint(tokens) else {"%"})  # the sine is of 15 degrees
    while end and (tokens[end - 1].startswith(UNIT) or tokens[end - 1] in signs):
        end -= 2 if end > 1 and tokens[end - 2] == "/" else 1
    words += [token.removeprefix(UNIT) for token in tokens[end:] if token != "/"]
    scale = 1
    if end and tokens[end - 1].startswith(SCALE):
        scale, end = SCALES[tokens[end - 1].removeprefix(SCALE)], end - 1
    if not end:
        raise Unreadable("no value")
    return tokens[:end], normalise_unit(words), scale
