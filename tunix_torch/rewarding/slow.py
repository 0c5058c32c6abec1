"""Says which reward functions have been running for long, so that a run that stands still explains itself."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

logger = logging.getLogger(__name__)

WARN_AFTER = 60.0  # seconds until the first warning; each later one comes after twice as long


@dataclass(eq=False)
class Call:
    """A reward function that is running."""

    name: str
    began: float  # by `time.monotonic`
    next_warning: float  # so many seconds later


class Running:
    """The reward functions that are running now.

    Args:
        what: what they score, for the warning, such as "16 completions of 4 prompts".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._calls: list[Call] = []
        self._over = threading.Event()

    @contextlib.contextmanager
    def call_of(self, name: str) -> Iterator[None]:
        """Within this context the function of this name is running. Several threads may be in such contexts."""
        call = Call(name, time.monotonic(), WARN_AFTER)
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    def watch(self) -> None:
        """Warn, again and again, of functions that do not return, until `end` is called."""
        while not self._over.wait(WARN_AFTER / 8):
            for call in list(self._calls):
                seconds = time.monotonic() - call.began
                if seconds < call.next_warning:
                    continue
                call.next_warning *= 2
                logger.warning(
                    "Reward function %r has been running for %.3g s, for %s, and the run waits for it. If it hangs, "
                    "stop the run and mend it; reward_timeout ends the wait after so many seconds",
                    call.name,
                    seconds,
                    self.what,
                )

    def end(self) -> None:
        """Stop watching."""
        self._over.set()


@contextlib.contextmanager
def warning_of_slow_functions(what: str) -> Iterator[Running]:
    """Within this context a thread warns of functions that run for more than `WARN_AFTER` seconds."""
    running = Running(what)
    threading.Thread(target=running.watch, daemon=True, name="slow-rewards").start()
    try:
        yield running
    finally:
        running.end()
