"""What is kept of training rows: a word that changes with them, and whether their questions are messages."""

import datetime
import decimal
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch

from .batches import PromptStream
from .packs import PackedRows, PackedStream
from .rows import NO_ANSWER, TURNS, WHERE, Row

MOST_ROWS = 100_000  # of larger data sets so many rows are read, spread evenly over all of them


def fingerprint_of(rows: Any) -> str | None:
    """The number of training rows and a hash of their columns and tokens, in their order.

    Of a stream these are its first rows, as many as it reads at once; they are not lost to the run. Where a row stands,
    such as the name of its file, does not count.

    Args:
        rows: what the trainer trains on, after `prepare_rows`; None: it only evaluates.
    """
    rows = _unpacked(rows)
    if rows is None:
        return None
    if isinstance(rows, PromptStream):
        first = rows.first_rows()
        return f"a stream that begins with {_hash(first)}"
    if isinstance(rows, datasets.Dataset):
        rows = rows.with_format(None)
    return f"{len(rows)} rows, {_hash(_spread(rows))}"


def are_messages(rows: Any) -> bool:
    """Whether the questions of training rows are messages, by the first of the rows; `rows` as for `fingerprint_of`."""
    rows = _unpacked(rows)
    first = rows.first_rows()[:1] if isinstance(rows, PromptStream) else rows and [rows[0]]
    return any(row.get(TURNS) for row in first or ())


def _unpacked(rows: Any) -> Any:
    return rows.rows if isinstance(rows, PackedRows | PackedStream) else rows


def _spread(rows: Sequence[Row] | datasets.Dataset) -> list[Row] | Sequence[Row] | datasets.Dataset:
    """At most `MOST_ROWS` rows, the first among them, at equal distances."""
    step = -(-len(rows) // MOST_ROWS)
    if step <= 1:
        return rows
    numbers = range(0, len(rows), step)
    return rows.select(numbers) if isinstance(rows, datasets.Dataset) else [rows[i] for i in numbers]


def _hash(rows: Sequence[Row] | datasets.Dataset) -> str:
    total = hashlib.sha256()
    for row in rows:
        columns = sorted((name, value) for name, value in row.items() if name not in (WHERE, NO_ANSWER))
        total.update(json.dumps(columns, default=_plain, skipkeys=True).encode())
    return total.hexdigest()[:12]


def _plain(value: Any) -> Any:
    """A value that JSON does not know as one that it does. Of other objects, such as pictures, only the type counts."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return type(value).__name__
