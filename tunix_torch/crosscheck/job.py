"""A part of the cross-check's table that is worked out by itself, in a process of its own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compare import Row


@dataclass(frozen=True)
class Job:
    kind: str  # "tunix", "trl" or "differences"
    family: str = ""
    cases: Sequence[str] | None = None  # None: all
    chain: int = 20  # AdamW steps


def run_job(job: Job) -> "list[Row]":
    """One job's rows."""
    os.environ["TUNIX_DEVICE"] = "cpu"
    quiet()
    from .run import rows_of

    return list(rows_of(job))


def quiet() -> None:
    """Import the library before Transformers, so that it decides for the CPU, and silence loading messages."""
    import tunix_torch  # noqa: F401

    # isort: split

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
