"""A training job that takes seconds, by the command that a user gives: for what is done to a job from outside.

python -m benchmarks.small_job FLAGS     # as train.py, with a short warm start of the tiny model
"""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--use_grpo --per_device_train_batch_size 2 --num_completions_per_prompt 4 --generation_max_length 8 "
    "--max_prompt_length 40 --system_message= --lora_rank 4 --learning_rate 1e-2 --num_train_rows 64 --num_eval_rows 4 "
    "--reward_funcs benchmarks.small_job.share_of_digits --report_to none"
).split()
WARM_START_STEPS = 4


def share_of_digits(completions: Sequence[str], **columns: object) -> list[float]:
    """A reward that a model with random weights gets now and then, so that there is a gradient in every step."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def make_model(folder: Path) -> Path:
    """A Gemma of two layers with random weights and the tiny one's tokenizer, which needs no warm start."""
    from tunix_torch.model import tiny

    tokenizer = tiny.make_tokenizer()
    model = tiny.make_model(tokenizer)
    config = model.config
    config.num_hidden_layers, config.layer_types = 2, config.layer_types[:2]
    config.hidden_size, config.intermediate_size, config.head_dim = 32, 64, 16
    config.num_attention_heads, config.query_pre_attn_scalar = 2, 16
    type(model)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def command(output: Path, *flags: str, model: Path | None = None) -> list[str]:
    """The command of the job, to be run in `ROOT`; later flags win.

    Args:
        model: None: the embedded tiny one, whose warm start is short.
    """
    script = ["-m", "benchmarks.small_job"] if model is None else ["train.py", "--model_name", str(model)]
    return [sys.executable, *script, *all_flags(output, *flags)]


def all_flags(output: Path, *flags: str) -> list[str]:
    """The flags of the job; later ones win."""
    return [*FLAGS, "--output_dir", str(output), *flags]


def main() -> None:
    """Train by the flags of the command line. The tiny model's warm start has few steps, and so a name of its own."""
    from tunix_torch.cli.train import main as train
    from tunix_torch.model import tiny

    tiny.WARM_START["steps"] = WARM_START_STEPS
    train()


if __name__ == "__main__":
    from tunix_torch.cli.script import run_script

    run_script(main)
