"""Checks the values of `GRPOConfig`: bounds of numbers, choices of words, and settings that exclude each other."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from transformers import SchedulerType
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..grpo import ALGORITHMS, KL_ESTIMATORS, LOSS_AGGREGATIONS, LOSS_TYPES
from .data import DataConfig
from .loss import CORRECTIONS, OBJECTIVES, REWARD_SCALES, check_loss
from .model import ModelConfig
from .settings import nearest, require

if TYPE_CHECKING:
    from .grpo import GRPOConfig

WITH_REFERENCE = ("dpo", "ipo")  # preference losses that compare the policy with the reference policy
# What a resumed run has in common with the run that it continues, besides settings; see `checkpoints/same_run.py`.
COMPARED_FACTS = ("training_data", "base_weights", "reward_functions", "processes")
PREFERENCE_LOSSES = (*WITH_REFERENCE, "simpo", "orpo")


class Bound(NamedTuple):
    """A condition for the numbers in these fields. A field that is None is not checked."""

    names: tuple[str, ...]
    holds: Callable[[float], bool]
    hint: str


COUNTS = (
    "generation_max_length",
    "max_prompt_length",
    "num_iterations",
    "steps_per_generation",
    "max_sampling_rounds",
    "max_skipped_steps",
    "stop_check_interval",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "early_stopping_patience",
    "profile_step",
    "ref_model_sync_steps",
    "log_completions_steps",
    "num_completions_to_print",
)
NOT_NEGATIVE = (
    "generation_top_k",
    "advantage_epsilon",
    "overlong_buffer_length",
    "overlong_penalty",
    "entropy_coef_delta",
    "sampler_correction_min",
    "kl_penalty_coef",
    "num_eval_completions",
    "reward_processes",
    "save_batches",
    "completions_max_mb",
    "micro_batch_size",
    "seed",
    "learning_rate",
    "max_grad_norm",
    "weight_decay",
    "warmup_steps",
    "eval_delay",
    "dataloader_num_workers",
    "simpo_gamma",
)
POSITIVE = (
    "generation_temperature",
    "eval_temperature",
    "repetition_penalty",
    "kl_clamp_value",
    "delta",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "off_policy_mask_threshold",
    "sampler_correction_max",
    "preference_beta",
    "distillation_coef",
    "reward_timeout",
    "num_train_epochs",
    "adam_epsilon",  # at 0 a gradient of 0, which a LoRA has in its first step, would be divided by 0
)
BOUNDS = (
    Bound(("max_steps",), lambda v: v == -1 or v >= 1, "must be at least 1, or -1: num_train_epochs decides"),
    Bound(POSITIVE, lambda v: v > 0, "must be above 0"),
    Bound(COUNTS, lambda v: v >= 1, "must be at least 1"),
    Bound(NOT_NEGATIVE, lambda v: v >= 0, "must not be negative"),
    Bound(("seed",), lambda v: v < 2**32, "must be below 2**32"),
    Bound(("save_total_limit",), lambda v: v >= 0, "must not be negative; 0: no limit"),
    Bound(("generation_top_p",), lambda v: 0 < v <= 1, "must be in (0, 1]"),
    Bound(("min_p",), lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    Bound(("epsilon",), lambda v: 0 < v < 1, "must be in (0, 1)"),
    Bound(("top_entropy_quantile",), lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    Bound(("label_smoothing",), lambda v: 0 <= v < 0.5, "must be in [0, 0.5)"),
    Bound(("epsilon_c",), lambda v: v > 1, "must be above 1"),
    Bound(("ref_model_mixup_alpha",), lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    Bound(("max_reward_errors",), lambda v: 0 <= v <= 1, "must be in [0, 1]"),
    Bound(("adam_beta1", "adam_beta2"), lambda v: 0 <= v < 1, "must be in [0, 1)"),
)

# The words that each of these fields may hold. Where None is among them, it stands for the default.
CHOICES = {
    "algorithm": ALGORITHMS,
    "reference": ("start", "base"),
    "overlong_prompts": ("drop", "raise"),
    "on_reward_error": ("stop", "skip_group"),
    "kl_estimator": KL_ESTIMATORS,
    "loss_aggregation": (None, *LOSS_AGGREGATIONS),
    "loss_type": (None, *LOSS_TYPES),
    "importance_sampling_level": (None, "token", "sequence"),
    "scale_rewards": (None, *REWARD_SCALES),
    "multi_objective_aggregation": OBJECTIVES,
    "sampler_correction": CORRECTIONS,
    "preference_loss": (None, *PREFERENCE_LOSSES),
    "lr_scheduler_type": [choice.value for choice in SchedulerType],
    "optim": [choice.value for choice in OptimizerNames],
    "eval_strategy": [choice.value for choice in IntervalStrategy],
    "logging_strategy": [choice.value for choice in IntervalStrategy],
    "save_strategy": [choice.value for choice in SaveStrategy],
    "hub_strategy": [choice.value for choice in HubStrategy],
}

# Fields of `TrainingArguments` that have no effect here, since the forward pass of `transformers.Trainer` is not used.
NOT_FOR_US = (
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
    "neftune_noise_alpha",
    "label_smoothing_factor",
    "auto_find_batch_size",
    "deepspeed",
)

# Fields of `TrainingArguments` whose values it hands on to other libraries, or reads from a file, unchecked.
PASSED_ON = (
    "accelerator_config",
    "debug",
    "ddp_backend",
    "ddp_timeout",
    "fsdp_config",
    "log_level",
    "parallelism_config",
)


def check_values(args: "GRPOConfig") -> None:
    """Check that each setting has a possible value, and that settings that exclude each other are not both given.

    Raises:
        ValueError: a setting is wrong. The message names the first such field, its value, and what would be right.
    """
    require(args.output_dir != "", "output_dir", "", "expected a folder, such as ./outputs")
    for bound in BOUNDS:
        for name in bound.names:
            value = getattr(args, name)
            require(value is None or bound.holds(value), name, value, bound.hint)
    _check_intervals(args)
    for name, choices in CHOICES.items():
        value = getattr(args, name)
        require(value in choices, name, value, f"choose one of {', '.join(choice for choice in choices if choice)}")
    _check_group(args)
    _check_combinations(args)
    check_loss(args)
    _check_preferences(args)
    _check_teacher(args)
    _check_reference(args)
    _check_reward_errors(args)
    _check_shown_completions(args)
    _check_left_out(args)
    _check_allowed_changes(args)
    for part in (args.optim_args or "").split(","):  # names and values as a text, such as "beta3=0.9,alpha=5"
        number = part.partition("=")[2].strip().lower().lstrip("+-")
        require(number not in ("nan", "inf", "infinity"), "optim_args", args.optim_args, "must be finite")


def _check_intervals(args: "GRPOConfig") -> None:
    """Check that a run logs, evaluates and saves every so many steps, or after a share of all of them."""
    for name in ("logging_steps", "eval_steps", "save_steps"):
        value, strategy = getattr(args, name), name.replace("steps", "strategy")
        good = value is None or 0 < value < 1 or (value >= 1 and value == int(value))
        hint = f"must be a whole number above 0, or, below 1, a share of all steps ({strategy}='no': never)"
        require(good, name, value, hint)


def _check_group(args: "GRPOConfig") -> None:
    """Check that a group has completions to compare, and that a learning pass has whole groups or equal parts."""
    if not args.use_grpo:
        return
    group, micro = args.num_completions_per_prompt, args.micro_batch_size
    require(group > 1, "num_completions_per_prompt", group, "GRPO compares completions: at least 2 are needed")
    fits = not micro or group % micro == 0 or micro % group == 0
    hint = f"must divide num_completions_per_prompt={group} or be a multiple of it"
    require(fits, "micro_batch_size", micro, hint)


def _check_combinations(args: "GRPOConfig") -> None:
    """Refuse settings that can't both be given."""
    penalty, accumulated = args.kl_penalty_coef, args.gradient_accumulation_steps
    if args.algorithm == "dapo" and penalty not in (0.0, type(args).kl_penalty_coef):
        raise ValueError(f"kl_penalty_coef={penalty}: algorithm 'dapo' has no KL penalty; leave it out, or 0")
    if args.num_iterations > 1 and accumulated > 1:
        raise ValueError(
            f"num_iterations={args.num_iterations} with gradient_accumulation_steps={accumulated}: several passes step "
            "the optimizer after each batch; raise per_device_train_batch_size and set micro_batch_size instead"
        )
    if args.packing and args.use_grpo:
        raise ValueError("packing=True: is for supervised fine-tuning (use_grpo=False); GRPO packs by itself")
    if args.save_batches and (accumulated > 1 or args.steps_per_generation > 1 or not args.use_grpo):
        hint = "works with use_grpo, without gradient accumulation, and with steps_per_generation=1"
        raise ValueError(f"save_batches={args.save_batches}: {hint}")
    for name in ("steps_per_generation", "dynamic_sampling"):
        value = getattr(args, name)
        require(args.use_grpo or value == getattr(type(args), name), name, value, "is about rollouts: set use_grpo")


def _check_preferences(args: "GRPOConfig") -> None:
    """Refuse settings of preference losses that do not go with the others."""
    loss, default = args.preference_loss, type(args)
    for name, takes in (
        ("preference_beta", PREFERENCE_LOSSES),
        ("simpo_gamma", ("simpo",)),
        ("label_smoothing", ("dpo", "simpo", "orpo")),
    ):
        value = getattr(args, name)
        hint = f"it belongs to preference_loss {', '.join(takes)}; leave it out"
        require(value == getattr(default, name) or loss in takes, name, value, hint)
    if loss is None:
        return
    require(not args.use_grpo, "preference_loss", loss, "learns from given completions: set use_grpo to False")
    beta = args.kl_penalty_coef
    hint = "the KL penalty of GRPO (also beta); preference losses take preference_beta"
    require(beta in (0.0, default.kl_penalty_coef), "kl_penalty_coef", beta, hint)
    require(not args.packing, "packing", True, "is for supervised fine-tuning; pairs are not packed")
    micro = args.micro_batch_size
    require(
        not micro or micro % 2 == 0, "micro_batch_size", micro, "counts completions, two a pair: give a multiple of 2"
    )


def _check_teacher(args: "GRPOConfig") -> None:
    """Refuse settings of distillation that do not go with the others."""
    coef, penalty = args.distillation_coef, args.kl_penalty_coef
    if args.teacher is None:
        require(coef == type(args).distillation_coef, "distillation_coef", coef, "of which teacher? Set teacher")
        return
    require(args.use_grpo, "teacher", args.teacher, "judges what the policy samples: set use_grpo to True")
    hint = "with a teacher there is no KL penalty from the reference policy; leave it out, or 0"
    require(penalty in (0.0, type(args).kl_penalty_coef), "kl_penalty_coef", penalty, hint)
    hint = "asks for rewards that differ, and a teacher gives none; leave it out"
    require(not args.dynamic_sampling, "dynamic_sampling", True, hint)
    kept = args.save_batches
    require(not kept, "save_batches", kept, "a record has no teacher to be replayed with; leave it at 0")


def _check_reference(args: "GRPOConfig") -> None:
    """Check that a reference policy that moves exists, and that nothing needs it to stay."""
    for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
        value = getattr(args, name)
        hint = "has an effect with sync_ref_model=True only"
        require(args.sync_ref_model or value == getattr(type(args), name), name, value, hint)
    if not args.sync_ref_model:
        return
    hint = "there is no reference policy without a KL penalty; set kl_penalty_coef (beta), or leave it out"
    require(args.beta > 0 and args.use_grpo, "sync_ref_model", True, hint)
    hint = "the reference moves, so it can't stay the base; leave reference out"
    require(args.reference != "base", "sync_ref_model", True, hint)
    hint = "records are replayed with the base model as the reference; leave save_batches out"
    require(not args.save_batches, "sync_ref_model", True, hint)


def _check_allowed_changes(args: "GRPOConfig") -> None:
    """Check that what a resumed run may change are names that it compares."""
    configs = (ModelConfig, DataConfig, type(args))
    known = [*COMPARED_FACTS, *(name for config in configs for name in config.__dataclass_fields__)]
    for name in args.allow_changes or ():
        require(name in known, "allow_changes", name, f"the name of no setting{nearest(name, known)}")
        hint = "the optimizer's state in a checkpoint fits this setting only; begin a new run"
        require(name not in ("optim", "optim_args"), "allow_changes", name, hint)


def _check_reward_errors(args: "GRPOConfig") -> None:
    """Check that groups which are dropped exist, and that nothing needs them."""
    share, how = args.max_reward_errors, args.on_reward_error
    hint = "has an effect with on_reward_error='skip_group' only"
    require(args.drops_failed_groups or share == type(args).max_reward_errors, "max_reward_errors", share, hint)
    if args.drops_failed_groups:
        require(args.use_grpo, "on_reward_error", how, "is about rollouts: set use_grpo")
        hint = "records are replayed with all groups; leave save_batches out"
        require(not args.save_batches, "on_reward_error", how, hint)


def _check_shown_completions(args: "GRPOConfig") -> None:
    """Check that there are completions to show, and that nothing says how where none are shown."""
    if args.log_completions:
        require(args.use_grpo, "log_completions", True, "shows what was sampled to learn from: set use_grpo")
        return
    for name in ("log_completions_steps", "log_unique_prompts"):
        value = getattr(args, name)
        require(value == getattr(type(args), name), name, value, "has an effect with log_completions only")


def _check_left_out(args: "GRPOConfig") -> None:
    """Refuse what `transformers.TrainingArguments` and `accelerate launch` offer and this library can't do."""
    half = args.bf16 or args.fp16
    require(not half, "bf16/fp16", True, "choose the precision with model_dtype (ModelConfig) instead")
    for name in NOT_FOR_US:
        require(not getattr(args, name), name, getattr(args, name), "does not work here: leave it out")
    for name, hint in (
        ("ACCELERATE_USE_FSDP", "give fsdp as a setting of the run, and launch with --multi_gpu"),
        ("ACCELERATE_USE_DEEPSPEED", "does not work here: accelerate launch --multi_gpu"),
    ):  # `accelerate launch` sets these
        value = os.environ.get(name, "false")
        require(value.lower() == "false", name, value, hint)
    unused = args.remove_unused_columns
    require(not unused, "remove_unused_columns", True, "must be False; rewards read the columns")
