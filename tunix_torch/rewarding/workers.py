"""Call a slow reward function in several processes, in each for some of the prompts."""

import asyncio
import concurrent.futures
import contextlib
import inspect
import multiprocessing
import pickle
import signal
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Barrier
from typing import Any

from ..runtime import together


class RewardWorkers:
    """Processes that call functions. They are fresh ones, which import what they call: nothing of this one is copied.

    Args:
        count: of processes, at least 1.
        functions: that will be called, at least one. What it remembers, each process remembers for itself.

    Raises:
        ValueError: a function that another process can't import.
    """

    def __init__(self, count: int, functions: Sequence[Callable[..., Any]]) -> None:
        self.count = count
        interactive = not hasattr(sys.modules["__main__"], "__file__")
        for function in functions:
            try:
                data = pickle.dumps(function)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise self._out_of_reach(error) from None
            if interactive and b"__main__" in data:
                raise self._out_of_reach(f"{function!r:.80} is defined in an interactive session")
        before = set(multiprocessing.active_children())
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(count, context, _begin, (context.Barrier(count),))
        arrived = [self._pool.submit(callable, function) for function in functions for _ in range(count)]
        self._processes = set(multiprocessing.active_children()) - before
        try:
            for future in arrived:
                future.result()
        except BrokenProcessPool:
            raise self._out_of_reach("a process that was to import it ended, see above") from None

    def _out_of_reach(self, reason: object) -> ValueError:
        return ValueError(
            f"reward_processes={self.count}: a reward function can't be called in another process ({reason}); define "
            "it at the top of a module, guard a script's main part by __name__ == '__main__', or set it to 0"
        )

    def submit(
        self, function: Callable[..., Any], num_prompts: int, columns: dict[str, list[Any]]
    ) -> Callable[[], Any]:
        """Start to call a function of columns, whose rows are `num_prompts` groups of equal size, side by side.

        Returns:
            a function that waits, and returns what the calls did, joined; or what one of them did, when that is not one
            value a row.
        """
        num_rows = len(next(iter(columns.values())))
        group_size, bounds = num_rows // num_prompts, [num_prompts * i // self.count for i in range(self.count + 1)]
        slices = [slice(a * group_size, b * group_size) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
        futures = [
            self._pool.submit(_call, function, {name: values[part] for name, values in columns.items()})
            for part in slices
        ]

        def join() -> Any:
            joined: list[Any] = []
            for part, future in zip(slices, futures, strict=True):
                values = future.result()
                if not isinstance(values, Sized) or len(values) != part.stop - part.start:
                    return values
                joined.extend(values)
            return joined

        return join

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self._processes:
            process.kill()
        self._pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def reward_workers(functions: Sequence[Callable[..., Any]], count: int) -> Iterator[RewardWorkers | None]:
    """While a run lasts, `count` processes on the first host that call the functions which are not async.

    Yields:
        None where there are none: `count` is 0, all functions are async, or this is another host.

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
    """Whether calling it gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _begin(barrier: Barrier) -> None:
    """In each process, before its first call: when all are there, so that the pool starts all of them at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer, which closes the pool
    barrier.wait()


def _call(function: Callable[..., Any], arguments: dict[str, list[Any]]) -> Any:
    return awaited(function(**arguments))


def awaited(result: Any) -> Any:
    """What a call gave, run to its end in an event loop of its own if it is something to await."""

    async def finish() -> Any:
        return await result

    return asyncio.run(finish()) if inspect.isawaitable(result) else result
