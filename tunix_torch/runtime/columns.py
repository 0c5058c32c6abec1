"""How wide the terminal is that a stream writes to."""

import contextlib
import os
import shutil
from typing import IO


def columns_of(stream: IO[str]) -> int:
    """The columns of the terminal as it is now, whatever COLUMNS says: it may be exported, and the window another one.
    Where the stream is no terminal, what COLUMNS says, else 80."""
    with contextlib.suppress(OSError, ValueError):
        if columns := os.get_terminal_size(stream.fileno()).columns:
            return columns
    return shutil.get_terminal_size().columns
