"""Finds the expected answer among the columns of a row, and converts it to a text or a number."""

import datetime
import math
import numbers
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from .rows import ANSWER_COLUMNS, Row


def answer_in(row: Row, choices: Sequence[tuple[str, str]]) -> tuple[Any, str | None]:
    """Find the value that a row gives as its answer.

    Args:
        row: a row with the standard column names.
        choices: the row's choices. Where there are some, `answerKey` is looked at before the other columns.

    Returns:
        the answer as a text or a number, or None where there is none, and the name of its column, or None where the
        answer comes from the \\boxed{...} of a MATH solution.

    Raises:
        ValueError: the value is neither a text nor a number nor a date, or is a list of several values.
    """
    names = ("answerKey", *ANSWER_COLUMNS) if choices else (*ANSWER_COLUMNS, "answerKey")
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None and row.get("problem") is not None and row.get("solution") is not None:
        answer = last_boxed(str(row["solution"]))
    else:
        answer = None if name is None else row[name]
    if hasattr(answer, "tolist") and not isinstance(answer, np.generic):  # an array of NumPy, or a tensor
        array = np.asarray(answer)
        answer = list(array) if array.ndim else array[()]
    if isinstance(answer, list | tuple):
        if len(answer) != 1:
            raise ValueError(f"{len(answer)} answers; expected one")
        answer = answer[0]
    return _as_text_or_number(answer), name


def _as_text_or_number(answer: Any) -> Any:
    """The answer as reward functions take it. A date or a time becomes its ISO text.

    Raises:
        ValueError: the answer is neither a text nor a finite real number nor a date.
    """
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, datetime.date | datetime.time | np.datetime64):
        if answer != answer:
            raise ValueError("the answer is NaT, which is no date")
        text = str(answer) if isinstance(answer, np.datetime64) else answer.isoformat()
        # NumPy writes all nine digits of a fraction of a second, so zeros at the end are cut.
        return text.rstrip("0").rstrip(".") if isinstance(answer, np.datetime64) and "." in text else text
    if isinstance(answer, np.bool_):
        return bool(answer)
    # NumPy counts a timedelta64 among its integers.
    if not isinstance(answer, numbers.Real | Decimal) or isinstance(answer, np.timedelta64):
        raise ValueError(f"the answer is a {type(answer).__name__}, expected a text or a number")
    if not isinstance(answer, numbers.Rational) and not math.isfinite(answer):
        raise ValueError(f"the answer is {answer}, which is no finite number")
    return answer


def json_value(value: Any) -> Any:
    """Convert a value that JSON can't hold: NumPy's numbers to Python's (0.1 in float32 to 0.1), others to texts."""
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else str(value)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...}, \\fbox{...} or `\\boxed 2` of a LaTeX text, or None where there is none."""
    found = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*", text)]
    if not found:
        return None
    rest = text[found[-1] :]
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip()
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are printed braces and enclose nothing
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0 and match.group() == "}":
            return rest[1 : match.start()]
    return None
