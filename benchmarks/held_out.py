"""Held-out accuracy of every saved adapter, in one process: `python -m benchmarks.held_out FOLDER`.

The same sampler, questions and judge for all, greedily, whichever trainer made the adapter. Written to FOLDER: the
accuracy of the warm-started model, and of each run's adapters by seed, peer and step.
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
from tunix_torch.data.prompts import Collator, prepare_rows
from tunix_torch.data.sources import load_eval_rows
from tunix_torch.evals.answers import judge_answers, sample_texts
from tunix_torch.model.loading import eos_token_ids, place
from tunix_torch.rewards import correctness_reward
from tunix_torch.runtime import device

from .arithmetic_job import ACCURACIES_FILE, JOB_FILE, MODEL, Job, adapter_folder, read_job
from .learner import LEARNERS
from .worker import keep_to_cores

BATCH_SIZE = 256  # questions at a time


def held_out_rows(job: Job, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The questions by which `train.py` evaluates, ready to be answered."""
    rows = load_eval_rows(DataConfig(num_eval_rows=job.num_questions))
    return prepare_rows(rows, tokenizer, job.prompt_length, overlong="raise")


def accuracy(path: Path, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, job: Job) -> float:
    """Greedy pass@1 of the model or adapter in a folder: the share of right answers to `held_out_rows`."""
    model = place(load_model(str(path), torch.float32)).eval()
    sampler = Sampler(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id)
    greedy = SamplingParams(job.completion_length, temperature=0.0)
    collator = Collator(tokenizer.pad_token_id, job.prompt_length)
    texts, lengths = sample_texts(sampler, tokenizer, rows, greedy, collator, BATCH_SIZE)
    return judge_answers(rows, texts, lengths, correctness_reward).accuracy


def main() -> None:
    assert device.KIND == "cpu", f"{device.KIND}, not cpu"
    disable_progress_bar()
    folder = Path(sys.argv[1])
    jobs = {file.parent: read_job(file.parent) for file in sorted(folder.glob(f"*/{JOB_FILE}"))}
    job = next(iter(jobs.values()))  # they differ in their seed only
    keep_to_cores(job.threads)
    tokenizer = load_tokenizer(str(folder / MODEL))
    rows = held_out_rows(job, tokenizer)
    runs = {
        str(seed.seed): {
            peer: {
                str(step): accuracy(adapter_folder(place / peer, step), rows, tokenizer, seed)
                for step in seed.saved_steps
            }
            for peer in LEARNERS
        }
        for place, seed in jobs.items()
    }
    result = {"start": accuracy(folder / MODEL, rows, tokenizer, job), "runs": runs}
    (folder / ACCURACIES_FILE).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
