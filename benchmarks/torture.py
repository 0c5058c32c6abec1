"""Kills a job at random moments, starts the same command again each time, and compares the end with that of one run.

    python -m benchmarks.torture                       # 100 kills, on the CPU
    python -m benchmarks.torture --kills 10 --seed 3
    TUNIX_DEVICE=xla python -m benchmarks.torture --kills 10

The job trains a small model with a checkpoint after each step, an evaluation after every second one, and records of
all batches. It is killed by SIGKILL at a moment that is drawn from all of the time that it takes, the making of the
model's first checkpoint, the last files and the moments between them included, until it comes to its end; then the
next job begins. All that a run leaves must be equal bit for bit to what a run leaves that was not killed: the adapter,
the optimizer's state, the records with their completions, and the metrics without those that measure time. And a start
must never begin anew where there was a whole checkpoint.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

STEPS = 6
FLAGS = (
    f"--use_grpo --max_steps {STEPS} --save_steps 1 --save_total_limit 3 --eval_steps 2 --eval_on_start true "
    f"--save_batches {STEPS} --per_device_train_batch_size 2 --num_completions_per_prompt 2 --generation_max_length 8 "
    "--num_eval_rows 4 --max_prompt_length 40 --system_message= --report_to none --resume_from_checkpoint auto "
    "--learning_rate 1e-2 --num_eval_completions 2"
).split()
TIMED = ("_runtime", "_per_second", "_time", "seconds", "_memory", "compilations")


def make_model(folder: Path) -> Path:
    """A model of the tiny one's size with random weights, which needs no warm start."""
    from tunix_torch.model import tiny

    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Job:
    """A job with a folder of its own, that is started again and again by one command."""

    def __init__(self, model: Path, output: Path) -> None:
        self.output, self.log = output, output.with_suffix(".log")
        self.command = [sys.executable, "train.py", *FLAGS, "--model_name", str(model), "--output_dir", str(output)]
        self.seconds = 0.0  # of work until it came to its end
        self.restarts = 0  # starts that began anew although there was a whole checkpoint

    def start(self, kill_after: float | None = None) -> int | None:
        """Run the command; the exit status, or None where it was killed after so many seconds of work."""
        from tunix_torch.checkpoints.files import newest_checkpoint

        had, aside = newest_checkpoint(self.output), len(self._set_aside())
        with open(self.log, "a") as log:
            process = subprocess.Popen(self.command, stdout=log, stderr=log, cwd=Path(__file__).parent.parent)
            lock = self.output / "run.lock"  # it is there from the moment when the job begins to work
            while process.poll() is None and not _is_of(lock, process.pid):
                time.sleep(0.01)
            began = time.perf_counter()
            try:
                status = process.wait(kill_after)
                self.seconds = time.perf_counter() - began
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status = None
        self.restarts += had is not None and len(self._set_aside()) > aside
        return status

    def _set_aside(self) -> list[Path]:
        return list((self.output / "previous").glob("*"))

    def result(self) -> dict[str, Any]:
        """What the job has left, as values that can be compared."""
        last = self.output / f"checkpoint-{STEPS}"
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        batches = sorted((self.output / "batches").glob("*.safetensors"))
        return {
            "adapter": (self.output / "adapter_model.safetensors").read_bytes(),
            "optimizer": _plain(torch.load(last / "optimizer.pt", weights_only=True)),
            "schedule": torch.load(last / "scheduler.pt", weights_only=True),
            "batches": {path.name: _plain(load_file(path)) for path in batches},
            "metrics": [{k: v for k, v in row.items() if not k.endswith(TIMED)} for row in rows],
            "checkpoints": sorted(path.name for path in self.output.glob("checkpoint-*")),
        }


def _is_of(lock: Path, process: int) -> bool:
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


def torture(kills: int, seed: int, folder: Path, say: Any = print) -> int:
    """Kill jobs so many times. Returns how many jobs ended otherwise than the one that was not killed."""
    generator = random.Random(seed)
    model = make_model(folder / "model")
    reference = Job(model, folder / "reference")
    assert reference.start() == 0, reference.log.read_text()
    expected, duration = reference.result(), reference.seconds
    done, number, wrong = 0, 0, 0
    while done < kills:
        number += 1
        job, killed = Job(model, folder / f"job-{number}"), 0
        while (status := job.start(generator.uniform(0, duration))) is None:
            killed += 1
        done += killed
        found = job.result() if status == 0 else {}
        different = [name for name in expected if found.get(name) != expected[name]]
        wrong += bool(different) or job.restarts > 0
        verdict = f"differs in {', '.join(different)}" if different else "equal"
        began = f"; began anew {job.restarts} times" if job.restarts else ""
        say(f"job {number}: {killed} kills, exit status {status}, {verdict}{began} ({done} of {kills} kills)")
        if different and status != 0:
            say(job.log.read_text()[-2000:])
    say(f"{number - wrong} of {number} jobs, killed {done} times, ended as the one that was not killed")
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
