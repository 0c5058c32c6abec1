"""What reward functions are called, and the numbers that they return, whatever kind of sequence holds these."""

import functools
from collections.abc import Callable, Mapping, Set
from typing import Any

# How the note begins that every error has which was raised while functions, models or the judge scored completions.
RAISED_BY_REWARDS = "Raised while scoring: "


def is_of_rewards(error: Exception) -> bool:
    """Whether an error was raised while completions were scored."""
    return any(note.startswith(RAISED_BY_REWARDS) for note in getattr(error, "__notes__", ()))


class CompletionError(ValueError):
    """One completion can't be judged. Whoever called the reward function knows the row and adds its name.

    Args:
        number: which completion of the call it is, from 0.
        message: what is wrong, and what would be right, in one line.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)
        self.number, self.message = number, message

    def __str__(self) -> str:
        return self.message


class WholeCallError(ValueError):
    """A call failed as a whole: it took too long, its process died, a server refuses all of its requests, or what it
    returned has no value for each completion.

    The function is not called again only to find a completion that is to blame.
    """


def name_of(function: Callable[..., Any] | str) -> str:
    """The name of a reward function.

    A `functools.partial` has its function's name, an object the name of its class, and the name of a reward model that
    is not loaded yet, "organisation/model", its last part.
    """
    if isinstance(function, str):
        return function.rstrip("/").rpartition("/")[2]
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def numbers_of(function: Callable[..., Any], values: Any, count: int) -> list[float | None]:
    """The values that a reward function returned for so many completions, as floats and None.

    Args:
        values: a sequence of numbers, bools, tensors of one number, or None; or a tensor or array of one dimension.

    Raises:
        WholeCallError: `values` is something else, such as a text or a dict, or holds more or fewer. The characters or
            keys of a text or dict are no rewards, even where they could be read as numbers.
        ValueError: one of them is no number.
    """
    given, returned = values, f"reward function {name_of(function)!r} returned"
    hint = "expected numbers, one for each completion, in a list, a tensor or an array"
    try:
        if isinstance(values, str | bytes | bytearray | Mapping | Set):
            raise TypeError(f"a {type(values).__name__}")
        if callable(getattr(values, "tolist", None)):
            values = values.tolist()  # a tensor leaves its device at once, and not number by number
        values = list(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WholeCallError(f"{returned} {_shown(given)}: {hint}") from error
    if len(values) != count:
        counts = f"{counted(len(values), 'value')} for {counted(count, 'completion')}"
        raise WholeCallError(f"{returned} {counts}; expected one for each")
    try:
        return [None if value is None else _number(value) for value in values]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{returned} {_shown(given)}: {hint}") from error


def counted(number: int, what: str) -> str:
    """A number of things in words, such as "1 value" or "2 values"."""
    return f"{number} {what}{'s' * (number != 1)}"


def _shown(returned: Any) -> str:
    return " ".join(repr(returned).split())[:80]


def _number(value: Any) -> float:
    if isinstance(value, str | bytes | bytearray):
        raise TypeError(f"a {type(value).__name__}")
    return float(value)
