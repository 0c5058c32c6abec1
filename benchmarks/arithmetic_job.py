"""The library's default job, generated arithmetic, as plain numbers, so that TRL's trainer can be given the same job.

`time_to_accuracy.py` uses it. `python -m benchmarks.arithmetic_job FOLDER` writes the inputs of all runs: the
warm-started tiny model once, and for each seed the training rows in the order in which both trainers take them.
Importing this file does not import torch.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A folder of inputs and results: model/, accuracies.json, and for each seed job.json, rows.json and PEER/run.json.
MODEL = "model"
ACCURACIES_FILE = "accuracies.json"  # of all runs, written by held_out.py
JOB_FILE, ROWS_FILE = "job.json", "rows.json"
RESULT_FILE = "run.json"  # of one peer's run, written by learner.py
PROMPT = "rendered"  # the column with a rendered prompt; in a column "prompt" this library would expect a question


@dataclass(frozen=True)
class Job:
    """The settings of one run.

    Settings of train.py have the values of train.py's default job, which `tests/benchmarks/test_time_to_accuracy.py`
    holds.
    """

    seed: int = 42
    steps: int = 280  # training steps: a rollout and an optimizer step each; the learning rate falls linearly to 0
    # the batch
    num_prompts: int = 32  # N
    num_completions: int = 4  # G, for each prompt
    prompt_length: int = 40  # tokens of a prompt at most; no prompt of the job is longer
    completion_length: int = 48  # tokens of a completion at most
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    # learning: GRPO, where there is a KL penalty with the estimator k3, and AdamW without weight decay
    lora_rank: int = 16
    lora_alpha: float = 32.0
    beta: float = 0.0  # weight of the KL penalty
    epsilon: float = 0.2
    learning_rate: float = 2e-3
    schedule: str = "linear"
    warmup: float = 0.05  # share of all steps in which the learning rate rises
    max_grad_norm: float = 1.0
    # the measurement
    trl_rows: int = 32  # completions in one learning pass of TRL; README.md tells how it was chosen
    stop_after: int | None = None  # step after which to stop; the learning rate falls as in a run of all steps
    eval_first: int = 0  # each of so many first steps is evaluated
    eval_every: int = 10  # after those, every so many steps are evaluated
    num_questions: int = 256  # held-out questions of an evaluation
    threads: int = 2

    @property
    def num_rows(self) -> int:
        """B = N * G."""
        return self.num_prompts * self.num_completions

    @property
    def num_steps(self) -> int:
        """Number of steps that are taken."""
        return self.steps if self.stop_after is None else self.stop_after

    @property
    def saved_steps(self) -> list[int]:
        """The steps after which the adapter is saved, to be evaluated when training is over. The last is among them."""
        last = self.num_steps
        first = range(1, min(self.eval_first, last) + 1)
        return sorted({*first, *range(self.eval_every, last + 1, self.eval_every), last})


def check_job(job: Job) -> None:
    """Raise ValueError when a number that the user can give is out of range."""
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
    """Return the folder of a run's adapter after so many steps."""
    return run / f"step-{step}"


def write_job(job: Job, folder: Path) -> None:
    (folder / JOB_FILE).write_text(json.dumps(asdict(job), indent=1) + "\n")


def read_job(folder: Path) -> Job:
    return Job(**json.loads((folder / JOB_FILE).read_text()))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the training rows of a seed, in order: the question, the answer, and the rendered prompt (`PROMPT`)."""
    return json.loads((folder / ROWS_FILE).read_text())


def make_inputs(jobs: Sequence[Job], folder: Path) -> None:
    """Write the model, its tokenizer, and the rows of each job's seed. The folders of the seeds must exist."""
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
