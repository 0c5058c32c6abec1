"""Reads the completions that a run kept, and its answers to the same questions at every evaluation."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..completions import FOLDER

# Of a long run so many files are read, the first and the last among them, at equal distances.
MOST_ROLLOUTS, MOST_EVALUATIONS = 40, 12
_REWARD = "rewards/"
_NEEDED = {
    "completions": (
        "step",
        "prompt_index",
        "prompt",
        "answer",
        "completion",
        "reward",
        "advantage",
        "length",
        "clipped",
    ),
    "evaluation": ("step", "question_index", "question", "answer", "completion", "right", "reward", "length"),
}


@dataclass(frozen=True)
class Completion:
    """One completion that was kept, of a training step or of an evaluation."""

    step: int
    number: int  # of its prompt within the step, or of its question
    prompt: str
    answer: str | None  # what is expected; None: nothing is known
    text: str
    rewards: dict[str, float | None]  # of each reward function; None: it did not apply
    reward: float | None  # the weighted total
    length: int  # tokens
    advantage: float | None = None  # of a training step
    clipped: bool | None = None  # whether it was cut off; of a training step
    right: bool | None = None  # of an evaluation


def read_completions(output_dir: str | Path) -> list[Completion]:
    """The completions of training steps that were kept, oldest first.

    Raises:
        ValueError: a file is damaged, or has not the columns that a run writes.
    """
    return _read(output_dir, "completions", MOST_ROLLOUTS)


def read_answers(output_dir: str | Path) -> list[Completion]:
    """The greedy answers at evaluations that were kept, oldest first.

    Raises:
        ValueError: a file is damaged, or has not the columns that a run writes.
    """
    return _read(output_dir, "evaluation", MOST_EVALUATIONS)


def steps_of(completions: Sequence[Completion]) -> list[int]:
    """The steps of which there are completions, in order."""
    return sorted({completion.step for completion in completions})


def _read(output_dir: str | Path, kind: str, most: int) -> list[Completion]:
    folder = Path(output_dir) / FOLDER
    numbered = [(re.fullmatch(rf"{kind}_([0-9]{{1,18}})\.parquet", path.name), path) for path in folder.glob("*")]
    files = [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]
    return [completion for path in _evenly(files, most) for completion in _rows(path, kind)]


def _evenly(files: list[Path], most: int) -> list[Path]:
    if len(files) <= most:
        return files
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]


def _rows(path: Path, kind: str) -> list[Completion]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        missing = [name for name in _NEEDED[kind] if name not in table.column_names]
        if missing:
            raise ValueError(f"the column {missing[0]} is missing")
        return [_completion(row) for row in table.to_pylist()]
    except FileNotFoundError:  # the run is at work, and has dropped this file since the folder was listed
        return []
    except (pyarrow.ArrowException, OSError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not what a run writes: {reason}") from error


def _completion(row: dict[str, Any]) -> Completion:
    return Completion(
        step=int(row["step"]),
        number=int(row["prompt_index"] if "prompt_index" in row else row["question_index"]),
        prompt=str(row["prompt"] if "prompt" in row else row["question"]),
        answer=None if row["answer"] is None else str(row["answer"]),
        text=str(row["completion"]),
        rewards={name.removeprefix(_REWARD): value for name, value in row.items() if name.startswith(_REWARD)},
        reward=row["reward"],
        length=int(row["length"]),
        advantage=row.get("advantage"),
        clipped=row.get("clipped"),
        right=row.get("right"),
    )
