"""This library's side of a case: a real `TunixTrainer` whose learning steps are recorded as `save_batches` does it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import GRPOConfig, ModelConfig, TunixTrainer
from ..learn.logprobs import token_logps
from ..learn.passes import shared_prompts
from ..learn.record import StepRecord, record_step
from ..model import tiny
from ..model.decoding import fast_layers
from ..model.loading import lora_config
from .cases import COMPLETION_WIDTH, EOS, GROUP, NUM_PROMPTS, PROMPT_WIDTH, Case, make_model, make_rollout

RANK, ALPHA = 4, 6.0
LEARNING_RATE = 1e-4


def no_reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """The reward function that a trainer requires. The rewards of a case are given, so it is never called."""
    raise AssertionError("rewards are given")


@contextmanager
def saved_model(family: str, **overrides: Any) -> Iterator[Path]:
    """A temporary folder with a family's model, as `save_pretrained` writes it. See `make_model` for the arguments."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(family, **overrides).save_pretrained(folder)
        yield Path(folder)


def make_trainer(folder: Path, case: Case) -> TunixTrainer:
    """Return a trainer with the case's settings, and defaults for the others.

    Its LoRA has random B matrices, as a new LoRA, whose B matrices are zero, would change nothing in the model.
    """
    settings = {
        "num_completions_per_prompt": GROUP,
        "per_device_train_batch_size": NUM_PROMPTS,
        "generation_max_length": COMPLETION_WIDTH,
        "max_prompt_length": PROMPT_WIDTH,
        "micro_batch_size": 0,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": 1e-6,  # with a smaller one, rounding errors decide AdamW's step where a gradient is near 0
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "output_dir": str(folder / "unused"),
    } | case.settings
    trainer = TunixTrainer(
        str(folder),
        no_reward,
        GRPOConfig(**settings),
        processing_class=tiny.make_tokenizer(),
        peft_config=lora_config(ModelConfig(lora_rank=RANK, lora_alpha=ALPHA)),
    )
    trainer.sampler.eos_token_ids = (EOS,)  # the tokenizer's own end token stands among the random ids
    trainer.begin_run()  # before the LoRA changes anything, so that the reference is the model without it
    random = torch.Generator().manual_seed(7)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=random) * 0.1
            parameter.data.copy_(values)
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    return trainer


def lora_of(trainer: TunixTrainer) -> dict[str, torch.Tensor]:
    """Return copies of the trainer's LoRA matrices, by parameter name."""
    return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def record_steps(trainer: TunixTrainer, case: Case, count: int, empty: bool = True) -> list[StepRecord]:
    """Learn from the first `count` batches of `make_rollout`, with an optimizer step after each, and record the steps.

    `empty` is that of `make_rollout`.
    """
    trainer.current_gradient_accumulation_steps = 1
    records = []
    for number in range(count):
        prompts, rollout, rewards = make_rollout(number, empty)
        batch = trainer.make_train_batch(prompts, rollout, rewards)
        if case.given_old or case.given_sampler:
            with torch.no_grad(), fast_layers(trainer.model):
                logps, _ = token_logps(trainer.model, shared_prompts(batch), trainer.args.generation_temperature)
            random = torch.Generator().manual_seed(2000 + number)
            old, sampler = (
                (logps + 0.3 * torch.randn(logps.shape, generator=random)).masked_fill(~batch.completion_mask, 0.0)
                for _ in range(2)
            )
            batch.old_per_token_logps = old if case.given_old else None
            batch.sampler_logps = sampler if case.given_sampler else batch.sampler_logps
        parts = trainer.learning_pass(batch)
        records.append(record_step(trainer.model, batch, parts, trainer.optimizer.param_groups[0]["lr"]))
        trainer.optimizer_step()
    return records
