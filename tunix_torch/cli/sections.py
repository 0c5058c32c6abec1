"""Train from sections, as agent-tunix does: run_training.py, a Hydra app over the same job as train.py."""

import sys
from collections.abc import Sequence
from pathlib import Path

from .script import choose_device, need_extra, quiet_transformers


def device_among(words: Sequence[str]) -> list[str]:
    """`device=xla` among the words is `--device xla` for the other commands; as a list of flags, of one or none."""
    given = [word.partition("=")[2] for word in words if word.lstrip("+").startswith("device=")]
    return [f"--device={given[-1]}"] if given else []


def main(conf: Path, words: Sequence[str] | None = None) -> None:
    """Run the job, or the sweep of jobs, that the words of the command line describe.

    Args:
        conf: the folder with `config.yaml` and the sections.
        words: overrides and flags of Hydra; None: those of this process.

    Raises:
        ValueError: Hydra is not installed, or see `hydra_app.run_app`.
        SystemExit: with the exit code.
    """
    words = sys.argv[1:] if words is None else words
    need_extra("hydra", "hydra", "run_training.py")
    choose_device(device_among(words))
    from .hydra_app import run_app  # knows Transformers; the device is chosen

    quiet_transformers()
    run_app(conf, words)
