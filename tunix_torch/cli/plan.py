"""Plan a job for a TPU slice on a machine without a TPU: does it compile, does it fit, how fast can it be at most?"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..preflight.chips import parse_topology
from .script import Parser, called_as, check_output_file, choose_device, quiet_transformers

EXAMPLES = """
COMMAND --config configs/gemma2_2b_v5e8.json --topology v5e:2x4
COMMAND --config configs/gemma3_1b.json --topology v5e:2x4 --quick    # arithmetic only, in seconds
COMMAND --config configs/gemma3_1b.json --topology v5e:2x4 --search   # which mesh, which micro-batch?

Every setting of train.py is a flag here too. The job's own graphs are traced with torch-xla and compiled by libtpu.
Exit codes: 0 when the job fits (--quick: probably; --search: on some mesh), 1 when it does not, 2 for a mistake.
"""


def parse_args(argv: Sequence[str], command: str) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those of train.py.

    Raises:
        ValueError: a flag that is missing, or a file that can't be written.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    parser.add_argument("--config", help="a JSON or YAML file with settings, as train.py takes it")
    parser.add_argument("--topology", required=True, help="a slice: v5e:2x4, v6e:4x4, v5p:2x2x1, ...")
    parser.add_argument("--json", type=Path, help="also write the plan to this file")
    parser.add_argument("--quick", action="store_true", help="arithmetic only: weights, KV cache, activations")
    parser.add_argument("--whole", action="store_true", help="compile all layers, however long it takes")
    parser.add_argument("--search", action="store_true", help="try meshes and micro-batches, and print the best first")
    ours, rest = parser.parse_known_args(argv)
    check_output_file("json", ours.json)
    if ours.config:
        rest = ["--config", ours.config, *rest]
    return ours, rest


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
    # as many devices on the CPU as the slice has chips; all of it before torch_xla is imported
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(topology.num_chips)}
    choose_device(["--device=xla"])
    from ..preflight import compiler, plan, quick, report, search

    plan.check_traceable()
    if not ours.quick:
        compiler.check_installed()
    quiet_transformers()
    job = plan.job_of(rest, topology, any_mesh=ours.search)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

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
