"""Measure TRL's `GRPOTrainer` for `grpo_step.py`, with its default generation, `transformers.generate`.

Completions are forced to the lengths of the spec, as all peers must do the same work. A logits processor forbids the
special tokens, and all tokens but EOS where a row shall end. `generate` itself is unchanged: it pads rows that have
ended, and stops when all have. The processor costs one assignment for each token.
"""

import functools
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from .step_ends import StepEnds
from .stopwatch import Stopwatch
from .worker import Measurement
from .workload import EOS, NUM_SPECIAL, Spec, ends_itself, lengths, read_prompts, rows_per_pass, share_of_even_words

TOKENS_PER_PASS = {"cpu": 1024, "cuda": 32_768}  # of a learning pass; README.md has the measurement on the CPU
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class ForceLengths(LogitsProcessor):
    """Ends each row where the spec wants it, and nowhere else."""

    def __init__(self, spec: Spec) -> None:
        self.prompt_length = spec.prompt_length
        self.ending: dict[int, list[int]] = {}  # the rows that end, by how many tokens they have before EOS
        for row, (length, ends) in enumerate(zip(lengths(spec), ends_itself(spec), strict=True)):
            if ends:
                self.ending.setdefault(length - 1, []).append(row)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return `scores` (B, V), changed in place, as `generate` has made a copy for processors.

        `input_ids` (B, tokens so far) are the prompts and what was generated.
        """
        scores[:, :NUM_SPECIAL] = -torch.inf
        rows = self.ending.get(input_ids.shape[1] - self.prompt_length)
        if rows is not None:
            scores[rows] = -torch.inf
            scores[rows, EOS] = 0.0
        return scores


def make_trainer(spec: Spec, folder: Path, callbacks: list[TrainerCallback]) -> GRPOTrainer:
    """Return TRL's trainer with the spec's settings and the model and prompts of the folder.

    Its loss is set to that of the other peers, and gradient checkpointing, its default, is off, as it would only cost
    time. It learns from a few rows at a time, which is faster than from all of them; a step still has one rollout and
    one optimizer step.
    """
    rows = rows_per_pass(spec, TOKENS_PER_PASS[spec.device])
    args = GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=spec.warmup + spec.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=spec.num_rows // rows,
        num_generations=spec.num_completions,
        max_completion_length=spec.completion_length,
        temperature=1.0,
        beta=spec.beta,
        use_bias_correction_kl=False,
        loss_type="grpo",
        learning_rate=spec.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=spec.max_grad_norm,
        seed=spec.seed,
        use_cpu=spec.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec.dtype)),
        share_of_even_words,
        args,
        Dataset.from_list([{"prompt": prompt} for prompt in read_prompts(folder)]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=LoraConfig(
            r=spec.lora_rank, lora_alpha=spec.lora_alpha, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=callbacks,
    )


def wait_for_device(result: object) -> None:
    """Wait until the GPU has finished, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run(spec: Spec, folder: Path) -> Measurement:
    """Train for the spec's steps, and measure the parts of each."""
    watch, completions, losses = Stopwatch(wait_for_device), [], []
    trainer = make_trainer(spec, folder, [StepEnds(watch)])
    trainer.model.generate = functools.partial(
        trainer.model.generate, logits_processor=LogitsProcessorList([ForceLengths(spec)])
    )
    # after `training_step`, Transformers clips gradients and steps the optimizer, which is learning as well
    watch.wrap(trainer, "training_step", "learning", rest="learning", seen=losses.append)
    watch.wrap(trainer, "_generate_and_score_completions", "other")
    watch.wrap(trainer, "_generate", "rollout")
    watch.wrap(trainer, "_generate_single_turn", "rollout", seen=lambda result: completions.append(result[0]))
    watch.wrap(trainer, "_calculate_rewards", "scoring")
    # with gradients enabled, the same method computes the policy's log-probabilities, which is learning
    watch.wrap(trainer, "_get_per_token_logps_and_entropies", "reference", when=lambda: not torch.is_grad_enabled())
    trainer.train()
    passes = trainer.args.gradient_accumulation_steps
    return Measurement(
        watch.steps,
        [[len(ids) for ids in rows] for rows in completions],
        [float(sum(losses[first : first + passes])) for first in range(0, len(losses), passes)],
        peak_memory=torch.cuda.max_memory_allocated() if spec.device == "cuda" else None,
    )
