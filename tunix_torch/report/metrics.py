"""Reads what a run has logged, and gives the numbers of its steps as series of points."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
STATE_FILE = "trainer_state.json"  # Transformers writes it into each checkpoint, and `Trainer.save_state` beside them

Rows = Sequence[dict[str, Any]]
Points = list[tuple[int, float]]  # (step, value), in the order in which they were logged


def load_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl. A trainer that a script has made writes none: those of its newest checkpoint.

    A last line without its end is left out: a run that goes on is writing it, or one that was killed was.

    Raises:
        ValueError: another line is no row of metrics; the message names it. Or the checkpoint's state is damaged.
    """
    path = Path(output_dir) / METRICS_FILE
    if not path.exists():
        return _logs_of_the_newest_state(Path(output_dir))
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


def _logs_of_the_newest_state(folder: Path) -> list[dict[str, Any]]:
    """What had been logged when a run last saved its state, in a checkpoint or at its end; none: it saved none."""
    numbered = [
        (re.fullmatch(r"checkpoint-([0-9]{1,18})", path.parent.name), path) for path in folder.glob(f"*/{STATE_FILE}")
    ]
    checkpoints = sorted((int(match[1]), path) for match, path in numbered if match)
    for path in [folder / STATE_FILE, *(path for _, path in reversed(checkpoints))]:
        if path.is_file():
            try:
                rows = json.loads(path.read_text(encoding="utf-8"))["log_history"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not the state of a trainer: {error}") from error
            return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    return []


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


def squared_error(values: Sequence[float]) -> float:
    """The variance of the mean of values, of which there must be two: the square of its standard error."""
    center = mean(values)
    return sum((value - center) ** 2 for value in values) / (len(values) - 1) / len(values)


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
