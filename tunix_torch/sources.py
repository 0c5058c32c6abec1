"""Training and evaluation rows: data sets known by name, columns, splits, streams; `readers.py` reads them.

A row is a dict with a question (`prompt` or `question`) and an answer (`answer`, `answers` or `expected_answers`, which
are the same column). Also understood, by their columns: GSM8K ("... #### 72"), MATH (`problem`, and `solution` with a
\\boxed{...}) and ARC (`question`, `choices`, `answerKey`).
"""

import functools
import random
import re
from dataclasses import dataclass
from pathlib import Path

import datasets

from . import tiny
from .config import DataConfig
from .readers import Row, load_rows, stream_rows
from .settings import require

QUESTION_COLUMNS = ("prompt", "question")
ANSWER_COLUMNS = ("answer", "answers", "expected_answers")
NUM_GENERATED_ROWS = 4096
SHUFFLE_BUFFER = 1000  # rows of a stream that are held back, so that they can be drawn in another order


@dataclass(frozen=True)
class KnownDataset:
    """Where `--dataset` finds a data set, as (name, configuration), and the columns of its rows."""

    huggingface: tuple[str, str | None]
    tfds: tuple[str, str | None] | None
    columns: tuple[str, ...]


KNOWN = {
    "gsm8k": KnownDataset(("openai/gsm8k", "main"), ("gsm8k", None), ("question", "answer")),
    "math": KnownDataset(("DigitalLearningGmbH/MATH-lighteval", None), None, ("problem", "solution")),
    "arc": KnownDataset(
        ("allenai/ai2_arc", "ARC-Challenge"), ("ai2_arc", "ARC-Challenge"), ("question", "choices", "answerKey")
    ),
}


# ---- training and evaluation rows ----


def load_data(config: DataConfig, seed: int) -> tuple[list[Row] | datasets.IterableDataset, list[Row]]:
    """Training and evaluation rows. Without `data_path` and `dataset`: generated arithmetic, no problem in both.

    Evaluation rows are those of `val_data_path`; else, with `train_fraction`, the rest of the training rows; else the
    test split of `dataset`, unless `data_path` is a local copy of it. With `streaming` the training rows are read as
    they are drawn, shuffled by `seed` within a window that moves along.

    Raises:
        ValueError: settings that exclude each other; see also `load_rows` and `normalize_row`.
    """
    _check(config)
    if config.data_path is None and config.dataset is None:
        return tiny.arithmetic_rows("train", config.num_train_rows or NUM_GENERATED_ROWS, seed), load_eval_rows(config)
    if config.streaming:
        return _stream(config, seed), load_eval_rows(config)
    train = _load(config, config.data_path, config.dataset_split, "data_path")
    if config.train_fraction == 1:
        return train[: config.num_train_rows], load_eval_rows(config)
    train, evaluation = split_rows(train, config.train_fraction, seed)
    return train[: config.num_train_rows], evaluation[: config.num_eval_rows]


def load_eval_rows(config: DataConfig, setting: str = "val_data_path") -> list[Row]:
    """Evaluation rows only; without `val_data_path`, `data_path` and `dataset`: generated arithmetic.

    Args:
        setting: the name that `val_data_path` has for the user.

    Raises:
        ValueError: see `load_rows` and `normalize_row`.
    """
    path, is_local = config.val_data_path, config.data_path is not None and Path(config.data_path).exists()
    if path is None and config.dataset is None and config.data_path is None:
        return tiny.arithmetic_rows("test", config.num_eval_rows)
    if path is None and (config.dataset is None or is_local):
        return []
    path = config.data_path if path is None else path
    own = config.val_data_path is not None  # the user's, in whatever shape
    return _load(config, path, config.val_dataset_split, setting, any_shape=own)[: config.num_eval_rows]


def split_rows(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Two parts that share no question, chosen by `seed`; both keep the order of `rows`.

    Args:
        rows: normalized ones.
        fraction: of the questions, in the first part.

    Raises:
        ValueError: a part would be empty.
    """
    questions = list(dict.fromkeys(row["question"] for row in rows))
    count = int(len(questions) * fraction)
    if not 0 < count < len(questions):
        raise ValueError(f"train_fraction={fraction}: leaves a part of {len(questions)} questions empty")
    chosen = set(random.Random(f"split {seed}").sample(questions, count))
    return [row for row in rows if row["question"] in chosen], [row for row in rows if row["question"] not in chosen]


def _check(config: DataConfig) -> None:
    """What excludes each other among the settings."""
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
    """(path or name, configuration) to read; `path` None: where `dataset` is found in its source."""
    if path is not None:
        return path, config.dataset_config
    known, source = KNOWN[config.dataset], config.data_source or "huggingface"
    place = {"huggingface": known.huggingface, "tfds": known.tfds}.get(source)
    if place is None:
        raise ValueError(f"data_source={source!r}: has no known {config.dataset!r}; say with data_path where a copy is")
    return place[0], config.dataset_config or place[1]


def _load(config: DataConfig, path: str | None, split: str, setting: str, any_shape: bool = False) -> list[Row]:
    place, config_name = _place(config, path)
    setting = setting if path is not None else f"dataset={config.dataset!r}: data_path"
    rows = load_rows(place, config_name, split, setting, config.data_source)
    rows = [_map_columns(row, f"{place}, row {i}", config) for i, row in enumerate(rows, start=1)]
    dataset = None if any_shape else config.dataset
    return [normalize_row(row, number, place, dataset) for number, row in enumerate(rows, start=1)]


def _stream(config: DataConfig, seed: int) -> datasets.IterableDataset:
    place, config_name = _place(config, config.data_path)
    setting = "data_path" if config.data_path is not None else f"dataset={config.dataset!r}: data_path"
    stream = stream_rows(place, config_name, config.dataset_split, setting, config.data_source)
    if config.num_train_rows is not None:
        stream = stream.take(config.num_train_rows)
    first = next(iter(stream), None)  # a wrong path or column is told now, not at the first step
    if first is None:
        raise ValueError(f"{setting}={place!r}: no rows")
    normalize_row(_map_columns(first, f"{place}, row 1", config), 1, place, config.dataset)
    adapt = functools.partial(_adapt, where=f"{place}, a row of the stream", config=config)
    return stream.map(adapt).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def _adapt(row: Row, where: str, config: DataConfig) -> Row:
    row = _map_columns(row, where, config)
    if config.dataset is not None:
        _require_shape(row, where, config.dataset)
    return row


# ---- columns ----


def normalize_row(row: Row, number: int, source: str, dataset: str | None = None) -> Row:
    """One row with `question`, `answer` (str) and, where the data has one, `completion`; other columns are kept.

    Args:
        dataset: gsm8k, math or arc: the row must have its columns.

    Raises:
        ValueError: no question, no answer, or not a row of `dataset`; names the row.
    """
    where = f"{source}, row {number}"
    if dataset is not None:
        _require_shape(row, where, dataset)
    row = _from_arc(row, where) if _has(row, KNOWN["arc"].columns) else row
    row = _from_math(row) if _has(row, KNOWN["math"].columns) else row
    question = next((row[name] for name in QUESTION_COLUMNS if row.get(name)), None)
    answer = next((row[name] for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    if question is None:
        raise ValueError(f"{where}: no question; expected a column named prompt or question")
    if not isinstance(question, str):
        raise ValueError(f"{where}: the question is a {type(question).__name__}, expected a text")
    if isinstance(answer, list):
        if len(answer) != 1:
            raise ValueError(f"{where}: {len(answer)} answers; expected one")
        answer = answer[0]
    reasoning, mark, final = ("", "", "") if answer is None else str(answer).rpartition("####")
    if not final.strip():
        boxed = ", or \\boxed{...} in the solution" if "solution" in row else ""
        raise ValueError(f"{where}: no answer; expected a column named {', '.join(ANSWER_COLUMNS)}{boxed}")
    result = {name: value for name, value in row.items() if name not in QUESTION_COLUMNS + ANSWER_COLUMNS}
    result["question"], result["answer"] = question, final.strip()
    if "completion" not in result:
        reasoning = reasoning if mark else row.get("reasoning") or row.get("solution") or ""
        result["completion"] = f"<reasoning>{str(reasoning).strip()}</reasoning>\n<answer>{final.strip()}</answer>"
    if not isinstance(result["completion"], str):
        kind = type(result["completion"]).__name__
        raise ValueError(f"{where}: the completion is a {kind}, expected a text")
    return result


def _has(row: Row, columns: tuple[str, ...]) -> bool:
    return all(row.get(name) is not None for name in columns)


def _require_shape(row: Row, where: str, dataset: str) -> None:
    missing = [name for name in KNOWN[dataset].columns if row.get(name) is None]
    if missing:
        names = ", ".join(name for name, value in row.items() if value is not None)
        raise ValueError(f"{where}: no row of dataset={dataset!r}: no column {missing[0]!r}; it has {names}")
    if dataset == "gsm8k" and "####" not in str(row["answer"]):
        raise ValueError(f"{where}: no row of dataset='gsm8k': no '####' before the final answer")


def _map_columns(row: Row, where: str, config: DataConfig) -> Row:
    """The columns that the user names take the place of those that are looked for; they also stay as they are."""
    for setting, column, names in (
        ("question_column", config.question_column, QUESTION_COLUMNS),
        ("answer_column", config.answer_column, ANSWER_COLUMNS),
    ):
        if column is not None and column not in row:
            raise ValueError(f"{setting}={column!r}: not in {where}, which has {', '.join(row)}")
        if column is not None:
            row = {**row, **dict.fromkeys(names), setting.removesuffix("_column"): row[column]}
    return row


def _from_arc(row: Row, where: str) -> Row:
    """ARC: the labelled choices go below the question, and the answer is the right one's label."""
    choices, key = row["choices"], str(row["answerKey"])
    if isinstance(choices, dict):  # Hugging Face and TFDS: a list a column
        choices = [
            {"text": text, "label": label} for text, label in zip(choices["text"], choices["label"], strict=True)
        ]
    labels = [str(choice["label"]) for choice in choices]
    if key not in labels:
        raise ValueError(f"{where}: answerKey {key!r} is none of the choices {', '.join(labels)}")
    lines = [f"{label}. {choice['text']}" for label, choice in zip(labels, choices, strict=True)]
    rest = {name: value for name, value in row.items() if name not in (*ANSWER_COLUMNS, "answerKey")}
    return {**rest, "question": "\n".join([str(row["question"]), *lines]), "answer": key}


def _from_math(row: Row) -> Row:
    """MATH: the answer is what the solution puts into its last box, unless the row has it in a column."""
    rest = {name: value for name, value in row.items() if name != "problem"}
    if not any(row.get(name) for name in QUESTION_COLUMNS):
        rest["question"] = row["problem"]
    if not any(row.get(name) is not None for name in ANSWER_COLUMNS):
        rest["answer"] = last_boxed(row["solution"])
    return rest


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} (or \\fbox{...}, or `\\boxed 2`) of a LaTeX text holds; None: there is none."""
    found = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*", text)]
    if not found:
        return None
    rest = text[found[-1] :]
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip()
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0 and match.group() == "}":
            return rest[1 : match.start()]
    return None
