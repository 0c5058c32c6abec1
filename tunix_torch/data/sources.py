"""Training and evaluation rows: those that a job's settings name, and those that a caller passes to the trainer.

`load_data` and `load_eval_rows` read what the settings name; `training_rows` and `evaluation_rows` accept data sets of
many types.
"""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import torch

from ..config.data import DataConfig
from ..config.settings import require
from ..model import tiny
from .readers import load_rows, stream_rows
from .rows import QUESTION, Row
from .shapes import normalize_row

NUM_GENERATED_ROWS = 4096  # training rows of arithmetic, unless num_train_rows says otherwise
SHUFFLE_BUFFER = 1000  # so many rows of a stream are kept in memory, and one of them is drawn at random


@dataclass(frozen=True)
class KnownDataset:
    """Where a data set that `--dataset` knows is found: (name, configuration) at each source, or None where it is not.

    `shapes.COLUMNS` has the columns of its rows.
    """

    huggingface: tuple[str, str | None]
    tfds: tuple[str, str | None] | None


KNOWN = {
    "gsm8k": KnownDataset(("openai/gsm8k", "main"), ("gsm8k", None)),
    "math": KnownDataset(("DigitalLearningGmbH/MATH-lighteval", None), None),
    "arc": KnownDataset(("allenai/ai2_arc", "ARC-Challenge"), ("ai2_arc", "ARC-Challenge")),
}


# ---- rows that a job's settings name ----


def load_data(
    config: DataConfig,
    seed: int,
    check_first: Callable[[Row], object] | None = None,
    supervised: bool = False,
) -> tuple[list[Row] | datasets.IterableDataset, list[Row]]:
    """Load the training and the evaluation rows of a job.

    Without `data_path` and `dataset` both are generated arithmetic, and no problem is in both. Otherwise evaluation
    rows come from `val_data_path`; without it, from the rest of the training rows where `train_fraction` is below 1;
    else from the test split of `dataset`, unless `data_path` is a local copy of it. With `streaming`, training rows are
    read as they are drawn, and shuffled by `seed` within a buffer. All rows that are read are normalized by
    `normalize_row`; generated ones are not.

    Args:
        check_first: called with the first training row of a stream, so that it can raise for what that row lacks before
            training begins.
        supervised: rows are for supervised fine-tuning, see `normalize_row`.

    Raises:
        ValueError: settings exclude each other; see also `load_rows` and `normalize_row`.
    """
    _check_settings(config)
    if config.data_path is None and config.dataset is None:
        return tiny.arithmetic_rows("train", config.num_train_rows or NUM_GENERATED_ROWS, seed), load_eval_rows(config)
    if config.streaming:
        return _stream(config, seed, check_first, supervised), load_eval_rows(config, supervised=supervised)
    train = _load(config, config.data_path, config.dataset_split, "data_path", supervised=supervised)
    if config.train_fraction == 1:
        return train[: config.num_train_rows], load_eval_rows(config, supervised=supervised)
    train, evaluation = _split_rows(train, config.train_fraction, seed)
    return train[: config.num_train_rows], evaluation[: config.num_eval_rows]


def load_eval_rows(config: DataConfig, setting: str = "val_data_path", supervised: bool = False) -> list[Row]:
    """Load the evaluation rows only. Without `val_data_path`, `data_path` and `dataset` they are generated arithmetic.

    Args:
        setting: the user's name for `val_data_path`, for error messages.
        supervised: rows are for supervised fine-tuning, see `normalize_row`.

    Raises:
        ValueError: see `load_rows` and `normalize_row`.
    """
    path, is_local = config.val_data_path, config.data_path is not None and Path(config.data_path).exists()
    if path is None and config.dataset is None and config.data_path is None:
        return tiny.arithmetic_rows("test", config.num_eval_rows)
    if path is None and (config.dataset is None or is_local):
        return []
    path = config.data_path if path is None else path
    # Rows of a file of the user's own need not have the columns of `dataset`.
    is_own = config.val_data_path is not None
    rows = _load(config, path, config.val_dataset_split, setting, any_shape=is_own, supervised=supervised)
    return rows[: config.num_eval_rows]


def _split_rows(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows at random, by `seed`, into two parts that share no question; both keep the order of `rows`.

    Args:
        rows: rows from `normalize_row`.
        fraction: the share of the questions that goes into the first part.

    Raises:
        ValueError: one of the parts would be empty.
    """
    questions = list(dict.fromkeys(row[QUESTION] for row in rows))
    count = int(len(questions) * fraction)
    if not 0 < count < len(questions):
        raise ValueError(f"train_fraction={fraction}: leaves a part of {len(questions)} questions empty")
    chosen = set(random.Random(f"split {seed}").sample(questions, count))
    return [row for row in rows if row[QUESTION] in chosen], [row for row in rows if row[QUESTION] not in chosen]


def _check_settings(config: DataConfig) -> None:
    """Raise ValueError for settings that exclude each other."""
    generated = config.data_path is None and config.dataset is None
    fraction = f"train_fraction={config.train_fraction}"
    if config.train_fraction < 1 and config.val_data_path is not None:
        raise ValueError(f"{fraction}: val_data_path={config.val_data_path!r} has evaluation rows; give one of the two")
    if config.train_fraction < 1 and config.streaming:
        raise ValueError(f"{fraction}: a stream can't be split, as its rows are not known; give val_data_path instead")
    if config.train_fraction < 1 and generated:
        raise ValueError(f"{fraction}: generated rows have held-out questions of their own; leave it out")
    if config.streaming and generated:
        raise ValueError(
            "streaming=True: generated rows are made in memory; give data_path or dataset, or leave it out"
        )
    for name in ("data_source", "dataset_config", "question_column", "answer_column"):
        nothing = generated and config.val_data_path is None
        require(not nothing or getattr(config, name) is None, name, getattr(config, name), "of what? Give data_path")


def _place(config: DataConfig, path: str | None) -> tuple[str, str | None]:
    """The (path or name, configuration) to read: `path`, or where it is None the place of `dataset` in its source."""
    if path is not None:
        return path, config.dataset_config
    known, source = KNOWN[config.dataset], config.data_source or "huggingface"
    place = {"huggingface": known.huggingface, "tfds": known.tfds}.get(source)
    if place is None:
        raise ValueError(f"data_source={source!r}: has no known {config.dataset!r}; say with data_path where a copy is")
    return place[0], config.dataset_config or place[1]


def _load(
    config: DataConfig,
    path: str | None,
    split: str,
    setting: str,
    any_shape: bool = False,
    supervised: bool = False,
) -> list[Row]:
    """Normalized rows. With `any_shape` they need not have the columns of the data set that the settings name."""
    place, config_name = _place(config, path)
    setting = setting if path is not None else f"dataset={config.dataset!r}: data_path"
    rows = load_rows(place, config_name, split, setting, config.data_source)
    normalize = _normalizer(config, place, None if any_shape else config.dataset, supervised)
    return [normalize(row, index) for index, row in enumerate(rows)]


def _stream(
    config: DataConfig, seed: int, check_first: Callable[[Row], object] | None, supervised: bool
) -> datasets.IterableDataset:
    """A shuffled stream of normalized rows. The first row is read here, so that a wrong path or column is found now."""
    place, config_name = _place(config, config.data_path)
    setting = "data_path" if config.data_path is not None else f"dataset={config.dataset!r}: data_path"
    stream = stream_rows(place, config_name, config.dataset_split, setting, config.data_source)
    if config.num_train_rows is not None:
        stream = stream.take(config.num_train_rows)
    normalize = _normalizer(config, place, config.dataset, supervised)
    first = next(iter(stream), None)
    if first is None:
        raise ValueError(f"{setting}={place!r}: no rows")
    first = normalize(first, 0)
    if check_first is not None:
        check_first(first)
    return stream.map(normalize, with_indices=True).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def _normalizer(config: DataConfig, place: str, dataset: str | None, supervised: bool) -> functools.partial:
    """A function `(row, index) -> normalized row`. It is a partial and no closure, because `datasets` hashes it."""
    columns = {"question_column": config.question_column, "answer_column": config.answer_column}
    return functools.partial(_normalize, source=place, dataset=dataset, supervised=supervised, **columns)


def _normalize(row: Row, index: int, **settings: Any) -> Row:
    return normalize_row(row, index + 1, **settings)


# ---- rows that a caller passes ----


def training_rows(rows: Any) -> list[Row] | datasets.Dataset | datasets.IterableDataset:
    """Convert a caller's training data to rows.

    Args:
        rows: a `datasets.Dataset` or `IterableDataset`, a sequence or iterator of dicts, a dict of columns, a pandas
            DataFrame, a PyTorch data set, iterable ones included, or a dict of splits such as a `datasets.DatasetDict`,
            of which the split "train" is taken.

    Returns:
        a `Dataset` or `IterableDataset` unchanged (a `Dataset` with a transform is read into a list), an iterable data
        set of PyTorch as an `IterableDataset`, and anything else as a list of dicts.

    Raises:
        ValueError: `rows` is none of these.
    """
    return _rows_at_hand(rows, "train_dataset", ("train",))


def check_stream(rows: Any, max_steps: int, num_workers: int) -> None:
    """Check that a run can use its stream of training rows. Rows that are no stream pass unchecked.

    Raises:
        ValueError: the run has no number of steps, or the data loader has worker processes.
    """
    if isinstance(rows, datasets.IterableDataset):
        require(max_steps > 0, "max_steps", max_steps, "streamed rows have no end: set it above 0")
        hint = "each would read the whole stream: set it to 0"
        require(num_workers == 0, "dataloader_num_workers", num_workers, hint)


EvaluationRows = list[Row] | datasets.Dataset


def evaluation_rows(rows: Any) -> EvaluationRows | dict[str, EvaluationRows]:
    """Convert a caller's evaluation data to rows, as `training_rows` does. A stream is read to its end.

    Of a dict of splits that has "train" among them, or nothing but "test" or "validation", that one of the latter two
    is taken. Any other dict of data sets gives a dict of rows, each of which is to be evaluated by itself.

    Raises:
        ValueError: `rows` is none of these, or there is not exactly one split to take.
    """
    if isinstance(rows, Mapping) and _is_dict_of_data_sets(rows) and not _has_own_split(rows):
        unnamed = next((name for name in rows if not isinstance(name, str)), None)
        if unnamed is not None:
            raise ValueError(f"eval_dataset: a data set is named {unnamed!r}; names are texts")
        return {name: _finite(_rows_at_hand(part, f"eval_dataset[{name!r}]", ())) for name, part in rows.items()}
    return _finite(_rows_at_hand(rows, "eval_dataset", EVALUATION_SPLITS))


def _finite(rows: list[Row] | datasets.Dataset | datasets.IterableDataset) -> EvaluationRows:
    if not isinstance(rows, datasets.IterableDataset):
        return rows
    return list(rows) if rows.features is None else datasets.Dataset.from_list(list(rows), rows.features)


EVALUATION_SPLITS = ("test", "validation")


def _has_own_split(parts: Mapping[str, Any]) -> bool:
    """Whether a dict of splits is a whole data set, of which one split is for evaluation."""
    return "train" in parts or (len(parts) == 1 and next(iter(parts)) in EVALUATION_SPLITS)


def _is_dict_of_data_sets(rows: Mapping[str, Any]) -> bool:
    """Whether a dict holds data sets, and not columns: of known types, or each a list of rows.

    The values of a column are no dicts throughout: a row has a prompt, which is a text or a list.
    """

    def is_list_of_rows(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(row, Mapping) for row in value)

    return any(map(_is_split, rows.values())) or (bool(rows) and all(map(is_list_of_rows, rows.values())))


def _rows_at_hand(
    rows: Any, setting: str, splits: Sequence[str]
) -> list[Row] | datasets.Dataset | datasets.IterableDataset:
    """Rows of any type. A dict of splits must have exactly one of the names in `splits`."""
    if isinstance(rows, Mapping) and _is_dict_of_data_sets(rows):
        found = [name for name in splits if name in rows]
        if len(found) != 1:
            hint = f"give one of them, such as {setting}[{found[0] if found else next(iter(rows))!r}]"
            raise ValueError(f"{setting}: has the splits {', '.join(map(str, rows))}; {hint}")
        return _rows_at_hand(rows[found[0]], setting, splits)
    if isinstance(rows, datasets.Dataset):
        return list(rows) if rows.format["type"] == "custom" else rows  # "custom": a transform makes the rows
    if isinstance(rows, datasets.IterableDataset):
        return rows
    if isinstance(rows, torch.utils.data.IterableDataset):
        return datasets.IterableDataset.from_generator(_checked_rows, gen_kwargs={"rows": rows, "setting": setting})
    return _dicts(rows, setting)


def _checked_rows(rows: torch.utils.data.IterableDataset, setting: str) -> Iterator[Row]:
    """The rows of an iterable data set of PyTorch, each of which must be a dict."""
    for number, row in enumerate(rows, start=1):
        _check_row(row, number, setting)
        yield dict(row)


def _check_row(row: Any, number: int, setting: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{setting}, row {number}: a {type(row).__name__}, expected a dict; {_EXPECTED}")
    unnamed = next((name for name in row if not isinstance(name, str)), None)
    if unnamed is not None:
        raise ValueError(f"{setting}, row {number}: a column is named {unnamed!r}; names of columns are texts")


def _dicts(rows: Any, setting: str) -> list[Row]:
    """Rows as dicts, of any type that `datasets` does not define."""
    if isinstance(rows, pandas.DataFrame):
        rows = {name: _values_of(rows[name]) for name in rows.columns}
    if isinstance(rows, Mapping):
        rows = _rows_of_columns(rows, setting)
    elif isinstance(rows, str | bytes | type) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise ValueError(f"{setting}={rows!r:.80}: {_EXPECTED}")
    elif not hasattr(rows, "__iter__"):
        if not isinstance(rows, Sized):
            raise ValueError(f"{setting}: a {type(rows).__name__} without a length; {_EXPECTED}")
        rows = [rows[i] for i in range(len(rows))]  # not by iteration, as not all raise an IndexError at their end
    rows = list(rows)
    for number, row in enumerate(rows, start=1):
        _check_row(row, number, setting)
    return [dict(row) for row in rows]


_EXPECTED = (
    "expected a datasets.Dataset, a list of dicts, a dict of columns or a pandas DataFrame, with a column prompt or "
    "question"
)


def _is_split(value: Any) -> bool:
    """Whether a value in a dict is a split of a data set, and so not a column of values."""
    return isinstance(value, datasets.Dataset | datasets.IterableDataset | torch.utils.data.Dataset | pandas.DataFrame)


def _values_of(column: pandas.Series) -> list[Any]:
    """The values of a pandas column as Python values; None where pandas has none, and 0.1 for 0.1 in float32."""
    if column.dtype in (np.float32, np.float16):
        values = [float(str(value)) for value in column.to_numpy()]
    else:
        values = column.tolist()
    return [None if empty else value for value, empty in zip(values, column.isna(), strict=True)]


def _rows_of_columns(columns: Mapping[str, Any], setting: str) -> list[Row]:
    for name, values in columns.items():
        if isinstance(values, str) or not isinstance(values, Sized):
            raise ValueError(f"{setting}[{name!r}]={values!r:.80}: expected a column, a list of values; {_EXPECTED}")
    lengths = {str(name): len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{setting}: columns of different lengths: {lengths}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
