"""Plan a job for a TPU slice on a machine without a TPU: does it compile, does it fit, how fast can it be at most?"""

import argparse
import json
import sys
from collections.abc import Sequence

from ..preflight.chips import parse_topology
from ..runtime.choice import tpu_backend
from .planning import own_flags, planning_parser, say, stand_for, stand_for_one_chip
from .script import called_as, quiet_transformers

EXAMPLES = """
COMMAND --config configs/gemma2_2b_v5e8.json --topology v5e:2x4
COMMAND --config configs/gemma3_1b.json --topology v5e:2x4 --quick    # arithmetic only, in seconds
COMMAND --config configs/gemma3_1b.json --topology v5e:2x4 --search   # which mesh, which micro-batch?

Every setting of train.py is a flag here too. The job's own graphs are traced with torch-xla and compiled by libtpu.
Where torch_tpu is installed, they are traced with torch_tpu, and are those of one chip.
Exit codes: 0 when the job fits (--quick: probably; --search: on some mesh), 1 when it does not, 2 for a mistake.
"""


def parse_args(argv: Sequence[str], command: str) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those of train.py.

    Raises:
        ValueError: a flag that is missing, or a file that can't be written.
    """
    parser = planning_parser(command, f"{__doc__}\n{EXAMPLES}", "the plan")
    parser.add_argument("--quick", action="store_true", help="arithmetic only: weights, KV cache, activations")
    parser.add_argument("--whole", action="store_true", help="compile all layers, however long it takes")
    parser.add_argument("--search", action="store_true", help="try meshes and micro-batches, and print the best first")
    return own_flags(parser, argv)


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Plan the job that the flags describe, and print the plan; exit code 1 where the job does not fit.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: the script of this process.

    Raises:
        ValueError: a setting that can't be, or a package that is missing.
    """
    ours, rest = parse_args(sys.argv[1:] if argv is None else argv, called_as(command))
    topology = parse_topology(ours.topology)
    if tpu_backend() == "tpu":
        stand_for_one_chip()
    else:
        stand_for(topology)
    from ..preflight import compiler, plan, quick, report, search

    plan.check_traceable()
    if not ours.quick:
        compiler.check_installed()
    quiet_transformers()
    job = plan.job_of(rest, topology, any_mesh=ours.search)

    if ours.search:
        candidates = search.search(job, rest, ours.quick, say)
        print("\n".join(search.lines_of(candidates)))
        best = vars(candidates[0]) if candidates else {"fits": False, "spare_fraction": None, "graphs": []}
        document = {name: best[name] for name in ("fits", "spare_fraction", "graphs")}
        document["candidates"], fits = [vars(candidate) for candidate in candidates], best["fits"]
    else:
        result = quick.quick_plan(job) if ours.quick else plan.plan_job(job, say, ours.whole)
        print("\n".join(report.lines_of(result)))
        document, fits = report.as_dict(result), result.fits
    if ours.json:
        ours.json.write_text(json.dumps(document, indent=1) + "\n")
    if not fits:
        sys.exit(1)
