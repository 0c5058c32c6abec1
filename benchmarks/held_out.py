"""Evaluate every saved adapter on the held-out questions, for `time_to_accuracy.py`.

`python -m benchmarks.held_out FOLDER` does it in one process. The sampler, the questions and the judge are the same
whichever trainer made an adapter, and tokens are chosen greedily. It writes to FOLDER the accuracy of the warm-started
model, and those of each run's adapters by seed, peer and step.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tunix_torch  # noqa: F401  # first: it decides for or against XLA

# isort: split

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from tunix_torch import DataConfig, Sampler, SamplingParams, load_model, load_tokenizer
from tunix_torch.data.batches import Collator
from tunix_torch.data.prompts import prepare_rows
from tunix_torch.data.sources import load_eval_rows
from tunix_torch.evals.answers import judge_answers, sample_texts
from tunix_torch.model.loading import eos_token_ids, place
from tunix_torch.rewards import correctness_reward
from tunix_torch.runtime import device

from .arithmetic_job import ACCURACIES_FILE, JOB_FILE, MODEL, Job, adapter_folder, read_job
from .learner import LEARNERS
from .worker import keep_to_cores

BATCH_SIZE = 256  # questions that are answered together


def held_out_rows(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Return the questions with which `train.py` evaluates, prepared for the sampler."""
    rows = load_eval_rows(DataConfig(num_eval_rows=job.num_questions))
    return prepare_rows(rows, tokenizer, job.prompt_length, overlong="raise")


def accuracy(path: Path, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, job: Job) -> float:
    """Return the share of right greedy answers (pass@1) of the model or adapter in a folder."""
    model = place(load_model(str(path), torch.float32)).eval()
    sampler = Sampler(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id)
    greedy = SamplingParams(job.completion_length, temperature=0.0)
    collator = Collator(tokenizer.pad_token_id, job.prompt_length)
    texts, tokens = sample_texts(sampler, tokenizer, rows, greedy, collator, BATCH_SIZE)
    return judge_answers(rows, texts, tokens, correctness_reward).accuracy


def main() -> None:
    assert device.KIND == "cpu", f"{device.KIND}, not cpu"
    disable_progress_bar()
    folder = Path(sys.argv[1])
    jobs = {file.parent: read_job(file.parent) for file in sorted(folder.glob(f"*/{JOB_FILE}"))}
    job = next(iter(jobs.values()))  # the jobs differ only in their seed
    keep_to_cores(job.threads)
    tokenizer = load_tokenizer(str(folder / MODEL))
    rows = held_out_rows(job, tokenizer)
    runs = {
        str(job.seed): {
            peer: {
                str(step): accuracy(adapter_folder(seed_folder / peer, step), rows, tokenizer, job)
                for step in job.saved_steps
            }
            for peer in LEARNERS
        }
        for seed_folder, job in jobs.items()
    }
    result = {"start": accuracy(folder / MODEL, rows, tokenizer, job), "runs": runs}
    (folder / ACCURACIES_FILE).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
