"""Compare the seconds of training until 70% of held-out questions are right: this library and TRL on the default job.

python -m benchmarks.time_to_accuracy                                        # three seeds
python -m benchmarks.time_to_accuracy --goal 0.6 --stop_after 100 --json FILE --picture curves.png
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import utils

from .arithmetic_job import ACCURACIES_FILE, RESULT_FILE, Job, check_job, seed_folder, write_job
from .curves import Curve, draw, make_curve, summarise, table
from .grpo_step import ROOT, TAIL, choose_peers, describe_machine
from .learner import LEARNERS
from .worker import environment
from .workload import Spec

OVERRIDES = {
    "steps": "training steps of a whole run, at the end of which the learning rate is 0",
    "stop_after": "stop each run after so many of its steps",
    "eval_first": "each of so many first steps is a point of the curve",
    "eval_every": "after those, every so many steps are a point of the curve",
    "num_questions": "held-out questions",
    "threads": "threads, and cores, that each peer gets; by default all",
    "trl_rows": "completions in one learning pass of TRL; by default what was fastest for it",
}
PICTURES = (".png", ".svg", ".pdf")  # file names of pictures end in one of these


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.time_to_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: utils.fail(message)
    parser.add_argument("--seeds", default="42,1,2", help="a run of each peer for each, in turns")
    parser.add_argument("--goal", type=float, default=0.7, help="share of right answers to held-out questions")
    for name, text in OVERRIDES.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument("--picture", type=Path, default=Path("time_to_accuracy.png"), help="the curves, as a picture")
    return parser.parse_args(argv)


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """Return a job for each seed.

    Raises:
        ValueError: a number is out of range, a seed is given twice, or a file cannot be written.
    """
    words = args.seeds.split(",")
    if not all(word.strip().isdigit() for word in words) or len({int(word) for word in words}) < len(words):
        raise ValueError(f"seeds={args.seeds!r}: expected whole numbers, each once, such as 42,1,2")
    if not 0 < args.goal <= 1:
        raise ValueError(f"goal={args.goal}: must be in (0, 1]")
    for name in ("json", "picture"):
        file = getattr(args, name)
        utils.check_output_file(name, file)
    if args.picture.suffix not in PICTURES:
        raise ValueError(f"picture={str(args.picture)!r}: expected a name that ends in {', '.join(PICTURES)}")
    cores = len(os.sched_getaffinity(0))
    given = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    jobs = [replace(Job(seed=int(word)), **({"threads": cores} | given)) for word in words]
    check_job(jobs[0])
    if jobs[0].threads > cores:
        raise ValueError(f"threads={jobs[0].threads}: this process may use {cores} cores")
    return jobs


def run_module(module: str, peer: str, job: Job, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a module of this folder to its end, in a process of its own with a peer's environment."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *args]
    return subprocess.run(command, cwd=ROOT, env=environment(peer, Spec(threads=job.threads)), text=True, **options)


def learn(peer: str, job: Job, folder: Path) -> dict[str, Any]:
    """Train one peer, and return what `learner.py` wrote. Ends the program when it fails, as both peers are needed."""
    started = time.perf_counter()
    done = run_module("learner", peer, job, peer, str(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        print(f"{peer}, seed {job.seed}: exit code {done.returncode}", file=sys.stderr)
        print("\n".join(done.stdout.strip().splitlines()[-TAIL:]), file=sys.stderr)
        sys.exit(1)
    result = json.loads((folder / peer / RESULT_FILE).read_text())
    print(
        f"seed {job.seed}, {peer}: {job.num_steps} steps in {result['seconds'][-1]:.1f} s "
        f"({time.perf_counter() - started:.0f} s in all)",
        flush=True,
    )
    return result


def run_all(jobs: Sequence[Job], folder: Path) -> dict[str, list[Curve]]:
    """Make the inputs, train the peers in turns, and evaluate what they saved. Returns each peer's curves, by seed."""
    for job in jobs:
        seed_folder(folder, job.seed).mkdir()
        write_job(job, seed_folder(folder, job.seed))
    run_module("arithmetic_job", "ours", jobs[0], str(folder), check=True)
    results = {(peer, job.seed): learn(peer, job, seed_folder(folder, job.seed)) for job in jobs for peer in LEARNERS}
    run_module("held_out", "ours", jobs[0], str(folder), check=True)
    accuracies = json.loads((folder / ACCURACIES_FILE).read_text())
    return {
        peer: [
            make_curve(
                job.seed,
                **results[peer, job.seed],
                start=accuracies["start"],
                accuracies=accuracies["runs"][str(job.seed)][peer],
            )
            for job in jobs
        ]
        for peer in LEARNERS
    }


def caption(summary: dict[str, Any]) -> str:
    """Return the text above the table in README.md: the command, the machine and the versions."""
    machine, job = summary["machine"], summary["job"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "trl"))
    return (
        f"`{summary['command']}`, {summary['date']}, {machine['processor']}, {job['threads']} thread(s); {versions}. "
        f"Of {job['num_questions']} held-out questions {summary['start_accuracy']:.1%} were right before training."
    )


def main() -> None:
    args = parse_args(sys.argv[1:])
    jobs = make_jobs(args)
    choose_peers(",".join(LEARNERS))
    job = jobs[0]
    print(
        f"{job.num_prompts} prompts x {job.num_completions} completions, {job.num_steps} of {job.steps} steps, "
        f"{job.num_questions} questions after {len(job.saved_steps)} of them, {job.threads} thread(s), "
        f"seeds {', '.join(str(job.seed) for job in jobs)}",
        flush=True,
    )
    with tempfile.TemporaryDirectory(prefix="tunix-torch-bench-") as name:
        curves = run_all(jobs, Path(name))
    summary = summarise(curves, args.goal) | {
        "job": asdict(job),
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.time_to_accuracy", *sys.argv[1:]]),
    }
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    draw(curves, args.goal, args.picture)
    print(f"\n{caption(summary)}\n\n{table(summary)}\n\ncurves: {args.picture}")


if __name__ == "__main__":
    utils.run_script(main)
