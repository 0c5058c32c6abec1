"""Calls slow reward functions in several processes. Each process gets the completions of some of the prompts."""

import asyncio
import concurrent.futures
import contextlib
import fcntl
import functools
import inspect
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

from ..runtime import together
from .context import LOG_EXTRA, LOG_METRIC, STATE, RewardContext
from .values import CompletionError, WholeCallError, numbers_of

logger = logging.getLogger(__name__)


class RewardWorkers:
    """New processes that import functions and call them. They share no memory with this one.

    Args:
        count: how many processes, at least 1.
        functions: the functions that will be called, at least one. State that a function keeps is kept in each process
            separately.

    Raises:
        ValueError: a function can't be imported in another process.
    """

    def __init__(self, count: int, functions: Sequence[Callable[..., Any]]) -> None:
        self.count = count
        interactive = not hasattr(sys.modules["__main__"], "__file__")
        for function in functions:
            try:
                data = pickle.dumps(function)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise self._import_error(error) from None
            if interactive and b"__main__" in data:
                raise self._import_error(f"{function!r:.80} is defined in an interactive session")
        self._functions, self._starting, self._starts, self._closed = functions, threading.Lock(), 0, False
        self._over = False  # these processes have ended, or are given up, and the next call starts others
        self._given_up = 0  # whoever waits for processes that were started so many times, or less, shall wait no more
        try:
            self._start()
        except BrokenProcessPool:
            raise self._import_error("a process that was to import it ended, see above") from None

    def _start(self) -> None:
        """Start the processes, and wait until all of them have imported the functions."""
        before, context = set(multiprocessing.active_children()), multiprocessing.get_context("spawn")
        reader, self._alive = context.Pipe(duplex=False)  # nobody writes; it closes when this process is gone
        arguments = (context.Barrier(self.count), os.getpid(), reader)
        self._pool = concurrent.futures.ProcessPoolExecutor(self.count, context, _begin, arguments)
        # Sending a function to a process makes the process import it, whatever is called there.
        arrived = [self._pool.submit(callable, function) for function in self._functions for _ in range(self.count)]
        self._processes = set(multiprocessing.active_children()) - before
        self._starts += 1
        self._over = False
        for future in arrived:
            future.result()

    def _start_again(self, starts: int) -> None:
        """Start new processes in place of those that had been started `starts` times, unless others have done so."""
        with self._starting:
            if self._closed:  # they ended because this was closed, while a call was under way
                raise BrokenProcessPool
            if self._starts == starts:
                self._kill()
                try:
                    self._start()
                except BrokenProcessPool:  # a new one was killed too, as where memory is short for a moment
                    self._kill()
                    self._start()

    def give_up(self) -> None:
        """Kill the processes in the middle of their calls, such as one that hangs. The next call starts others."""
        with self._starting:
            self._over, self._given_up = True, self._starts
            self._kill()

    def _import_error(self, reason: object) -> ValueError:
        return ValueError(
            f"reward_processes={self.count}: a reward function can't be called in another process ({reason}); define "
            "it at the top of a module, guard a script's main part by __name__ == '__main__', or set it to 0"
        )

    def submit(
        self,
        function: Callable[..., Any],
        places: Sequence[str],
        columns: dict[str, list[Any]],
        common: dict[str, Any] | None = None,
        context: RewardContext | None = None,
    ) -> Callable[[], Any]:
        """Start the calls of a function, one in each process, each with a part of the rows.

        Args:
            places: where each of N rows comes from, for messages. The completions are N groups of equal size, side by
                side. A group is never cut.
            columns: the arguments of the function, each with one value a row.
            common: those of its arguments that are for all rows, as `RewardContext.given` names them. Each process gets
                a copy of the trainer's state, and log functions of its own.
            context: gets what the function logs in the processes, in the order of the rows.

        Returns:
            a function that waits for the calls and returns their values joined. Where a process ends by itself, it
            calls once more in new ones, and raises a `WholeCallError` where one of those does, and where a call did not
            return one value a row.
        """
        common, context = common or {}, context or RewardContext()
        num_rows, num_prompts = len(next(iter(columns.values()))), len(places)
        group_size, bounds = num_rows // num_prompts, [num_prompts * i // self.count for i in range(self.count + 1)]
        slices = [slice(a * group_size, b * group_size) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]

        def begin() -> list[concurrent.futures.Future]:
            rest = common.get(STATE), [*common]
            parts = [{name: values[part] for name, values in columns.items()} for part in slices]
            return [self._pool.submit(_call, function, part, *rest) for part in parts]

        if self._over:
            self._start_again(self._starts)
        try:
            starts, futures = self._starts, begin()
        except BrokenProcessPool:  # a process was killed between two calls
            self._start_again(self._starts)
            starts, futures = self._starts, begin()

        def join() -> Any:
            try:
                results = _results_of(slices, futures)
            except BrokenProcessPool:  # a process was killed, such as for its memory
                if starts <= self._given_up:
                    raise
                self._start_again(starts)
                logger.warning("A process that scores has ended by itself; %d new ones score these rows", self.count)
                again = []
                try:
                    again = begin()
                    results = _results_of(slices, again)
                except BrokenProcessPool:
                    self._over = True
                    lost = [part for part, future in zip(slices, again, strict=False) if future.exception()] or slices
                    rows = [row for part in lost for row in places[part.start // group_size : part.stop // group_size]]
                    name = getattr(function, "__name__", type(function).__name__)
                    what = f"{name!r} scored the {num_rows} completions of {num_prompts} prompts"
                    raise WholeCallError(
                        f"reward_processes={self.count}: a process has ended by itself while {what}, and then another; "
                        "the function may need more memory than there is, or end its process. It did not get beyond "
                        f"the completions of {_listed(rows)}"
                    ) from None
            joined: list[Any] = []
            for values, metrics, extra in results:
                context.add(metrics, extra)
                joined.extend(values)
            return joined

        return join

    def close(self) -> None:
        """Kill the processes, even in the middle of a call."""
        self._closed = True
        with self._starting:  # until those that are being started are there
            self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.join()


@contextlib.contextmanager
def reward_workers(functions: Sequence[Callable[..., Any]], count: int) -> Iterator[RewardWorkers | None]:
    """Keep `count` processes on the first host that call the functions which are not async.

    Yields:
        the processes, or None where there are none: `count` is 0, all functions are async, or this is another host.

    Raises:
        ValueError: see `RewardWorkers`.
    """
    workers = None

    def start() -> None:
        nonlocal workers
        plain = [function for function in functions if not is_async(function)]
        if plain:
            workers = RewardWorkers(count, plain)

    try:
        if count > 0:
            together.decided_by_first(start)
        yield workers
    finally:
        if workers is not None:
            workers.close()


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call of the function, or of what a `functools.partial` holds, returns an awaitable."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _results_of(slices: Sequence[slice], futures: Sequence[concurrent.futures.Future]) -> list[Any]:
    """What each process has returned for its part of the rows."""
    results = []
    for part, future in zip(slices, futures, strict=True):
        try:
            results.append(future.result())
        except CompletionError as error:  # its number is that in the part
            raise CompletionError(part.start + error.number, error.message) from error
    return results


def _listed(places: Sequence[str], most: int = 8) -> str:
    """Names in a row, those after the first few as their number."""
    shown = ", ".join(places[:most])
    return shown if len(places) <= most else f"{shown} and {len(places) - most} others"


_kept: list[int] = []  # descriptors that stay open


def _begin(barrier: Barrier, parent: int, alive: Connection) -> None:
    """Run in each process before its first call: wait for the others, so that the pool has to start them all.

    Args:
        alive: the end of a pipe that closes when the process with this number is gone, however that ended.
    """
    if os.path.exists(own := f"/proc/self/fd/{alive.fileno()}"):  # Linux
        # The system ends this process by SIGIO then, whatever it is doing: a regular expression, say, lets no thread of
        # Python run. The pipe is opened anew, since one that is shared can have one owner only.
        _kept.append(os.open(own, os.O_RDONLY | os.O_NONBLOCK))
        fcntl.fcntl(_kept[-1], fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(_kept[-1], fcntl.F_SETFL, fcntl.fcntl(_kept[-1], fcntl.F_GETFL) | os.O_ASYNC)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer too, which closes the pool
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    barrier.wait()


def _end_with(parent: int) -> None:
    """End this process when the one that has started it is gone, however that ended: nobody else would."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call(
    function: Callable[..., Any], arguments: dict[str, Any], state: Any, given: list[str]
) -> tuple[list[float | None], dict[str, list[float]], dict[str, list[Any]]]:
    """Call a function in a worker process. Returns its values, and the metrics and the columns that it logged.

    Args:
        given: the names of the arguments that are for all rows.

    Raises:
        ValueError: see `numbers_of`.
    """
    context = RewardContext(trainer_state=state)
    common = {STATE: state, LOG_METRIC: context.log_metric, LOG_EXTRA: context.log_extra}
    values = awaited(function(**arguments, **{name: common[name] for name in given}))
    count = len(next(iter(arguments.values())))
    return numbers_of(function, values, count), context.metrics, context.extra


def awaited(result: Any) -> Any:
    """The result of a call; an awaitable is first run to its end in an event loop of its own."""

    async def finish() -> Any:
        return await result

    return asyncio.run(finish()) if inspect.isawaitable(result) else result
