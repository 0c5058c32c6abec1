"""Calls reward functions once for a batch: in this thread, in others, or in worker processes, with a time limit."""

import concurrent.futures
import inspect
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..data.rows import ANSWER_COLUMNS, TURNS, WHERE, Row, columns_of, prompt_of
from .context import GIVEN, TOKENS, RewardContext
from .slow import Running, warning_of_slow_functions
from .values import WholeCallError, counted, name_of, numbers_of
from .workers import RewardWorkers, awaited, is_async


@dataclass(frozen=True)
class Batch:
    """B completions of N rows. Those of one row, a group, stand side by side."""

    rows: Sequence[Row]
    completions: Sequence[str]
    context: RewardContext  # the tokens and the trainer's state
    numbers: Sequence[int] | None = None  # the places of the rows in a whole batch; None: this is a whole one

    @property
    def group_size(self) -> int:
        return len(self.completions) // len(self.rows)

    @property
    def what(self) -> str:
        """How much it is, for messages."""
        more = " and so on" if len(self.rows) > 1 else ""
        completions, prompts = counted(len(self.completions), "completion"), counted(len(self.rows), "prompt")
        return f"{completions} of {prompts} ({self.place(0)}{more})"

    def place(self, group: int) -> str:
        """Where the row of a group comes from."""
        number = group if self.numbers is None else self.numbers[group]
        return self.rows[group].get(WHERE, f"row {number + 1}")

    def rows_of(self, groups: Sequence[int]) -> list[int]:
        """The numbers of the completions of these groups."""
        size = self.group_size
        return [number for group in groups for number in range(group * size, (group + 1) * size)]

    def of(self, groups: Sequence[int]) -> "Batch":
        """These groups, as a batch of their own."""
        return self._part(groups, self.rows_of(groups))

    def single(self, completion: int) -> "Batch":
        """One completion, as a batch of its own."""
        return self._part([completion // self.group_size], [completion])

    def _part(self, groups: Sequence[int], completions: Sequence[int]) -> "Batch":
        ids = self.context.completion_ids
        context = RewardContext(None if ids is None else [ids[i] for i in completions], self.context.trainer_state)
        numbers = groups if self.numbers is None else [self.numbers[group] for group in groups]
        return Batch([self.rows[g] for g in groups], [self.completions[i] for i in completions], context, numbers)

    def columns(self) -> dict[str, list[Any]]:
        """All arguments of B values that a reward function may take."""
        row_of_each = [row for row in self.rows for _ in range(self.group_size)]
        ids = self.context.completion_ids
        return columns_of(list(self.rows), self.group_size) | {
            **({} if ids is None else {TOKENS: ids}),
            "prompts": [prompt_of(row) for row in row_of_each],
            "completions": [
                [{"role": "assistant", "content": text}] if row.get(TURNS) else text
                for row, text in zip(row_of_each, self.completions, strict=True)
            ],
        }


@dataclass
class Outcome:
    """What came of the call of one reward function: its B values, or an error."""

    values: list[float | None]  # numbers that are not finite included
    error: Exception | None = None

    @property
    def failed(self) -> bool:
        return self.error is not None or bool(self.bad())

    def bad(self) -> list[int]:
        """Which completions have a value that is not finite."""
        return [i for i, value in enumerate(self.values) if value is not None and not math.isfinite(value)]


class LateError(WholeCallError):
    """A reward function takes longer than `reward_timeout`."""


def parameters_of(function: Callable[..., Any]) -> tuple[set[str], set[str] | None]:
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
    more_required, more = parameters_of(wrapped)
    return required | more_required.intersection(ANSWER_COLUMNS), None if more is None else taken | more


def call_once(
    functions: Sequence[Callable[..., Any]],
    batch: Batch,
    timeout: float | None,
    workers: RewardWorkers | None,
    started: float | None = None,
    go_on: bool = False,
) -> list[Outcome | None]:
    """Call R reward functions for a batch. What they log is added to the batch's context, in their order.

    Args:
        timeout, workers, started: see `call_rewards`.
        go_on: after an error wait for the other functions all the same.

    Returns:
        what came of each function; None where it was not waited for, since another one has failed.

    Raises:
        ValueError: a function can't be called with what there is.
    """
    contexts = [RewardContext(batch.context.completion_ids, batch.context.trainer_state) for _ in functions]
    with warning_of_slow_functions(batch.what) as running:
        calls = [_begun(f, batch, context, workers) for f, context in zip(functions, contexts, strict=True)]
        guarded = [partial(_guarded, f, call, running) for f, call in zip(functions, calls, strict=True)]
        outcomes = _results(functions, guarded, timeout is not None or workers is not None, timeout, started, go_on)
    for number, function in enumerate(functions):
        if outcomes[number] is not None and outcomes[number].error is None:
            outcomes[number] = _read(function, outcomes[number].values, batch)
            if outcomes[number].error is None:
                batch.context.add(contexts[number].metrics, contexts[number].extra)
    if workers is not None and any(o is not None and isinstance(o.error, LateError) for o in outcomes):
        workers.give_up()  # or those that hang would keep their processes
    return outcomes


def _begun(
    function: Callable[..., Any], batch: Batch, context: RewardContext, workers: RewardWorkers | None
) -> Callable[[], Any]:
    """The call of a function with the arguments that it takes. In worker processes it has begun already."""
    required, taken = parameters_of(function)
    columns, given = batch.columns(), context.given()
    arguments = {name: list(column) for name, column in columns.items() if taken is None or name in taken}
    if TOKENS in arguments and context.completion_ids is not None:
        arguments[TOKENS] = [list(ids) for ids in context.completion_ids]
    common = {name: value for name, value in given.items() if taken is None or name in taken}
    if not arguments:
        raise ValueError(f"reward function {name_of(function)!r} takes neither prompts nor completions nor a column")
    unknown = sorted(required.intersection(GIVEN) - arguments.keys() - common.keys())
    if unknown:
        hint = "which only a trainer knows; give the parameter a default"
        raise ValueError(f"reward function {name_of(function)!r} takes {unknown[0]!r}, {hint}")
    if workers is None or is_async(function):
        return partial(function, **arguments, **common)
    places = [batch.place(group) for group in range(len(batch.rows))]
    return workers.submit(function, places, arguments, common, context)


def _read(function: Callable[..., Any], values: Any, batch: Batch) -> Outcome:
    """The values that a reward function returned, as floats, or the error that they are none."""
    try:
        return Outcome(numbers_of(function, values, len(batch.completions)))
    except ValueError as error:
        return Outcome([], error)


def _results(
    functions: Sequence[Callable[..., Any]],
    calls: Sequence[Callable[..., Any]],
    threaded: bool,
    timeout: float | None,
    started: float | None,
    go_on: bool,
) -> list[Outcome | None]:
    """Make the calls, and return what they returned, which need not be numbers; see `call_once`.

    An async function runs in a thread with an event loop of its own, because this thread may be running one already, as
    a notebook does. With `threaded`, every function runs in a thread: Python can't stop a function at its time limit,
    but it can stop waiting for a thread. Otherwise the plain functions run in this thread, one after the other.
    """
    started = time.monotonic() if started is None else started
    outcomes: list[Outcome | None] = [None] * len(functions)
    futures = [_in_thread(c) if threaded or is_async(f) else None for f, c in zip(functions, calls, strict=True)]
    for number, call in enumerate(calls):
        if futures[number] is None:
            outcomes[number] = outcome = _outcome(call)
            if outcome.error is not None and not go_on:
                return outcomes
            if inspect.isawaitable(outcome.values):  # a plain function returned another one's awaitable
                futures[number] = _in_thread(partial(call, outcome.values))
    for number, future in enumerate(futures):
        if future is not None:
            left = None if timeout is None else max(0.0, started + timeout - time.monotonic())
            outcomes[number] = outcome = _outcome(partial(_in_time, functions[number], future, left, timeout))
            if outcome.error is not None and not go_on:
                return outcomes
    return outcomes


def _outcome(call: Callable[[], Any]) -> Outcome:
    try:
        return Outcome(call())
    except Exception as error:
        return Outcome([], error)


def _guarded(
    function: Callable[..., Any], call: Callable[[], Any], running: Running, awaitable: Any = None, away: bool = False
) -> Any:
    """What a call returns or, where a call has returned an awaitable, what comes of that.

    `SystemExit` and its like become errors. They would end this process, or only its thread, as if all were well.

    Args:
        away: this is a thread for this call alone, where an awaitable is waited for.
    """
    try:
        with running.call_of(name_of(function)):
            result = call() if awaitable is None else awaitable
            return awaited(result) if away else result
    except (Exception, KeyboardInterrupt):  # Ctrl-C is the user's
        raise
    except BaseException as error:
        raised = f"{type(error).__name__}({', '.join(map(repr, error.args))})"
        hint = "which does not end a run; raise an error, or return None where the function does not apply"
        raise ValueError(f"reward function {name_of(function)!r} raised {raised}, {hint}") from error


def _in_time(
    function: Callable[..., Any], future: concurrent.futures.Future, left: float | None, timeout: float | None
) -> Any:
    """The result of a thread, if it comes in time."""
    try:
        return future.result(left)
    except concurrent.futures.TimeoutError:
        if future.done():  # the function itself raised a TimeoutError
            raise
        raise LateError(f"reward_timeout={timeout}: {name_of(function)!r} takes longer than that") from None


def _in_thread(call: Callable[..., Any]) -> concurrent.futures.Future:
    """Start a guarded call in a thread that does not keep the process alive. A coroutine that it returns runs there
    too."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call(away=True))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
