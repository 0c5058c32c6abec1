"""Compile a job's training step and Tunix's for the same TPU slice, and compare what both must do, without a TPU."""

import argparse
import json
import sys
from collections.abc import Sequence

from ..preflight.chips import parse_topology
from .planning import own_flags, planning_parser, say, stand_for
from .script import quiet_transformers

EXAMPLES = """
COMMAND --config configs/gemma2_2b_v5e8.json --topology v5e:2x4
COMMAND --config configs/gemma3_1b.json --topology v5e:2x4 --json beside.json

Every setting of train.py is a flag here too. Both sides are compiled by libtpu, ours as `plan_tpu.py` does it, and
Tunix with the rows in a pass and the rematerialisation that are best for it. Results are kept.
"""

# Assumed, and measured by nobody here: what a collective takes however small it is. It is a low figure, so that having
# fewer collectives is worth more than the table says.
COLLECTIVE_US = 1.0


def parse_args(argv: Sequence[str], command: str) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those of train.py.

    Raises:
        ValueError: a flag that is missing, a cost below 0, or a file that can't be written.
    """
    parser = planning_parser(command, f"{__doc__}\n{EXAMPLES}", "all figures")
    parser.add_argument(
        "--collective_us", type=float, default=COLLECTIVE_US, help="microseconds that each collective costs"
    )
    ours, rest = own_flags(parser, argv)
    if not ours.collective_us >= 0:
        raise ValueError(f"collective_us={ours.collective_us}: expected microseconds, 0 or more")
    return ours, rest


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Compile both sides of the job that the flags describe, and print the table.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: `python -m preflight.beside_tunix`.

    Raises:
        ValueError: a setting that can't be, a model that Tunix does not have, or a package that is missing.
    """
    ours, rest = parse_args(sys.argv[1:] if argv is None else argv, command or "python -m preflight.beside_tunix")
    topology = parse_topology(ours.topology)
    stand_for(topology)
    from ..preflight import beside, compiler, plan, tunix_plan

    plan.check_traceable()
    compiler.check_installed()
    tunix_plan.check_installed()
    quiet_transformers()
    job = plan.job_of(rest, topology)
    tunix_plan.check_model(job)

    cost = ours.collective_us / 1e6
    ours_planned = plan.plan_job(job, say)  # first, since it is quicker to say that a mesh does not divide the job
    comparison = beside.Comparison(ours_planned, tunix_plan.plan_tunix(job, cost, say), cost)
    print("\n".join(beside.lines_of(comparison)))
    if ours.json:
        ours.json.write_text(json.dumps(beside.as_dict(comparison), indent=1) + "\n")
