"""Call reward functions and check what they return."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# (prompts, completions, **columns) -> one value a completion, or None where the function does not apply
RewardFunc = Callable[..., Sequence[float | None]]


def name_of(function: RewardFunc) -> str:
    """The name under which a reward function is logged."""
    return getattr(function, "__name__", type(function).__name__)


def columns_of(rows: Sequence[dict[str, Any]], copies: int = 1) -> dict[str, list[Any]]:
    """The rows' columns as lists, each value `copies` times; `answers` and `expected_answers` are `answer` again.

    A row that lacks a column which another one has gets None there.

    Raises:
        ValueError: a column is called as what reward functions get besides the columns.
    """
    names = {name: None for row in rows for name in row}  # in order
    for name in ("prompts", "completions"):
        if name in names:
            raise ValueError(f"column {name!r} of the data set: reward functions get something else by this name")
    own = ("prompt", "prompt_ids", "completion", "completion_ids")
    columns = {name: [row.get(name) for row in rows for _ in range(copies)] for name in names if name not in own}
    return columns | {"answers": columns["answer"], "expected_answers": columns["answer"]}


def score_completions(
    functions: Sequence[RewardFunc], rows: Sequence[dict[str, Any]], completions: Sequence[str]
) -> Tensor:
    """Values of R reward functions for B completions of N rows, copies of a row side by side.

    Returns:
        (B, R) float64 on the host, NaN where a function returned None.

    Raises:
        ValueError: a function returned the wrong number of values or something that is no finite number, or no
            function judged some completion. An exception of the function itself passes through.
    """
    copies = len(completions) // len(rows)
    prompts = [row["prompt"] for row in rows for _ in range(copies)]
    columns = columns_of(rows, copies)
    rewards = torch.full((len(completions), len(functions)), float("nan"), dtype=torch.float64)
    for j, function in enumerate(functions):
        values = list(function(prompts=prompts, completions=list(completions), **columns))
        if len(values) != len(completions):
            counts = f"{len(values)} values for {len(completions)} completions"
            raise ValueError(f"reward function {name_of(function)!r} returned {counts}")
        for i, value in enumerate(values):
            if value is None:
                continue
            rewards[i, j] = float(value)
            if not torch.isfinite(rewards[i, j]):
                raise ValueError(f"reward function {name_of(function)!r} returned {value!r} for {completions[i]!r}")
    unjudged = rewards.isnan().all(dim=1)
    if unjudged.any():
        raise ValueError(f"no reward function judged the completion {completions[int(unjudged.int().argmax())]!r}")
    return rewards
