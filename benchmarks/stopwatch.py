"""Where the time of a step goes: a peer's own methods are wrapped with timers, and do what they did before."""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

PARTS = ("rollout", "scoring", "reference", "learning", "other")


class Stopwatch:
    """At any time the clock runs for one part: that of the innermost wrapped call, between calls for `self.rest`.

    So parts are disjoint and add up to the step, which is all the time from the end of the step before to its own:
    loading data and bookkeeping are in it, as "other".

    Args:
        wait: waits until the device has done what it was given; called where a part ends, with what the call returned.
    """

    def __init__(self, wait: Callable[[Any], object] = lambda result: None) -> None:
        self.steps: list[dict[str, float]] = []  # seconds by part
        self.rest = "other"
        self._wait = wait
        self._parts: list[str] = []  # open, innermost last
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = 0.0

    def start(self) -> None:
        """Begin the first step."""
        self._seconds.clear()
        self._since = time.perf_counter()

    def end_step(self) -> None:
        """The step is over, the next one begins."""
        self._wait(None)
        self._charge()
        self.steps.append(dict(self._seconds))
        self._seconds.clear()
        self.rest = "other"

    def _charge(self) -> None:
        now = time.perf_counter()
        self._seconds[self._parts[-1] if self._parts else self.rest] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
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
        """Time a method of an object, or a function of a module.

        Args:
            when: asked at each call; where it says no, the time stays with the part around it.
            rest: the part to which the time after the call belongs, until the step ends.
            seen: gets what the method returned, at no cost worth counting.
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
