"""Checks that every row has the columns that reward functions take, before the first of them is called."""

import itertools
from collections.abc import Sequence

import datasets

from ..data.batches import PromptStream
from ..data.rows import ANSWER, NO_ANSWER, PREFIX, WHERE, Row
from .scoring import RewardFunc, require_columns, required_columns


def check_columns(
    functions: Sequence[RewardFunc],
    rows: "Sequence[Row] | datasets.Dataset | PromptStream",
    what: str = "reward function",
) -> None:
    """Check that every row has the columns that the functions take. A stream is checked only as they are called.

    Args:
        rows: rows from `prepare_rows`.
        what: what the functions are, for error messages.

    Raises:
        ValueError: see `require_columns`.
    """
    if isinstance(rows, PromptStream):
        return
    names = None
    if isinstance(rows, datasets.Dataset):
        names = [name for name in rows.column_names if not name.startswith(PREFIX)]
        needed = {WHERE, NO_ANSWER, ANSWER}.union(*map(required_columns, functions))
        tables = rows.select_columns([name for name in rows.column_names if name in needed]).with_format("arrow")
        rows = itertools.chain.from_iterable(table.to_pylist() for table in tables.iter(1000))
    require_columns(functions, rows, what, names)
