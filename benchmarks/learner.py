"""Train one peer on the arithmetic job in a fresh process, for `time_to_accuracy.py`.

`python -m benchmarks.learner PEER FOLDER` takes the folder of a seed, with its job and rows; the model's folder is
beside it. It writes to FOLDER/PEER the adapters after the job's `saved_steps`, and the seconds at the end of each step.
"""

import functools
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arithmetic_job import RESULT_FILE, Job, read_job, read_rows
from .worker import keep_to_cores

LEARNERS = {"ours": "learner_ours", "trl": "learner_trl"}

Reward = Callable[..., list[float | None]]


@dataclass
class Run:
    """The times of one peer's training, and what it was trained on."""

    seconds: list[float]  # since training began, at the end of each step, without saving
    startup_seconds: float  # before training began: imports, loading the model, making the trainer
    answers: list[list[str]]  # for each step, the right answer to the question of each completion


def remember_answers(reward: Reward, seen: list[list[str]]) -> Reward:
    """Return the same reward function, which also appends the right answers of each call to `seen`."""

    @functools.wraps(reward)
    def remembering(
        prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **columns: Any
    ) -> list[float | None]:
        seen.append(list(answer))
        return reward(prompts, completions, answer=answer, **columns)

    return remembering


def check_run(job: Job, rows: Sequence[dict[str, Any]], run: Run) -> None:
    """Raise AssertionError unless the peer took the rows that it was given, in order, in every step."""
    assert len(run.seconds) == job.num_steps, f"{len(run.seconds)} steps, not {job.num_steps}"
    assert len(run.answers) == job.num_steps, f"{len(run.answers)} rollouts in {job.num_steps} steps"
    for step, answers in enumerate(run.answers):
        turn = [rows[(step * job.num_prompts + i) % len(rows)] for i in range(job.num_prompts)]
        expected = [row["answer"] for row in turn for _ in range(job.num_completions)]
        assert answers == expected, f"step {step + 1} took other rows than those whose turn it was"


def main() -> None:
    started = time.perf_counter()
    peer, folder = sys.argv[1], Path(sys.argv[2])
    job = read_job(folder)
    keep_to_cores(job.threads)
    run = importlib.import_module(f".{LEARNERS[peer]}", __package__).run(job, folder, started)
    check_run(job, read_rows(folder), run)
    result = {"seconds": run.seconds, "startup_seconds": run.startup_seconds}
    (folder / peer / RESULT_FILE).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
