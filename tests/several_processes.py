"""Start a job in several processes, and the parts of such a job that its tests share.

The tests hold a job's code as text, since the processes run it from a file: it imports from here what it shares.
"""

import subprocess
import sys
from collections.abc import Collection, Sequence
from typing import Any

import pytest
import torch
from graphs import environment


def launch(code, number, folder, *args, kind="cpu"):
    """Write a job's code into a folder and run it there by a number of processes."""
    (folder / "job.py").write_text(code)
    start = [] if number == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    command = [sys.executable, *start, str(folder / "job.py"), *map(str, args)]
    result = subprocess.run(command, env=environment(kind), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-9000:]


def marked(cases: Sequence[str], slow: Collection[str]) -> list[Any]:
    """Cases as parameters of a test, some of them marked slow."""
    return [pytest.param(case, marks=pytest.mark.slow) if case in slow else case for case in cases]


def asked_for(request: pytest.FixtureRequest, cases: Sequence[str], slow: Collection[str]) -> list[str]:
    """The cases that a fixture must run: without the slow ones, unless a slow test of its module is to be run."""
    of_module = (item for item in request.session.items if item.path == request.path)
    with_slow = any(item.get_closest_marker("slow") for item in of_module)
    return [case for case in cases if with_slow or case not in slow]


# ---- in a process of the job ----


def settings_of_case(root, case, steps, prompts) -> dict[str, Any]:
    """The settings of a short run by all processes, which share the prompts. The first one's folder is `root/case`."""
    from tunix_torch.runtime import together

    return {
        "output_dir": f"{root}/{case}" if together.index() == 0 else f"{root}/not-the-first/{case}",
        "per_device_train_batch_size": prompts // together.count(),
        "max_steps": steps,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # else where a gradient is nearly 0, its rounding decides where the weight goes
        "num_completions_per_prompt": 2,
        "generation_max_length": 12,
        "max_prompt_length": 40,
        "system_message": "",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_eval_batch_size": 4,
    }


def make_pairs(rows):
    """Give each row a chosen and a rejected answer of several lengths, in place."""
    for i, row in enumerate(rows):
        row |= {"chosen": "so " * (i % 3) + row["answer"], "rejected": "no" * (1 + i % 4)}


def completions_of(trainer):
    """A list to which the completions of all processes are added, rollout by rollout, as a trainer samples them."""
    from tunix_torch.runtime import together

    completions, sample = [], trainer.sample_completions_for_prompts

    def recording_sample(prompts):
        rollout = sample(prompts)
        of_steps = rollout.completion_ids.chunk(trainer.args.steps_per_generation)
        completions.append(torch.cat([together.gather_rows(ids) for ids in of_steps]))
        return rollout

    trainer.sample_completions_for_prompts = recording_sample
    return completions


def spoil_loss(trainer, step):
    """Make the loss of the last process alone not finite, in one optimizer step, counted from 0."""
    from tunix_torch.runtime import together

    learned, is_last = trainer.guard.learned, together.index() == together.count() - 1

    def spoiled(batch, loss):
        learned(batch, loss * float("nan") if is_last and trainer.state.global_step == step else loss)

    trainer.guard.learned = spoiled
