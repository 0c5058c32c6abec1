"""Calls the reward functions of a batch: checks that they can be called, and says or drops what fails."""

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.rows import ANSWER_COLUMNS, NO_ANSWER, WHERE, Row, has_column, own_columns
from ..runtime.once import warn_once
from .calling import Batch, Outcome, call_once, parameters_of
from .context import GIVEN, TOKENS, RewardContext
from .failures import drop_failed, error_of
from .values import name_of
from .workers import RewardWorkers

logger = logging.getLogger(__name__)

# A reward function, plain or async: (prompts, completions, **columns) -> one value a completion, or None where the
# function does not apply to it. A function without **columns gets only the columns that it has parameters for, and of
# the arguments in `context.py` those that it has parameters for. As in TRL, where the data's prompt is a list of
# messages a completion is one too: [{"role": "assistant", "content": "..."}]
RewardFunc = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]


def names_of(functions: Sequence[RewardFunc]) -> list[str]:
    """The names under which reward functions are logged. Several of one name become "name", "name_2" and so on."""
    names: list[str] = []
    for function in functions:
        name, count = name_of(function), 1
        while name in names:
            count += 1
            name = f"{name_of(function)}_{count}"
        names.append(name)
    return names


def required_columns(function: RewardFunc) -> set[str]:
    """The columns of the data that a reward function can't be called without."""
    return parameters_of(function)[0] - {"prompts", "completions", *GIVEN}


def require_columns(
    functions: Sequence[RewardFunc],
    rows: Iterable[Row],
    what: str = "reward function",
    names: Sequence[str] | None = None,
) -> None:
    """Check that rows have the columns that reward functions can't be called without.

    Args:
        what: what the functions are, for error messages.
        names: all columns of the data, where `rows` have only some of them; for error messages.

    Raises:
        ValueError: a row lacks such a column, or has no expected answer where a function takes it; or a column is named
            "prompts" or "completions", or like an argument in `context.py`. A column `completion_ids` is no mistake,
            but functions get the tokens of the sampled completions by this name, as in TRL.
    """
    needs = [(function, sorted(required_columns(function))) for function in functions]
    for number, row in enumerate(rows, start=1):
        where = row.get(WHERE, f"row {number}")
        for name in ("prompts", "completions", *GIVEN):
            if name == TOKENS:
                continue
            if name in row or name in (names or ()):
                raise ValueError(f"column {name!r} of the data set: reward functions get something else by this name")
        for function, columns in needs:
            lacking = next((name for name in columns if not has_column(row, name)), None)
            if lacking is None:
                continue
            why, hint = f"no column {lacking!r}", f"it has {', '.join(names or own_columns([row]))}"
            if lacking in ANSWER_COLUMNS:
                why, hint = row.get(NO_ANSWER) or "no answer", "choose another one, or give its parameter a default"
            raise ValueError(f"{where}: {why}. The {what} {name_of(function)!r} takes {lacking!r}; {hint}")


def score_completions(
    functions: Sequence[RewardFunc],
    rows: Sequence[dict[str, Any]],
    completions: Sequence[str],
    timeout: float | None = None,
    workers: RewardWorkers | None = None,
) -> Tensor:
    """Score B completions of N rows by R reward functions; `call_rewards` explains the arguments.

    Returns:
        (B, R) float64 in main memory, NaN where a function returned None.

    Raises:
        ValueError: see `call_rewards`.
    """
    return table_of(call_rewards(functions, rows, completions, timeout, workers), completions)


def table_of(
    values: Sequence[Sequence[float | None]], completions: Sequence[str], dropped: Sequence[int] = ()
) -> Tensor:
    """R lists of B values as a table: (B, R) float64 in main memory, NaN for None.

    A completion for which all functions returned None counts as one with a reward of 0, as in TRL, and the first such
    one is named in a warning. So is a whole batch of them, from which nothing can be learned.

    Args:
        dropped: the numbers of completions whose groups were dropped, of which nothing is said.
    """
    rewards = torch.tensor([[math.nan if v is None else v for v in column] for column in values], dtype=torch.float64).T
    unjudged = rewards.isnan().all(dim=1)
    unjudged[list(dropped)] = False
    if int(unjudged.sum()) == len(completions) - len(dropped) > 0:
        warn_once(
            logger,
            f"All {len(values)} reward functions returned None for every completion of a batch. None means that a "
            "function does not apply, so all rewards are 0 and nothing is learned from it. See that one of the "
            "functions applies to rows of each kind in the data",
        )
    elif unjudged.any():
        warn_once(
            logger,
            "All reward functions returned None for a completion, which counts as a reward of 0. The first is "
            f"{completions[int(unjudged.int().argmax())]!r:.200}",
        )
    return rewards


def call_rewards(
    functions: Sequence[RewardFunc],
    rows: Sequence[dict[str, Any]],
    completions: Sequence[str],
    timeout: float | None = None,
    workers: RewardWorkers | None = None,
    started: float | None = None,
    context: RewardContext | None = None,
    search: bool = True,
) -> list[list[float | None]]:
    """Call R reward functions for B completions of N rows. Completions of one row stand side by side.

    Async functions run at the same time as each other and as the plain ones. A function that raises is called again for
    each row alone, so that the error can name the completion.

    Args:
        timeout: seconds that the functions may take for the whole batch; None: no limit.
        workers: processes that call the plain functions; None: this process calls them.
        started: when the time limit began to run, by `time.monotonic`, where several calls share it; None: now.
        context: the tokens and the trainer's state, and the place for what the functions log; None: nothing of this
            is known, and what they log is dropped.
        search: False: a function that raises is not called again.

    Returns:
        R lists of B values, None where a function does not apply.

    Raises:
        ValueError: a row lacks a column that a function takes; or a function returned the wrong number of values, or a
            value that is no finite number, or took longer than `timeout`, or wanted to end the process by `SystemExit`
            or its like; or it could not judge a completion and says so by a `CompletionError`; or it logged what can't
            be logged. Any other exception of the function itself passes through. What a function raises gets a note
            that names the function, the row, the prompt and the completion.
    """
    require_columns(functions, rows)
    batch = Batch(rows, completions, context or RewardContext())
    outcomes = call_once(functions, batch, timeout, workers, started)
    for function, outcome in zip(functions, outcomes, strict=True):
        if outcome is not None and outcome.failed:
            again = partial(_again, function, timeout, workers) if search else None
            raise error_of(function, batch, outcome, again)
    batch.context.check_extra(len(completions))
    return [outcome.values for outcome in outcomes]


def call_and_drop(
    functions: Sequence[RewardFunc],
    rows: Sequence[dict[str, Any]],
    completions: Sequence[str],
    timeout: float | None,
    workers: RewardWorkers | None,
    started: float,
    context: RewardContext,
    most: float,
    search: bool = True,
) -> tuple[list[list[float | None]], dict[int, str]]:
    """Call R reward functions as `call_rewards` does, and go on without the groups whose rewards fail.

    Args:
        most: with more failed groups than this the run stops, so no others are looked for.
        search: False: a function that raises is not called again; its error is raised, as by `call_rewards`.

    Returns:
        R lists of B values, and for each group that failed what went wrong. Its values are meaningless.

    Raises:
        ValueError: a row lacks a column that a function takes, or a function logged what can't be logged.
    """
    require_columns(functions, rows)
    batch, failed = Batch(rows, completions, context), {}
    outcomes = call_once(functions, batch, timeout, workers, started, go_on=True)
    values = []
    for function, outcome in zip(functions, outcomes, strict=True):
        kept, why = outcome.values, {}
        if outcome.error is not None and not search:
            raise error_of(function, batch, outcome, None)
        if outcome.failed:
            kept, why = drop_failed(function, batch, outcome, partial(_again, function, timeout, workers), most)
        values.append(kept)
        failed = why | failed
    batch.context.check_extra(len(completions))
    return values, failed


def _again(function: RewardFunc, timeout: float | None, workers: RewardWorkers | None, part: Batch) -> Outcome:
    """What comes of a function where it is called for a part of a batch, within the whole time limit."""
    (outcome,) = call_once([function], part, timeout, workers)
    return outcome
