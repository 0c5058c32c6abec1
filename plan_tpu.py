"""Plan a job for a TPU slice on a machine without a TPU: does it compile, does it fit, how fast can it be at most?

python plan_tpu.py --config configs/gemma2_2b_v5e8.json --topology v5e:2x4
python plan_tpu.py --config configs/gemma3_1b.json --topology v5e:2x4 --quick    # arithmetic only, in seconds
python plan_tpu.py --config configs/gemma3_1b.json --topology v5e:2x4 --search   # which mesh, which micro-batch?

Every setting of train.py is a flag here too. The job's own graphs are traced with torch-xla and compiled by libtpu.
Exit codes: 0 when the job fits (--quick: probably; --search: on some mesh), 1 when it does not, 2 for a mistake.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import utils
from tunix_torch.preflight.chips import parse_topology


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and those of train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: utils.fail(message)
    parser.add_argument("--config", help="a JSON or YAML file with settings, as train.py takes it")
    parser.add_argument("--topology", required=True, help="a slice: v5e:2x4, v6e:4x4, v5p:2x2x1, ...")
    parser.add_argument("--json", type=Path, help="also write the plan to this file")
    parser.add_argument("--quick", action="store_true", help="arithmetic only: weights, KV cache, activations")
    parser.add_argument("--whole", action="store_true", help="compile all layers, however long it takes")
    parser.add_argument("--search", action="store_true", help="try meshes and micro-batches, and print the best first")
    ours, rest = parser.parse_known_args(argv)
    utils.check_output_file("json", ours.json)
    if ours.config:
        rest = ["--config", ours.config, *rest]
    return ours, rest


def main() -> None:
    ours, rest = parse_args(sys.argv[1:])
    topology = parse_topology(ours.topology)
    # as many devices on the CPU as the slice has chips; all of it before torch_xla is imported
    os.environ |= {"TUNIX_DEVICE": "xla", "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(topology.num_chips)}
    import logging

    from tunix_torch.preflight import compiler, plan, quick, report, search

    # isort: split

    from transformers.utils import logging as transformers_logging

    plan.check_traceable()
    if not ours.quick:
        compiler.check_installed()
    logging.basicConfig(format="%(message)s")
    transformers_logging.set_verbosity_error()
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


if __name__ == "__main__":
    utils.run_script(main)
