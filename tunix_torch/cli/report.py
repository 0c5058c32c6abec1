"""Write a report of a run: one page of HTML that opens without a network. With --compare, of two runs side by side."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config.settings import said_as
from .script import Parser, called_as, check_output_file, choose_device

EXAMPLES = """
COMMAND ./outputs                                  # writes ./outputs/report.html
COMMAND ./outputs --output /tmp/mine.html
COMMAND ./outputs --compare ./outputs/previous/20261130-120000

A run writes its report by itself when it ends; this writes it anew, also while the run is at work.
"""


def parse_args(argv: Sequence[str], command: str) -> argparse.Namespace:
    """Which run, or which two.

    Raises:
        ValueError: an unknown flag, or a folder that is missing.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="a run's folder")
    parser.add_argument("--compare", metavar="OTHER", help="another run's folder: compare the two")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        help="the file to write (default: report.html, or comparison.html, in OUTPUT_DIR)",
    )
    args = parser.parse_args(argv)
    check_output_file("output", args.output)
    return args


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Write the page, and print where it is.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: the script of this process.

    Raises:
        ValueError: see `write_report`.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv, called_as(command))
    choose_device(["--device=cpu"])  # the defaults of the settings are read from classes that choose a device
    from ..report.page import write_comparison, write_report

    if args.compare is None:
        print(write_report(args.output_dir, args.output))
    else:
        with said_as({"other=": "compare="}):
            print(write_comparison(args.output_dir, args.compare, args.output))
