"""Says which reward functions have been running for long, so that a run that stands still explains itself."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

logger = logging.getLogger(__name__)

WARN_AFTER = 60.0  # seconds until the first warning; every later one comes after twice as long as the one before


class Running:
    """The reward functions that are running now.

    Args:
        what: what they score, for the warning, such as "16 completions of 4 prompts".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._since: dict[object, tuple[str, float]] = {}  # their names, and when they were called
        self._over = threading.Event()

    @contextlib.contextmanager
    def call_of(self, name: str) -> Iterator[None]:
        """Within this context the function of this name is running. Several threads may be in such contexts."""
        key = object()
        self._since[key] = name, time.monotonic()
        try:
            yield
        finally:
            del self._since[key]

    def watch(self) -> None:
        """Warn, again and again, of functions that do not return, until `end` is called."""
        pause = WARN_AFTER
        while not self._over.wait(pause):
            now = time.monotonic()
            slow = [(name, now - began) for name, began in list(self._since.values()) if now - began >= WARN_AFTER]
            for name, seconds in slow:
                logger.warning(
                    "Reward function %r has been running for %.3g s, for %s, and the run waits for it. If it hangs, "
                    "stop the run and mend it; reward_timeout ends the wait after so many seconds",
                    name,
                    seconds,
                    self.what,
                )
            pause *= 2

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
