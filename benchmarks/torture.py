"""Kills a job at random moments, starts the same command again each time, and compares the end with that of one run.

    python -m benchmarks.torture                       # 100 kills, on the CPU
    python -m benchmarks.torture --kills 10 --seed 3
    TUNIX_DEVICE=xla python -m benchmarks.torture --kills 10

The job makes the embedded tiny model in a cache of its own, by a short warm start, and trains it with a checkpoint
after each step, an evaluation after every second one, and records of all batches. It is killed by SIGKILL. For each
kill a phase of the job is drawn, then one of the times that the job comes to it, and then a moment within as long as it
took in the job that was not killed: so phases that last a hundredth of a second are hit as often as imports, which take
seconds. After as many kills as were drawn for it a job comes to its end, and the next one begins. On the CPU, starts
that shall come further than imports are forks of a process that has imported everything, which saves most of the time.

All that a job leaves must be equal bit for bit to what the job leaves that was not killed: the adapter, the optimizer's
state, the records with their completions, the metrics without those that measure time, the model in the cache; and
there must be no other files. No start may begin anew where there was a whole checkpoint.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .forks import ROOT, Forks
from .small_job import all_flags, command

STEPS = 6
FLAGS = (
    f"--max_steps {STEPS} --save_strategy steps --save_steps 1 --save_total_limit 3 --eval_strategy steps "
    f"--eval_steps 2 --eval_on_start true --save_batches {STEPS} --num_eval_completions 2 --logging_steps 1 "
    "--resume_from_checkpoint auto --warmup_steps 0 --kl_penalty_coef 0.01"
).split()
TIMED = ("_runtime", "_per_second", "_time", "seconds", "_memory", "compilations")
PHASES = (
    "imports",  # until the job holds its folder
    "warm start",  # of the tiny model
    "cache",  # the tiny model is written
    "set up",  # until the first step, or the first evaluation
    "evaluation",
    "step",  # rollout, rewards, learning
    "checkpoint",  # its files are written
    "manifest",  # it is whole, and gets its name; earlier ones are deleted
    "last files",  # adapter, state and curves
)
OFTEN = 1e-3  # seconds between two looks at a job


@dataclass(frozen=True)
class Kill:
    """A moment at which a job is killed: in the so-manieth time that it comes to a phase, after a share of its time."""

    phase: str
    time: int
    share: float


@dataclass
class Watched:
    """How a start of a job ended, and how long it was in its phases."""

    status: int | None  # None: it was killed
    killed_in: str | None = None
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})


class Job:
    """A job with folders of its own, that is started again and again by one command."""

    def __init__(self, folder: Path, forks: Forks | None = None) -> None:
        """`forks`: where starts that need no imports are made; None: every start is the command."""
        self.forks, self.output, self.cache, self.log = forks, folder / "run", folder / "cache", folder / "log.txt"
        folder.mkdir()
        self.restarts = 0  # starts that began anew although there was a whole checkpoint

    def start(self, kill: Kill | None = None, durations: dict[str, float] | None = None) -> Watched:
        """Run the command once.

        Args:
            kill: when it is killed, if it comes there.
            durations: how long each phase takes, in seconds; needed for a kill.
        """
        from tunix_torch.checkpoints.files import newest_checkpoint

        had, aside = newest_checkpoint(self.output), len(self._set_aside())
        self.log_before = self.log.stat().st_size if self.log.exists() else 0
        watched, phase, since, due = Watched(None), None, 0.0, None
        process = self._begin(forked=self.forks is not None and (kill is None or kill.phase != PHASES[0]))
        while process.poll() is None:
            now, moment = self.phase(process.pid), time.perf_counter()
            if now == PHASES[0] and phase not in (None, now):
                now = phase  # it has let its folder go, and ends
            if now != phase:
                if phase is not None:
                    watched.seconds[phase].append(moment - since)
                phase, since = now, moment
                if kill is not None and kill.phase == now and len(watched.seconds[now]) == kill.time:
                    due = moment + kill.share * durations[now]
            if due is not None and moment >= due - OFTEN:
                time.sleep(max(0, due - time.perf_counter()))
                process.kill()
                break
            time.sleep(OFTEN)
        watched.status = process.wait()
        if watched.status == -9 and due is not None:
            now = self.phase(process.pid)
            watched.status, watched.killed_in = None, phase if now == PHASES[0] else now
        elif phase is not None:
            watched.seconds[phase].append(time.perf_counter() - since)
        self.restarts += had is not None and len(self._set_aside()) > aside
        return watched

    def _begin(self, forked: bool) -> Any:
        """Start the command: a `subprocess.Popen`, or what is like one."""
        environment = {"TUNIX_CACHE": str(self.cache)}
        if forked:
            return self.forks.start("benchmarks.small_job:main", all_flags(self.output, *FLAGS), self.log, environment)
        with open(self.log, "a") as log:
            environment = os.environ | environment
            return subprocess.Popen(command(self.output, *FLAGS), stdout=log, stderr=log, cwd=ROOT, env=environment)

    def phase(self, process: int) -> str:
        """Where the job is, by the files that it has written. They still say so when it has been killed."""
        if not _holds(self.output / "run.lock", process):
            return "imports"
        if not self.is_cached():
            return "cache" if any(self.cache.glob("unfinished-*")) else "warm start"
        with open(self.log, "rb") as file:
            file.seek(self.log_before)
            if b"GRPO of " not in file.read():
                return "set up"
        if (self.output / "manifest.json").exists() or (self.output / f"checkpoint-{STEPS}").exists():
            return "last files"
        written = []
        with contextlib.suppress(FileNotFoundError):  # it is removed at this moment
            written = [path for path in (self.output / "unfinished").glob("checkpoint-*") if path.is_dir()]
        if written:
            return "manifest" if (written[0] / "manifest.json").exists() else "checkpoint"
        return "evaluation" if self._evaluates() else "step"

    def _evaluates(self) -> bool:
        """Whether the last log is of a step that is evaluated next, or there is none."""
        try:
            text = (self.output / "metrics.jsonl").read_text()
            row = json.loads(text.splitlines()[-1]) if text.endswith("\n") else {}
        except FileNotFoundError:
            return True
        return "loss" in row and row["step"] % 2 == 0 and not (self.output / f"checkpoint-{row['step']}").exists()

    def is_cached(self) -> bool:
        """Whether the tiny model is made."""
        return any(self.cache.glob("tunix-torch-tiny-*"))

    def _set_aside(self) -> list[Path]:
        return list((self.output / "previous").glob("*"))

    def result(self) -> dict[str, Any]:
        """What the job has left, as values that can be compared."""
        last = self.output / f"checkpoint-{STEPS}"
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        batches = sorted((self.output / "batches").glob("*.safetensors"))
        files = [path.name for place in (self.output, self.cache) for path in place.iterdir()]
        model = next(self.cache.glob("tunix-torch-tiny-*/model.safetensors"))
        return {
            "adapter": hashlib.sha256((self.output / "adapter_model.safetensors").read_bytes()).hexdigest(),
            "optimizer": _plain(torch.load(last / "optimizer.pt", weights_only=True)),
            "schedule": torch.load(last / "scheduler.pt", weights_only=True),
            "batches": {path.name: _plain(load_file(path)) for path in batches},
            "metrics": [{k: v for k, v in row.items() if not k.endswith(TIMED)} for row in rows],
            "model": hashlib.sha256(model.read_bytes()).hexdigest(),
            "files": sorted(name for name in files if name != "previous"),  # there where nothing whole was: `restarts`
        }


def _holds(lock: Path, process: int) -> bool:
    try:
        return json.loads(lock.read_text())["process"] == process
    except (OSError, ValueError):
        return False


def _plain(value: Any) -> Any:
    """The value with lists in place of tensors, which can be compared by ==."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def draw(generator: random.Random, reference: Watched, cached: bool) -> Kill:
    """Draw a moment. One that a start never comes to, as it has resumed a later step, lets it come to its end."""
    phase = generator.choice([name for name in PHASES if not (cached and name in ("warm start", "cache"))])
    times = generator.randrange(max(1, len(reference.seconds[phase])))
    return Kill(phase, min(times, generator.randrange(STEPS)), generator.random())


def torture(kills: int, seed: int, folder: Path, say: Any = print) -> int:
    """Kill jobs so many times. Returns how many jobs ended otherwise than the one that was not killed."""
    generator, where = random.Random(seed), Counter()
    whole = Job(folder / "reference")
    reference = whole.start()
    assert reference.status == 0, whole.log.read_text()
    expected = whole.result()
    durations = {phase: max(times, default=0.0) for phase, times in reference.seconds.items()}
    shown = (f"{name} {len(times)} x {durations[name]:.3f}" for name, times in reference.seconds.items())
    say(f"the job that is not killed, times and seconds: {', '.join(shown)}")
    from tunix_torch.runtime import device

    forks = None if device.is_accelerator() or device.traces_graphs() else Forks(os.environ)
    number, wrong = 0, 0
    while sum(where.values()) < kills:
        number += 1
        job, planned, killed = Job(folder / f"job-{number}", forks), generator.randint(1, 6), []
        while True:
            go_on = len(killed) < min(planned, kills - sum(where.values()))
            watched = job.start(draw(generator, reference, job.is_cached()) if go_on else None, durations)
            if watched.status is not None:
                break
            killed.append(watched.killed_in)
            where[watched.killed_in] += 1
        found = job.result() if watched.status == 0 else {}
        different = [name for name in expected if found.get(name) != expected[name]]
        wrong += bool(different) or job.restarts > 0
        verdict = f"differs in {', '.join(different)}" if different else "equal"
        began = f"; began anew {job.restarts} times" if job.restarts else ""
        at = f"killed in {', '.join(killed)}" if killed else "not killed"
        say(f"job {number}: {at}; exit status {watched.status}, {verdict}{began} ({sum(where.values())} of {kills})")
        for name in set(different) & {"files", "metrics"} if found else ():
            other = (
                [x for x in found[name] if x not in expected[name]],
                [x for x in expected[name] if x not in found[name]],
            )
            say(f"{name}: {other[0]}, expected {other[1]}"[:3000])
        if different and watched.status != 0:
            say(job.log.read_text()[-3000:])
    if forks is not None:
        forks.close()
    say("kills in each phase: " + ", ".join(f"{name} {where[name]}" for name in PHASES))
    say(f"{number - wrong} of {number} jobs, killed {sum(where.values())} times, ended as the one that was not killed")
    return wrong


def main() -> int:
    """Read the command line. The exit status is 1 if a job ended otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often a job is killed, in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        return int(torture(args.kills, args.seed, Path(folder), lambda text: print(text, flush=True)) > 0)


if __name__ == "__main__":
    sys.exit(main())
