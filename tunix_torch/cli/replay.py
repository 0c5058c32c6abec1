"""Compute a batch again whose loss or gradient was not finite, and say which row and which quantity was first."""

import argparse
import sys
from collections.abc import Sequence

from .script import Parser, choose_device, quiet_transformers

EXAMPLES = """
COMMAND outputs/bad_batches/step-0007.safetensors

A run skips such a batch, and keeps it in bad_batches/ of its output_dir with the weights of the adapter.
"""


def parse_args(argv: Sequence[str], command: str) -> argparse.Namespace:
    """Which batch.

    Raises:
        ValueError: an unknown flag, or no file.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    parser.add_argument("file", metavar="FILE", help="a file of bad_batches/ in a run's output_dir")
    parser.add_argument(
        "--weights",
        metavar="FOLDER",
        help="where all weights were trained: take those of this checkpoint (default: of the newest before the step)",
    )
    parser.add_argument("--device", help="auto, tpu, xla, cuda or cpu (default: auto)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Compute it again, and print what is found.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: `python -m tunix_torch.replay`.

    Raises:
        ValueError: see `replay`.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv, command or "python -m tunix_torch.replay")
    choose_device(argv)
    from ..run.replay import replay  # the device is chosen: what knows Transformers may be imported

    quiet_transformers()
    replay(args.file, args.weights)
