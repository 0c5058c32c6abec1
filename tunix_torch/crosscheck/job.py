"""Jobs of the cross-check: each computes a part of the table and can run in a process of its own."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compare import Row


@dataclass(frozen=True)
class Job:
    """What one process compares."""

    kind: str  # "tunix", "trl", "preferences" or "differences"
    family: str = ""  # of the model, for "tunix" and "trl"
    cases: Sequence[str] | None = None  # their names, for "tunix"; None means all
    chain: int = 20  # AdamW steps in a row, for "tunix"


def run_job(job: Job) -> "list[Row]":
    """Return one job's lines of the table."""
    os.environ["TUNIX_DEVICE"] = "cpu"
    quiet()
    from .run import rows_of

    return list(rows_of(job))


def quiet() -> None:
    """Silence the messages of loading models. Imports the library before Transformers, so that it chooses the CPU."""
    import tunix_torch  # noqa: F401

    # isort: split

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
