"""Warnings that are said once in a process, however often there is a reason for them."""

import logging

from . import together

_said: set[tuple[str, str]] = set()  # the logger's name, and the first sentence


def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning, unless one that begins with the same sentence was logged before. The first process does so."""
    said = logger.name, message.partition(".")[0]
    if said not in _said and together.is_first():
        _said.add(said)
        logger.warning("%s", message)
