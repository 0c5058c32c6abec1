"""Say what the curves of a run show that should not be so, with the lines of its metrics, and what to try."""

import argparse
import json
import sys
from collections.abc import Sequence

from ..report.diagnosis import diagnose, without_findings
from ..report.findings import in_plain_text
from ..report.looked_for import looked_for
from ..report.record import read_run
from .script import Parser

EXAMPLES = """
COMMAND ./outputs
COMMAND ./outputs --json

It looks for: a learning rate that is too high, a KL that runs away, a reward that pays for the wrong thing, a collapse,
repetition, groups without a signal, completions that are cut off, a layout that is learned without the answers, and a
reward that does not rise.
Of those whose numbers the run has not logged, it says so. docs/report.md has the bounds.
"""


def parse_args(argv: Sequence[str], command: str) -> argparse.Namespace:
    """Which run.

    Raises:
        ValueError: an unknown flag, or no folder.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="a run's folder; the run may be at work")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Print the findings.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: `python -m tunix_torch.diagnose`.

    Raises:
        ValueError: see `read_run`.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv, command or "python -m tunix_torch.diagnose")
    run = read_run(args.output_dir)
    findings, looked = diagnose(run), looked_for(run)
    if args.json:
        content = {"findings": [finding.as_dict() for finding in findings]}
        content |= {"looked_for": looked.names, "could_not_be_looked_for": looked.missing}
        print(json.dumps(content, indent=1))
    else:
        print(in_plain_text(findings, without_findings(run), looked.as_lines()))
