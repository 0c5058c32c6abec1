"""Calls reward functions with the columns that they take, and checks the values that they return."""

import concurrent.futures
import functools
import inspect
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.rows import ANSWER_COLUMNS, NO_ANSWER, TURNS, WHERE, Row, columns_of, has_column, own_columns, prompt_of
from .context import GIVEN, TOKENS, RewardContext
from .values import CompletionError, name_of, numbers_of
from .workers import RewardWorkers, awaited, is_async

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


def _parameters(function: RewardFunc) -> tuple[set[str], set[str] | None]:
    """The parameters that a reward function can't be called without, and all those that it takes.

    The second is None where the function takes any name.

    Raises:
        ValueError: a parameter can be given by position only.
    """
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except ValueError:  # some functions that are not written in Python have no signature
        return set(), None
    for p in parameters:
        if p.kind == p.POSITIONAL_ONLY and p.default is p.empty:
            raise ValueError(
                f"reward function {name_of(function)!r} takes {p.name!r} by position; it is called by names"
            )
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    taken, required = {p.name for p in by_name}, {p.name for p in by_name if p.default is p.empty}
    if all(p.kind != p.VAR_KEYWORD for p in parameters):
        return required, taken
    wrapped = getattr(function, "__wrapped__", None)  # a decorator with **columns passes them on to this one
    if wrapped is None:
        return required, None
    more_required, more = _parameters(wrapped)
    return required | more_required.intersection(ANSWER_COLUMNS), None if more is None else taken | more


def required_columns(function: RewardFunc) -> set[str]:
    """The columns of the data that a reward function can't be called without."""
    return _parameters(function)[0] - {"prompts", "completions", *GIVEN}


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
                why, hint = row.get(NO_ANSWER) or "no answer", "give the parameter a default if it can do without"
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


def table_of(values: Sequence[Sequence[float | None]], completions: Sequence[str]) -> Tensor:
    """R lists of B values as a table: (B, R) float64 in main memory, NaN for None.

    A completion for which all functions returned None counts as one with a reward of 0, as in TRL, and the first such
    one is named in a warning.
    """
    rewards = torch.tensor([[math.nan if v is None else v for v in column] for column in values], dtype=torch.float64).T
    unjudged = rewards.isnan().all(dim=1)
    if unjudged.any():
        warn_once(
            "All reward functions returned None for a completion, which counts as a reward of 0. The first is "
            f"{completions[int(unjudged.int().argmax())]!r:.200}"
        )
    return rewards


_said: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning, unless one that begins with the same sentence was logged before."""
    sentence = message.partition(".")[0]
    if sentence not in _said:
        _said.add(sentence)
        logger.warning("%s", message)


def call_rewards(
    functions: Sequence[RewardFunc],
    rows: Sequence[dict[str, Any]],
    completions: Sequence[str],
    timeout: float | None = None,
    workers: RewardWorkers | None = None,
    started: float | None = None,
    context: RewardContext | None = None,
) -> list[list[float | None]]:
    """Call R reward functions for B completions of N rows. Completions of one row stand side by side.

    Async functions run at the same time as each other and as the plain ones.

    Args:
        timeout: seconds that the functions may take for the whole batch; None: no limit.
        workers: processes that call the plain functions; None: this process calls them.
        started: when the time limit began to run, by `time.monotonic`, where several calls share it; None: now.
        context: the tokens and the trainer's state, and the place for what the functions log; None: nothing of this
            is known, and what they log is dropped.

    Returns:
        R lists of B values, None where a function does not apply.

    Raises:
        ValueError: a row lacks a column that a function takes; or a function returned the wrong number of values, or a
            value that is no finite number, or took longer than `timeout`; or it could not judge a completion and says
            so by a `CompletionError`; or it logged what can't be logged. Any other exception of the function itself
            passes through.
    """
    require_columns(functions, rows)
    context = context or RewardContext()
    columns, given = _argument_columns(rows, completions, context), context.given()
    calls: list[Callable[[], Any]] = []
    for function in functions:
        required, taken = _parameters(function)
        arguments = {name: list(column) for name, column in columns.items() if taken is None or name in taken}
        if context.completion_ids is not None and TOKENS in arguments:
            arguments[TOKENS] = [list(ids) for ids in context.completion_ids]
        common = {name: value for name, value in given.items() if taken is None or name in taken}
        if not arguments:
            raise ValueError(
                f"reward function {name_of(function)!r} takes neither prompts nor completions nor a column"
            )
        unknown = sorted(required.intersection(GIVEN) - arguments.keys() - common.keys())
        if unknown:
            hint = "which only a trainer knows; give the parameter a default"
            raise ValueError(f"reward function {name_of(function)!r} takes {unknown[0]!r}, {hint}")
        if workers is None or is_async(function):
            calls.append(functools.partial(function, **arguments, **common))
        else:
            calls.append(workers.submit(function, len(rows), arguments, common, context))
    try:
        results = _results(functions, calls, timeout is not None or workers is not None, timeout, started)
    except CompletionError as error:
        number = error.number * len(rows) // len(completions)
        raise ValueError(f"{rows[number].get(WHERE, f'row {number + 1}')}: {error}") from error
    context.check_extra(len(completions))
    return [_checked(function, values, completions) for function, values in zip(functions, results, strict=True)]


def _argument_columns(rows: Sequence[Row], completions: Sequence[str], context: RewardContext) -> dict[str, list[Any]]:
    """All arguments of B values that a reward function may take."""
    copies = len(completions) // len(rows)
    row_of_each = [row for row in rows for _ in range(copies)]
    tokens = {} if context.completion_ids is None else {TOKENS: context.completion_ids}
    return columns_of(list(rows), copies) | {
        **tokens,
        "prompts": [prompt_of(row) for row in row_of_each],
        "completions": [
            [{"role": "assistant", "content": text}] if row.get(TURNS) else text
            for row, text in zip(row_of_each, completions, strict=True)
        ],
    }


def _checked(function: RewardFunc, values: Any, completions: Sequence[str]) -> list[float | None]:
    """The values that a reward function returned, as floats. Raises ValueError unless each is finite or None."""
    values = numbers_of(function, values)
    if len(values) != len(completions):
        counts = f"{len(values)} values for {len(completions)} completions"
        raise ValueError(f"reward function {name_of(function)!r} returned {counts}")
    for i, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"reward function {name_of(function)!r} returned {value!r} for {completions[i]!r}")
    return values


def _results(
    functions: Sequence[RewardFunc],
    calls: Sequence[Callable[[], Any]],
    threaded: bool,
    timeout: float | None,
    started: float | None,
) -> list[Any]:
    """Make the calls, and return their results.

    An async function runs in a thread with an event loop of its own, because this thread may be running one already, as
    a notebook does. With `threaded`, every function runs in a thread: Python can't stop a function at its time limit,
    but it can stop waiting for a thread. Otherwise the plain functions run in this thread, one after the other.
    """
    started = time.monotonic() if started is None else started
    in_thread = [threaded or is_async(function) for function in functions]
    futures = [_in_thread(call) if away else None for call, away in zip(calls, in_thread, strict=True)]
    results: list[Any] = [None if away else call() for call, away in zip(calls, in_thread, strict=True)]
    for j, future in enumerate(futures):
        if future is None and inspect.isawaitable(results[j]):  # a plain function returned another one's awaitable
            future = _in_thread(functools.partial(lambda awaitable: awaitable, results[j]))
        if future is None:
            continue
        left = None if timeout is None else max(0.0, started + timeout - time.monotonic())
        try:
            results[j] = future.result(left)
        except concurrent.futures.TimeoutError:
            if future.done():  # the function itself raised a TimeoutError
                raise
            raise ValueError(f"reward_timeout={timeout}: {name_of(functions[j])!r} takes longer than that") from None
    return results


def _in_thread(call: Callable[[], Any]) -> concurrent.futures.Future:
    """Start a call in a thread that does not keep the process alive. A coroutine that it returns runs there too."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(awaited(call()))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
