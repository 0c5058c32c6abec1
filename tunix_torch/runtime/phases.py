"""Tells whoever watches what a run is doing at this moment, and how far it is; as a rule nobody does."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

# What is counted within a phase.
TOKENS, ROWS, QUESTIONS = "tokens", "rows", "questions"


class Watcher(Protocol):
    """Shows what a run does, such as on a terminal. Its methods are called often, so they must be quick."""

    def began(self, phase: str) -> None:
        """A phase has begun, maybe within another one: rollout, scoring, learning, evaluating and the like."""

    def ended(self, phase: str) -> None:
        """It is over, by an exception too."""

    def advanced(self, what: str, done: int, total: int, how: str = "") -> None:
        """So many of all tokens (of the longest completion), rows or questions are done. `how` says which ones, where
        the same ones are counted more than once, such as "greedy"; "": there are no others."""

    def close(self) -> None:
        """The run is over, by an exception too: leave nothing behind."""


_watcher: Watcher | None = None


def watch(watcher: Watcher | None) -> None:
    """From now on this one watches; None: nobody."""
    global _watcher
    _watcher = watcher


def is_watched() -> bool:
    """Whether anybody watches."""
    return _watcher is not None


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Within this context the run is in a phase. For the watcher alone: nothing else follows from it."""
    if _watcher is None:
        yield
        return
    _watcher.began(phase)
    try:
        yield
    finally:
        if _watcher is not None:
            _watcher.ended(phase)


def advance(what: str, done: int, total: int, how: str = "") -> None:
    """So many of all tokens, rows or questions of this phase are done; see `Watcher.advanced`. Nothing waits for the
    device to know it."""
    if _watcher is not None:
        _watcher.advanced(what, done, total, how)


@contextlib.contextmanager
def closing() -> Iterator[None]:
    """When the block ends, however it does, whoever watches leaves nothing behind on the terminal."""
    try:
        yield
    finally:
        if _watcher is not None:
            _watcher.close()
