"""Writes answers to a file while they come: JSON lines, CSV or Parquet, by the ending of its name."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow
import pyarrow.parquet

from ..rewards import extract_answer

LISTS = ("completions", "answers", "base_completions", "base_answers")


class AnswersFile:
    """A new file with answers. What was appended before an interruption is in it.

    JSON lines and Parquet have a row a question, with lists of completions and of what stands between their `<answer>`
    tags. CSV has a row for each completion, since its cells can't hold lists. Questions that are messages are JSON text
    in CSV and Parquet.

    Args:
        path: must not exist; its ending is one of `ask.OUTPUT_ENDINGS`.
        with_base: there are answers of the base model too.
    """

    def __init__(self, path: Path, with_base: bool) -> None:
        self.ending, self.lists = path.suffix.lower(), LISTS if with_base else LISTS[:2]
        self.file = open(path, "xb") if self.ending == ".parquet" else open(path, "x", encoding="utf-8", newline="")
        if self.ending == ".csv":
            self.writer = csv.writer(self.file)
            self.writer.writerow(["question", "prompt", "sample", *(name.removesuffix("s") for name in self.lists)])
        elif self.ending == ".parquet":
            texts = [(name, pyarrow.list_(pyarrow.string())) for name in self.lists]
            schema = pyarrow.schema([("question", pyarrow.string()), ("prompt", pyarrow.string()), *texts])
            self.writer = pyarrow.parquet.ParquetWriter(self.file, schema)

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.ending == ".parquet":
            self.writer.close()  # writes the list of what the file holds
        self.file.close()

    def append(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Add the answers to some questions, as `Asked.answers` gives them."""
        rows = [_with_answers(result) for result in results]
        if self.ending == ".csv":
            for row in rows:
                for sample, of_one in enumerate(zip(*(row[name] for name in self.lists), strict=True), start=1):
                    self.writer.writerow([_as_text(row["question"]), row["prompt"], sample, *of_one])
        elif self.ending == ".parquet":
            rows = [row | {"question": _as_text(row["question"])} for row in rows]
            self.writer.write_table(pyarrow.Table.from_pylist(rows, schema=self.writer.schema))
        else:
            self.file.writelines(json.dumps(row) + "\n" for row in rows)
        self.file.flush()


def _with_answers(result: Mapping[str, Any]) -> dict[str, Any]:
    row = {**result, "answers": list(map(extract_answer, result["completions"]))}
    if "base_completions" in result:
        row["base_answers"] = list(map(extract_answer, result["base_completions"]))
    return row


def _as_text(question: Any) -> str:
    return question if isinstance(question, str) else json.dumps(question)
