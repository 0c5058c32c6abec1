"""One line at the bottom of a terminal that is drawn again and again, below whatever else is printed.

It never hides the cursor and takes no part of the screen, so a process that is killed leaves nothing worse behind than
a line of text.
"""

import os
import re
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from ..runtime.columns import columns_of

INTERVAL = 0.2  # seconds between two looks at what the line should say
ERASE = "\r\x1b[2K"


class LiveLine:
    """The line, from `start` to `stop`. Between them `sys.stdout` and `sys.stderr` write above it.

    Args:
        content: gives what the line says, for so many columns. A thread calls it a few times a second.
    """

    def __init__(self, content: Callable[[int], Text]) -> None:
        self.content = content
        self._lock = threading.RLock()  # a signal's handler may print while this thread draws
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._drawn = ""  # what is on the terminal now
        self._column = 0  # where other output has left an unfinished line: then nothing is drawn

    def start(self) -> None:
        """Draw the line, and keep it up to date."""
        self._out, self._streams = sys.stdout, (sys.stdout, sys.stderr)
        self._console = Console(file=self._out, highlight=False)
        sys.stdout = _Above(self, sys.stdout)
        if sys.stderr.isatty():
            sys.stderr = _Above(self, sys.stderr)
        _lines.append(self)
        self._ended.clear()
        self._thread = threading.Thread(target=self._keep_drawing, name="live line", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Erase the line, and let everything be printed as before. It may be called twice."""
        if self._thread is None:
            return
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
        with self._lock:
            self._erase()
            self._give_back()

    def _give_back(self) -> None:
        """Put `sys.stdout` and `sys.stderr` back, unless someone else has replaced them meanwhile."""
        self._thread = None
        for name, stream in zip(("stdout", "stderr"), self._streams, strict=True):
            if isinstance(getattr(sys, name), _Above):
                setattr(sys, name, stream)
        if self in _lines:
            _lines.remove(self)

    def write_above(self, stream: IO[str], text: str) -> int:
        """Write what another one prints where the line stands, and draw the line again below it, soon."""
        with self._lock:
            self._erase()
            written = stream.write(text)
            stream.flush()
            tail = re.split("[\r\n]", text)[-1]
            self._column = len(tail) + (self._column if tail == text else 0)
            return written

    def _keep_drawing(self) -> None:
        while not self._ended.wait(INTERVAL):
            with self._lock:
                if self._ended.is_set():
                    return
                try:
                    self._draw()
                except (OSError, ValueError):  # whoever read the output has gone; the run itself will notice
                    return

    def _draw(self) -> None:
        width = columns_of(self._out) - 1  # in the last column, terminals differ in what they do
        if self._column or width < 1:
            return
        self._console.width = width
        text = self.content(width)
        text.truncate(width, overflow="crop")
        with self._console.capture() as capture:
            self._console.print(text, end="", no_wrap=True, overflow="crop", crop=True)
        if capture.get() != self._drawn:
            self._drawn = capture.get()
            self._out.write(f"{ERASE}{self._drawn}")
            self._out.flush()

    def _erase(self) -> None:
        if self._drawn:
            self._drawn = ""
            self._out.write(ERASE)
            self._out.flush()


class _Above:
    """A stream that writes above the live line."""

    def __init__(self, line: LiveLine, stream: IO[str]) -> None:
        self._line, self._stream = line, stream

    def write(self, text: str) -> int:
        return self._line.write_above(self._stream, text)

    def writelines(self, lines: Any) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_lines: list[LiveLine] = []  # those that are shown: one, as a rule


def _in_child() -> None:
    """A forked process has no thread that draws, and the lock may be held by one that it does not have."""
    for line in list(_lines):
        line._give_back()


os.register_at_fork(after_in_child=_in_child)
