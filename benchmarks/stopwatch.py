"""Measure how a training step's time divides into parts, by timers around a peer's own methods."""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

PARTS = ("rollout", "scoring", "reference", "learning", "other")


class Stopwatch:
    """A clock that runs, at any time, for exactly one part of a step.

    That is the part of the innermost wrapped call, and `self.rest` between calls. The parts therefore add up to the
    step's time, which lasts from the end of the previous step to its own end. Loading data and bookkeeping count as
    "other".

    Args:
        wait: waits until the device has finished its work. It is called where a part ends, with the call's result.
    """

    def __init__(self, wait: Callable[[Any], object] = lambda result: None) -> None:
        self.steps: list[dict[str, float]] = []  # of each step, the seconds of each part
        self.rest = "other"
        self._wait = wait
        self._parts: list[str] = []  # of the calls that are running, innermost last
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = 0.0

    def start(self) -> None:
        """Start the first step."""
        self._seconds.clear()
        self._since = time.perf_counter()

    def end_step(self) -> None:
        """End the step, and start the next one."""
        self._wait(None)
        self._charge()
        self.steps.append(dict(self._seconds))
        self._seconds.clear()
        self.rest = "other"

    def _charge(self) -> None:
        """Add the time since the last call to the part for which the clock ran."""
        now = time.perf_counter()
        self._seconds[self._parts[-1] if self._parts else self.rest] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A context whose time counts for a part."""
        assert name in PARTS, name
        self._charge()
        self._parts.append(name)
        try:
            yield
            self._wait(None)
        finally:
            self._charge()
            self._parts.pop()

    def wrap(
        self,
        owner: Any,
        method: str,
        part: str,
        *,
        when: Callable[[], bool] = lambda: True,
        rest: str | None = None,
        seen: Callable[[Any], None] = lambda result: None,
    ) -> None:
        """Replace a method of an object, or a function of a module, by itself with a timer around it.

        Args:
            when: called at each call; if it returns False, the call's time counts for the part around it.
            rest: the part for which the time after the call counts, until the step ends.
            seen: called with each result of the method; it must be quick, as its time is not left out.
        """
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part) if when() else contextlib.nullcontext():
                result = original(*args, **kwargs)
                self._wait(result)
            seen(result)
            self.rest = rest or self.rest
            return result

        setattr(owner, method, timed)
