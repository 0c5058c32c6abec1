"""Hugging Face TRL's side of a case, as a third opinion: its own loss on the same batch. No other file imports trl."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer

from .. import GRPOConfig, ModelConfig
from ..batch import TrainBatch
from ..learn.record import StepRecord
from ..model import tiny
from ..model.loading import add_lora, load_base_model, lora_config
from ..rewarding.advantages import step_advantages
from .cases import GROUP
from .compare import ADVANTAGES, LOGPS, Row, gradient_row, largest_difference, scalar_tolerance
from .ours import ALPHA, RANK, no_reward

# TRL's `loss_type` for each aggregation of the loss here. TRL's means over rows count empty rows too; those of this
# library and of Tunix do not.
LOSS_TYPES = {
    "sequence-mean-token-mean": "grpo",
    "token-mean": "bnpo",  # on one batch TRL's "dapo" is the same; it is used for the algorithm "dapo"
    "sequence-mean-token-scale": "dr_grpo",
    "seq-mean-token-sum": "luspo",
    "sequence-mean-token-sum-norm": "luspo",
}

SAME_NAMES = (
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "off_policy_mask_threshold",
    "top_entropy_quantile",
    "entropy_coef",
    "reward_weights",
    "multi_objective_aggregation",
)
TRL_EPSILON = 1e-4  # beside the standard deviation, a constant in TRL
ADVANTAGE_CASES = (
    {"scale_rewards": "group"},
    {"scale_rewards": "batch"},
    {"scale_rewards": "none"},
    {"multi_objective_aggregation": "normalize_then_sum"},
)


def compare_with_trl(case: str, folder: Path, record: StepRecord, args: GRPOConfig) -> Iterator[Row]:
    """Compare the policy's log-probabilities, the loss and the LoRA gradients of a recorded step with TRL's.

    Args:
        folder: of the base model.
    """
    model = add_lora(load_base_model(str(folder)), lora_config(ModelConfig(lora_rank=RANK, lora_alpha=ALPHA)))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in record.lora.items():
            parameters[name].copy_(value)
    batch = record.batch
    trainer = _make_trl_trainer(model, len(batch.completion_ids), args)
    inputs = _trl_inputs(batch, args)
    model.train()
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1)
    mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(model, ids, mask, batch.completion_ids.shape[1])[0]
    ours, theirs = (values.masked_fill(inputs["completion_mask"] == 0, 0.0) for values in (record.logps, logps))
    difference = largest_difference(ours, theirs)
    yield Row(case, "policy log-probabilities", difference, LOGPS)
    loss = trainer._compute_loss(model, inputs)
    yield Row(case, "loss", abs(float(loss.detach()) - float(record.loss)), scalar_tolerance(args))
    loss.backward()
    yield gradient_row(case, record.gradients, {name: parameters[name].grad for name in record.gradients}, True)


def compare_advantages(case: str, folder: Path) -> Iterator[Row]:
    """Compare the advantages of each way to scale rewards, of two functions, with those that TRL's rollout computes.

    Args:
        folder: of any model; TRL's trainer needs one.
    """
    random = torch.Generator().manual_seed(3)
    rewards = torch.rand(3 * GROUP, 2, generator=random, dtype=torch.float64)
    rewards[:GROUP, 0] = 0.5  # a group that one function rewards equally
    rewards[GROUP + 1, 1] = torch.nan  # a row to which one function does not apply
    weights = [1.0, 0.5]
    totals = (rewards * torch.tensor(weights)).nansum(dim=1)
    model = load_base_model(str(folder))
    for settings in ADVANTAGE_CASES:
        args = GRPOConfig(
            num_completions_per_prompt=GROUP, advantage_epsilon=TRL_EPSILON, reward_weights=weights, **settings
        )
        ours = step_advantages(rewards, totals, torch.tensor(weights, dtype=torch.float64), args)
        trainer = _make_trl_trainer(model, len(rewards), args, 2)
        row = [[2, 3]] * len(rewards)
        # What TRL samples and how it is rewarded are given; what remains of its rollout is what it makes of rewards.
        trainer._generate = lambda prompts, row=row: (row, row, None, ["?"] * len(row), None, {}, None, None)
        trainer._calculate_rewards = lambda *given: rewards
        theirs = trainer._generate_and_score_completions([{"prompt": "?"}] * len(rewards))["advantages"]
        name = ", ".join(f"{value}" for value in settings.values())
        yield Row(f"{case}, {name}", "advantages", largest_difference(ours, theirs), ADVANTAGES)


def _make_trl_trainer(model: nn.Module, num_rows: int, args: GRPOConfig, num_functions: int = 1) -> GRPOTrainer:
    """Return TRL's trainer of the model with the same settings, for batches of `num_rows` completions."""
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = GRPOTrainer(
            model,
            [no_reward] * num_functions,
            TRLConfig(
                output_dir=output_dir,
                use_cpu=True,
                bf16=False,
                report_to="none",
                gradient_checkpointing=False,
                per_device_train_batch_size=num_rows,
                num_generations=args.num_completions_per_prompt,
                max_completion_length=args.generation_max_length,
                temperature=args.generation_temperature,
                beta=args.beta,
                use_bias_correction_kl=args.use_bias_correction_kl,
                epsilon=args.epsilon,
                epsilon_high=args.clip_high,
                delta=args.delta or args.epsilon_c,
                loss_type=args.loss_type or ("dapo" if args.algorithm == "dapo" else LOSS_TYPES[args.aggregation]),
                importance_sampling_level="sequence" if args.sequence_level else "token",
                scale_rewards=args.reward_scale,
                **{name: getattr(args, name) for name in SAME_NAMES},
            ),
            Dataset.from_list([{"prompt": "?"}]),
            processing_class=tiny.make_tokenizer(),
        )
    trainer.current_gradient_accumulation_steps = 1
    trainer.use_vllm = args.corrects_sampler  # then the loss is multiplied by the importance weights
    return trainer


def _trl_inputs(batch: TrainBatch, args: GRPOConfig) -> dict[str, torch.Tensor | None]:
    """Return a batch under TRL's names, in which each prompt is repeated for its completions."""
    group, mask = args.num_completions_per_prompt, batch.token_weights > 0  # TRL has no tokens that it does not count
    inputs = {
        "prompt_ids": batch.prompt_ids.repeat_interleave(group, dim=0),
        "prompt_mask": batch.prompt_mask.repeat_interleave(group, dim=0).long(),
        "completion_ids": batch.completion_ids,
        "completion_mask": mask.long(),
        "advantages": batch.advantages,
        "ref_per_token_logps": batch.ref_per_token_logps,
        "old_per_token_logps": batch.old_per_token_logps,
        "num_items_in_batch": mask.sum(),
    }
    if args.corrects_sampler:
        inputs["sampling_per_token_logps"] = batch.sampler_logps
        inputs["importance_sampling_ratio"] = _importance_weights(batch, mask, args)
    return inputs


def _importance_weights(batch: TrainBatch, mask: torch.Tensor, args: GRPOConfig) -> torch.Tensor:
    """Return what TRL computes inside its rollout: (B, C) float32 weights, or (B, 1) in the modes of sequences."""
    gaps = np.where(mask, batch.old_per_token_logps.double() - batch.sampler_logps.double(), 0.0)
    level, mode = args.sampler_correction.split("_")
    weights = np.exp(gaps.sum(axis=1, keepdims=True) if level == "sequence" else gaps)
    low = -np.inf if args.sampler_correction_min is None else args.sampler_correction_min
    high = np.inf if args.sampler_correction_max is None else args.sampler_correction_max
    if mode == "truncate":
        weights = np.clip(weights, low, high)
    else:
        weights = np.where((weights < low) | (weights > high), 0.0, weights)
    return torch.tensor(weights, dtype=torch.float32)
