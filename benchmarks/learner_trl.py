"""Train TRL's `GRPOTrainer` on the arithmetic job, with its default generation, for `time_to_accuracy.py`."""

import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tunix_torch.rewards import correctness_reward, format_reward

from .arithmetic_job import MODEL, PROMPT, Job, read_rows
from .learner import Run, remember_answers
from .learning_clock import LearningClock
from .peer_trl import LORA_TARGETS


def settings(job: Job, output_dir: Path) -> GRPOConfig:
    """Return the job in TRL's settings.

    A step has one rollout and one optimizer step. TRL learns from `trl_rows` completions at a time, which is fastest
    for it. Its loss is set to this library's. Gradient checkpointing, its default, is off, as it would only cost time.
    """
    return GRPOConfig(
        output_dir=str(output_dir),
        seed=job.seed,
        max_steps=job.steps,
        per_device_train_batch_size=job.trl_rows,
        gradient_accumulation_steps=job.num_rows // job.trl_rows,
        num_generations=job.num_completions,
        max_completion_length=job.completion_length,
        temperature=job.temperature,
        top_p=job.top_p,
        top_k=job.top_k,
        beta=job.beta,
        epsilon=job.epsilon,
        use_bias_correction_kl=False,
        loss_type="grpo",
        scale_rewards="group",
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.schedule,
        warmup_steps=job.warmup,
        max_grad_norm=job.max_grad_norm,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def run(job: Job, folder: Path, started: float) -> Run:
    """Train like `learner_ours.run`. TRL gets rendered prompts and tokenises them unchanged, to the same tokens."""
    output, model, answers = folder / "trl", folder.parent / MODEL, []
    clock = LearningClock(job, output)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        [remember_answers(correctness_reward, answers), format_reward],
        settings(job, output),
        Dataset.from_list([{"prompt": row[PROMPT], "answer": row["answer"]} for row in read_rows(folder)]),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=job.lora_rank, lora_alpha=job.lora_alpha, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    startup_seconds = time.perf_counter() - started
    clock.start()
    trainer.train()
    return Run(clock.seconds, startup_seconds, answers)
