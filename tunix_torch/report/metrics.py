"""Reads a run's metrics.jsonl, and gives the numbers of its steps as series of points."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

Rows = Sequence[dict[str, Any]]
Points = list[tuple[int, float]]  # (step, value), in the order in which they were logged


def load_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none where there is no such file.

    A last line without its end is left out: a run that goes on is writing it, or one that was killed was.

    Raises:
        ValueError: another line is no row of metrics; the message names it.
    """
    path = Path(output_dir) / METRICS_FILE
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        is_row = isinstance(row, dict) and isinstance(row.get("step"), int)
        if is_row:
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step, got {line[:60]!r}")
    return rows


def series(rows: Rows, key: str) -> Points:
    """The values that are logged under a key. What is no finite number is left out."""
    return [(row["step"], float(row[key])) for row in rows if is_number(row.get(key))]


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def steps_of_training(rows: Rows) -> list[dict[str, Any]]:
    """The rows that training steps have logged, without those of evaluations and the summary at the end."""
    return [row for row in rows if "learning_rate" in row]


def keys_of(rows: Rows) -> list[str]:
    """Every key that some row has, in the order in which they first occur."""
    return list(dict.fromkeys(key for row in rows for key in row))


def mean(values: Sequence[float]) -> float:
    """The mean of values, of which there must be some."""
    return sum(values) / len(values)


def smoothed(points: Points, width: int) -> Points:
    """The mean of the `width` points around each one; fewer at both ends."""
    half, values = width // 2, [value for _, value in points]
    return [(step, mean(values[max(0, i - half) : i + half + 1])) for i, (step, _) in enumerate(points)]


def thinned(points: Points, most: int) -> Points:
    """At most so many points: neighbours are put together, each group as its mean at its last step."""
    if len(points) <= most:
        return points
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], mean([value for _, value in group])) for group in groups]
