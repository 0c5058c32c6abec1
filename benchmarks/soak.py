"""Trains a very small job for very many steps, and measures from outside whether anything grows.

    python -m benchmarks.soak                      # 10,000 steps, some fifteen minutes
    python -m benchmarks.soak --steps 1000 --logging_steps 1

The job has rewards with a time limit, evaluations, and checkpoints of which two are kept. After every so many steps the
process is looked at from outside: resident memory, open files, threads, time of the processor, and the size of the
run's folder. A line is fitted to each, after a warm-up. The exit status is 1 where a bound is broken:

- memory: less than 1 MB for each 1,000 steps;
- open files and threads: as many in the last quarter as in the first, as medians;
- seconds of the processor for a step: in the last quarter at most a fifth more than in the first;
- the folder, without what logs add to it: the same size in the last quarter as in the first, to a hundredth.

Each log is kept in the trainer's state, and the whole state is in every checkpoint. So what a log costs in memory and
in each checkpoint is measured besides, and no part of the last bound.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .small_job import ROOT, command, make_model

LOGS = ("metrics.jsonl", "trainer_state.json")  # files that hold every log


@dataclass(frozen=True)
class Sample:
    """What the process and its folder were at a step."""

    step: int
    memory: float  # MB, resident
    files: int  # open
    threads: int
    processor: float  # seconds so far
    seconds: float  # since the start
    disk: float  # MB, without logs
    logs: float  # MB


def look_at(process: int, folder: Path, step: int, started: float) -> Sample:
    """Measure a process that runs, and its folder."""
    of = Path("/proc", str(process))
    status = dict(line.split(":", 1) for line in (of / "status").read_text().splitlines())
    fields = (of / "stat").read_text().rpartition(")")[2].split()
    sizes = {True: 0, False: 0}
    for path in folder.rglob("*"):
        try:
            sizes[path.name in LOGS] += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue  # an old checkpoint was deleted at this moment
    return Sample(
        step=step,
        memory=int(status["VmRSS"].split()[0]) / 1024,
        files=len(list((of / "fd").iterdir())),
        threads=int(status["Threads"]),
        processor=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        seconds=time.perf_counter() - started,
        disk=sizes[False] / 2**20,
        logs=sizes[True] / 2**20,
    )


def last_step(metrics: Path) -> int:
    """The step of the last whole line of a run's metrics; 0: there is none."""
    if not metrics.is_file():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 16384))
        lines = file.read().split(b"\n")
    return json.loads(lines[-2])["step"] if len(lines) > 1 and lines[-2].startswith(b"{") else 0


def measure(steps: int, every: int, logging_steps: int, folder: Path) -> list[Sample]:
    """Run the job, and look at it after every so many steps."""
    flags = (
        f"--max_steps {steps} --logging_steps {logging_steps} --eval_strategy steps --eval_steps {5 * every} "
        f"--save_steps {2 * every} --save_total_limit 2 --reward_timeout 60 --disable_tqdm true "
        f"--lr_scheduler_type constant --learning_rate 1e-4"
    ).split()
    run, log, samples = folder / "run", folder / "log.txt", []
    started = time.perf_counter()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command(run, *flags, model=make_model(folder / "model")), stdout=file, stderr=file, cwd=ROOT
        )
    while process.poll() is None:
        step = last_step(run / "metrics.jsonl")
        if step >= every * (len(samples) + 1) and step < steps:
            samples.append(look_at(process.pid, run, step, started))
            if len(samples) % 10 == 0:
                print(_line(samples[-1]), flush=True)
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"the job ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return samples


def slope(samples: list[Sample], name: str) -> float:
    """How much a quantity grows in 1,000 steps, by the line that fits best."""
    x, y = [s.step for s in samples], [getattr(s, name) for s in samples]
    return statistics.linear_regression(x, y).slope * 1000


def report(samples: list[Sample], warm_up: int) -> list[str]:
    """Print what grew, and return the bounds that are broken."""
    samples = [s for s in samples if s.step >= warm_up]
    if len(samples) < 8:
        raise ValueError(f"{len(samples)} samples after a warm-up of {warm_up} steps: too few for a line")
    quarter = len(samples) // 4
    first, last = samples[: quarter + 1], samples[-quarter - 1 :]

    def rate(part: list[Sample], name: str) -> float:
        return (getattr(part[-1], name) - getattr(part[0], name)) / (part[-1].step - part[0].step)

    def median(part: list[Sample], name: str) -> float:
        return statistics.median(getattr(s, name) for s in part)

    processor = rate(first, "processor"), rate(last, "processor")
    pairs = {name: (median(first, name), median(last, name)) for name in ("memory", "files", "threads", "disk", "logs")}
    table = [
        ("resident memory, MB", *pairs["memory"], slope(samples, "memory")),
        ("open files", *pairs["files"], slope(samples, "files")),
        ("threads", *pairs["threads"], slope(samples, "threads")),
        ("processor, ms a step", *(1000 * s for s in processor), None),
        ("clock, ms a step", 1000 * rate(first, "seconds"), 1000 * rate(last, "seconds"), None),
        ("folder without logs, MB", *pairs["disk"], slope(samples, "disk")),
        ("logs, MB", *pairs["logs"], slope(samples, "logs")),
    ]
    print(f"\n| steps {samples[0].step} to {samples[-1].step} | first quarter | last quarter | slope in 1,000 steps |")
    print("|---|---|---|---|")
    for name, before, after, growth in table:
        print(f"| {name} | {before:.2f} | {after:.2f} | {'' if growth is None else f'{growth:+.3f}'} |")
    broken = {
        f"memory grows by {slope(samples, 'memory'):.2f} MB in 1,000 steps": slope(samples, "memory") >= 1,
        "more open files": pairs["files"][1] > pairs["files"][0],
        "more threads": pairs["threads"][1] > pairs["threads"][0],
        "steps take longer": processor[1] > 1.2 * processor[0],
        "the folder grows": pairs["disk"][1] > 1.01 * pairs["disk"][0],
    }
    return [text for text, is_broken in broken.items() if is_broken]


def _line(s: Sample) -> str:
    process = f"{s.memory:.1f} MB, {s.files} files, {s.threads} threads, {s.processor:.0f} s of the processor"
    return f"step {s.step}: {process}, {s.seconds:.0f} s; folder {s.disk:.2f} MB and logs {s.logs:.2f} MB"


def main() -> int:
    """Read the command line, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps")
    parser.add_argument("--every", type=int, default=100, help="steps between two samples")
    parser.add_argument("--warm_up", type=int, default=500, help="steps before the first sample that counts")
    parser.add_argument("--logging_steps", type=int, default=10, help="steps between two logs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        broken = report(measure(args.steps, args.every, args.logging_steps, Path(folder)), args.warm_up)
    print("\n".join(f"BROKEN: {text}" for text in broken) or "every bound holds")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
