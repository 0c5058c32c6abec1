"""The embedded default job as plain numbers, for this library's trainer and for TRL's. Imports no torch.

`python -m benchmarks.arithmetic_job FOLDER` makes the inputs of all runs, in one process: the warm-started model, once,
and for each seed the training rows in the order in which both trainers take them.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODEL = "model"  # the folder of the model, beside those of the seeds
JOB_FILE, ROWS_FILE = "job.json", "rows.json"  # in the folder of a seed
PROMPT = "rendered"  # the column of that text: from "prompt" ours would take a question and render it again
RESULT_FILE = "run.json"  # of a peer, in a folder of its own in that of the seed: see learner.py
ACCURACIES_FILE = "accuracies.json"  # of all: see held_out.py


@dataclass(frozen=True)
class Job:
    """One run. What train.py decides has train.py's values: `tests/benchmarks/test_time_to_accuracy.py` holds that."""

    seed: int = 42
    steps: int = 80  # optimizer steps, and rollouts; the learning rate falls linearly to 0 at the last
    # the batch
    num_prompts: int = 32  # N
    num_completions: int = 4  # G, for each prompt
    prompt_length: int = 40  # tokens at most; no prompt is longer
    completion_length: int = 48  # tokens at most
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    # learning: GRPO with k3 as the estimator of KL, AdamW without weight decay
    lora_rank: int = 16
    lora_alpha: float = 32.0
    beta: float = 0.01  # weight of the KL penalty
    epsilon: float = 0.2
    learning_rate: float = 2e-3
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    # the measurement
    trl_rows: int = 32  # completions in one learning pass of TRL: see README.md
    stop_after: int | None = None  # steps; the learning rate falls as if there were all of them
    eval_first: int = 10  # steps from the first on, each of which is evaluated: the most is learned there
    eval_every: int = 5  # steps, after that
    num_questions: int = 256  # held out
    threads: int = 2

    @property
    def num_rows(self) -> int:
        """B = N * G."""
        return self.num_prompts * self.num_completions

    @property
    def num_steps(self) -> int:
        """Steps that are really taken."""
        return self.steps if self.stop_after is None else self.stop_after

    @property
    def saved_steps(self) -> list[int]:
        """After which steps the adapter is saved, to be evaluated afterwards; the last is one of them."""
        last = self.num_steps
        first = range(1, min(self.eval_first, last) + 1)
        return sorted({*first, *range(self.eval_every, last + 1, self.eval_every), last})


def check(job: Job) -> None:
    """Raises ValueError when a number that the user can give is out of range."""
    least = {"steps": 1, "eval_first": 0, "eval_every": 1, "num_questions": 1, "threads": 1, "trl_rows": 1}
    for name, smallest in least.items():
        if getattr(job, name) < smallest:
            raise ValueError(f"{name}={getattr(job, name)}: must be at least {smallest}")
    if job.stop_after is not None and not 1 <= job.stop_after <= job.steps:
        raise ValueError(f"stop_after={job.stop_after}: must be from 1 to steps={job.steps}")
    if job.num_rows % job.trl_rows:
        raise ValueError(f"trl_rows={job.trl_rows}: must divide the {job.num_rows} completions of a step")


def seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"


def adapter_folder(run: Path, step: int) -> Path:
    """Where a run's adapter after so many steps is."""
    return run / f"step-{step}"


def write_job(job: Job, folder: Path) -> None:
    (folder / JOB_FILE).write_text(json.dumps(asdict(job), indent=1) + "\n")


def read_job(folder: Path) -> Job:
    return Job(**json.loads((folder / JOB_FILE).read_text()))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The training rows of a seed, in order: question, answer, and the question as the text that the model sees."""
    return json.loads((folder / ROWS_FILE).read_text())


def make_inputs(jobs: Sequence[Job], folder: Path) -> None:
    """Write the model with its tokenizer, and the rows of each job's seed, into folders that are there."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from tunix_torch import DataConfig
    from tunix_torch.data.prompts import render_prompt
    from tunix_torch.data.sources import load_data
    from tunix_torch.model import tiny
    from tunix_torch.model.loading import load_base_model, load_tokenizer

    disable_progress_bar()
    tokenizer = load_tokenizer(tiny.NAME)
    load_base_model(tiny.NAME, torch.float32).save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)
    for job in jobs:
        rows = [
            {
                "question": row["question"],
                "answer": row["answer"],
                PROMPT: render_prompt(tokenizer, row["question"]),
            }
            for row in load_data(DataConfig(), job.seed)[0]
        ]
        (seed_folder(folder, job.seed) / ROWS_FILE).write_text(json.dumps(rows))


def main() -> None:
    folder = Path(sys.argv[1])
    make_inputs([read_job(file.parent) for file in sorted(folder.glob(f"*/{JOB_FILE}"))], folder)


if __name__ == "__main__":
    main()
