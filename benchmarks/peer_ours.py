"""Measure this library's `TunixTrainer` for `grpo_step.py`: on the CPU, through XLA on the CPU, or on CUDA.

Completions are forced to the lengths of the spec, as all peers must do the same work. The sampler turns one uniform
number into a token by walking the vocabulary in its order, in which EOS is first. The number 0 therefore gives EOS, and
a number from [0.1, 1) gives no special token. The trainer's numbers are scaled into that interval, and set to 0 where a
row shall end. The sampler itself is unchanged and does not know any length in advance.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import tunix_torch  # noqa: F401  # first: it decides for or against XLA

# isort: split

import torch
from transformers import TrainerCallback

from tunix_torch import GRPOConfig, ModelConfig, TunixTrainer, load_tokenizer
from tunix_torch import trainer as trainer_module
from tunix_torch.model.loading import load_base_model, lora_config
from tunix_torch.runtime import device

from .step_ends import StepEnds
from .stopwatch import Stopwatch
from .worker import Measurement
from .workload import Spec, ends_itself, lengths, read_prompts, share_of_even_words

ABOVE_SPECIAL = 0.1  # more than the probability of all special tokens under a model with random weights


def make_trainer(spec: Spec, folder: Path, callbacks: list[TrainerCallback]) -> TunixTrainer:
    """Return a trainer with the spec's settings and the model and prompts of the folder."""
    args = GRPOConfig(
        output_dir=str(folder / "ours"),
        max_steps=spec.warmup + spec.steps,
        per_device_train_batch_size=spec.num_prompts,
        num_completions_per_prompt=spec.num_completions,
        max_prompt_length=spec.prompt_length,
        generation_max_length=spec.completion_length,
        generation_temperature=1.0,
        generation_top_p=1.0,
        generation_top_k=0,
        kl_penalty_coef=spec.beta,
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        system_message="",
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return TunixTrainer(
        load_base_model(str(folder), getattr(torch, spec.dtype)),
        share_of_even_words,
        args,
        [{"question": prompt, "answer": "0"} for prompt in read_prompts(folder)],
        processing_class=load_tokenizer(str(folder)),
        peft_config=lora_config(ModelConfig(lora_rank=spec.lora_rank, lora_alpha=spec.lora_alpha)),
        callbacks=callbacks,
    )


def force_lengths(draw: Callable[..., torch.Tensor], spec: Spec) -> Callable[..., torch.Tensor]:
    """Return a function that draws uniform numbers like `draw`, but such that rows end where the spec wants it."""
    last = torch.tensor([n - 1 if ends else -1 for n, ends in zip(lengths(spec), ends_itself(spec), strict=True)])

    def drawn(seed: Sequence[int], rows: Sequence[int], num_tokens: int) -> torch.Tensor:
        uniforms = ABOVE_SPECIAL + (1 - ABOVE_SPECIAL) * draw(seed, rows, num_tokens)  # (rows, num_tokens)
        return uniforms.masked_fill(torch.arange(num_tokens) == last[torch.tensor(rows)][:, None], 0.0)

    return drawn


def run(spec: Spec, folder: Path) -> Measurement:
    """Train for the spec's steps, and measure the parts of each."""
    assert device.KIND in ("xla", spec.device), f"{device.KIND}, not {spec.device}"
    watch, rollouts, losses = Stopwatch(lambda result: device.wait()), [], []
    trainer = make_trainer(spec, folder, [StepEnds(watch)])
    # after `training_step`, Transformers clips gradients and steps the optimizer, which is learning as well
    watch.wrap(trainer, "training_step", "learning", rest="learning", seen=losses.append)
    watch.wrap(trainer, "collect", "other")
    watch.wrap(trainer, "sample_completions_for_prompts", "rollout", seen=rollouts.append)
    watch.wrap(trainer.processing_class, "batch_decode", "rollout")
    watch.wrap(trainer, "compute_rewards_for_completions", "scoring")
    reference_policy = trainer_module.reference_policy

    @functools.wraps(reference_policy)
    @contextlib.contextmanager
    def timed_reference_policy(*args: object) -> Iterator[None]:
        with watch.part("reference"), reference_policy(*args):
            yield

    with (
        mock.patch.object(trainer_module, "reference_policy", timed_reference_policy),
        mock.patch.object(trainer_module, "draw_uniforms", force_lengths(trainer_module.draw_uniforms, spec)),
    ):
        trainer.train()
    return Measurement(
        watch.steps,
        [rollout.completion_mask.sum(dim=1).tolist() for rollout in rollouts],
        [float(loss) for loss in losses],
        peak_memory=device.peak_memory_bytes() if device.KIND == "cuda" else None,
    )
