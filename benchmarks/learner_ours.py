"""Train this library's `TunixTrainer` on the arithmetic job, for `time_to_accuracy.py`."""

import time
from pathlib import Path

import tunix_torch  # noqa: F401  # first: it decides for or against XLA

# isort: split

import torch

from tunix_torch import GRPOConfig, ModelConfig, TunixTrainer, load_tokenizer
from tunix_torch.config import recipes
from tunix_torch.model.loading import load_base_model, lora_config
from tunix_torch.rewards import correctness_reward, format_reward
from tunix_torch.runtime import device

from .arithmetic_job import MODEL, Job, read_rows
from .learner import Run, remember_answers
from .learning_clock import LearningClock


def settings(job: Job, output_dir: Path) -> GRPOConfig:
    """Return the job in this library's settings."""
    return GRPOConfig(
        output_dir=str(output_dir),
        seed=job.seed,
        max_steps=job.steps,
        per_device_train_batch_size=job.num_prompts,
        num_completions_per_prompt=job.num_completions,
        max_prompt_length=job.prompt_length,
        generation_max_length=job.completion_length,
        generation_temperature=job.temperature,
        generation_top_p=job.top_p,
        generation_top_k=job.top_k,
        stop_check_interval=recipes.TINY["stop_check_interval"],
        micro_batch_size=recipes.TINY["micro_batch_size"],
        system_message="",
        kl_penalty_coef=job.beta,
        epsilon=job.epsilon,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.schedule,
        warmup_steps=job.warmup,
        max_grad_norm=job.max_grad_norm,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def run(job: Job, folder: Path, started: float) -> Run:
    """Train on the job and rows of a seed's folder. `started` is `time.perf_counter()` at the process's beginning."""
    assert device.KIND == "cpu", f"{device.KIND}, not cpu"
    output, model, answers = folder / "ours", folder.parent / MODEL, []
    clock = LearningClock(job, output)
    trainer = TunixTrainer(
        load_base_model(str(model), torch.float32),
        [remember_answers(correctness_reward, answers), format_reward],
        settings(job, output),
        read_rows(folder),
        processing_class=load_tokenizer(str(model)),
        peft_config=lora_config(ModelConfig(lora_rank=job.lora_rank, lora_alpha=job.lora_alpha)),
        callbacks=[clock],
    )
    startup_seconds = time.perf_counter() - started
    clock.start()
    trainer.train()
    return Run(clock.seconds, startup_seconds, answers)
