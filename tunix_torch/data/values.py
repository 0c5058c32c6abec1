"""Converts values of a data set to what a reader of the data means: names of classes, and short decimal numbers.

`datasets` and Arrow store a class as its number, and 0.1 in float32 as 0.10000000149011612.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow

from .rows import Row


def features_to_convert(features: dict[str, Any]) -> dict[str, Any]:
    """The features of a data set, by column, whose values `plain_row` converts."""

    def is_converted(feature: Any) -> bool:
        if isinstance(feature, dict):
            return any(map(is_converted, feature.values()))
        if isinstance(feature, datasets.List | datasets.LargeList):
            return is_converted(feature.feature)
        if isinstance(feature, datasets.Value):
            return feature.dtype in ("float32", "float16")
        return isinstance(feature, datasets.ClassLabel)

    return {name: feature for name, feature in features.items() if is_converted(feature)}


def plain_row(row: Row, features: dict[str, Any]) -> Row:
    """A copy of the row in which numbers of classes became the classes' names, and 0.1 in float32 became the float 0.1.

    Args:
        features: from `features_to_convert`. Columns without a feature keep their values.
    """

    def plain(value: Any, feature: Any) -> Any:
        if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
            return feature.int2str(value) if value >= 0 else None
        if isinstance(feature, datasets.Value) and feature.dtype in ("float32", "float16") and value is not None:
            return float(str(np.dtype(feature.dtype).type(value)))
        if isinstance(feature, dict) and isinstance(value, dict):
            return {name: plain(part, feature.get(name)) for name, part in value.items()}
        if isinstance(feature, datasets.List | datasets.LargeList) and isinstance(value, list):
            return [plain(part, feature.feature) for part in value]
        return value

    return row | {name: plain(row[name], feature) for name, feature in features.items() if name in row}


def rows_of_arrow(batches: Iterable[pyarrow.RecordBatch], schema: pyarrow.Schema) -> Iterator[Row]:
    """Rows of Arrow batches, with values as `plain_row` converts them.

    Raises:
        pyarrow.ArrowInvalid: a column's name is there twice, a batch or the description of a column is damaged, or
            Python can't hold a value. Without the check, reading values of a damaged batch would end the process.
    """
    twice = [name for name in dict.fromkeys(schema.names) if schema.names.count(name) > 1]
    if twice:
        raise pyarrow.ArrowInvalid(f"the column {twice[0]!r} is there {schema.names.count(twice[0])} times")
    features = {}
    for field in schema:
        try:
            datasets.Features.from_arrow_schema(pyarrow.schema([field]))
        except ValueError:  # `datasets` doesn't know this type, so it is neither a class nor a number
            continue
        try:
            features |= datasets.Features.from_arrow_schema(pyarrow.schema([field], schema.metadata))
        except Exception as error:  # the description is JSON in the file, of which `datasets` checks nothing
            raise pyarrow.ArrowInvalid(f"the description of the column {field.name!r} is damaged: {error}") from error
    to_convert = features_to_convert(features)
    for batch in batches:
        batch.validate(full=True)
        try:
            rows = [plain_row(row, to_convert) for row in batch.to_pylist()]
        except (OverflowError, ValueError) as error:  # a date beyond the year 9999, the number of no class
            raise pyarrow.ArrowInvalid(f"a value can't be read: {error}") from error
        yield from rows
