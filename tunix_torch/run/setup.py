"""Makes the trainer of a job: model, tokenizer, data and reward functions by their names, and settings in force."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from peft import PeftModel
from transformers import TrainerCallback

from .. import rewards
from ..config.data import DataConfig, default_rewards
from ..config.grpo import GRPOConfig
from ..config.model import ModelConfig
from ..config.saved import settings_of
from ..config.settings import require
from ..data.preference import pair_of
from ..data.rows import Row, has_column
from ..data.shapes import completion_of
from ..data.sources import load_data
from ..model.adapter import read_lora
from ..model.loading import base_model_name, load_model, load_tokenizer, lora_config, torch_dtype
from ..rewarding.models import looks_like_model
from ..rewarding.scoring import RewardFunc, name_of, require_columns
from ..runtime import together
from ..trainer import TunixTrainer
from .callbacks import FindingsSoFar, MetricsFile
from .folder import warn_of_other_prompts
from .terminal import show_progress

logger = logging.getLogger(__name__)


def choose_rewards(config: DataConfig, args: GRPOConfig) -> list[RewardFunc | str]:
    """The reward functions that a configuration names, and the names of reward models, which are not loaded yet.

    A preset also sets `args.reward_weights` if they are not given.

    With a teacher there are none unless they are named.

    Raises:
        ValueError: a name is unknown, or there is not one weight for each function.
    """
    named = config.reward_funcs or config.reward_preset
    if args.teacher is not None and not named:
        functions = []
    elif config.reward_preset is None:
        names = config.reward_funcs or default_rewards(config.dataset)
        functions = [name if looks_like_model(name) else rewards.find_reward(name) for name in names]
    else:
        functions, weights = map(list, zip(*rewards.get_preset(config.reward_preset), strict=True))
        args.reward_weights = args.reward_weights or weights
    weights = args.reward_weights
    twice = {name for name, count in Counter(map(name_of, functions)).items() if count > 1}
    require(not twice, "reward_funcs", config.reward_funcs, f"{', '.join(twice)} is there twice")
    hint = f"{len(functions)} reward functions need as many weights"
    require(weights is None or len(weights) == len(functions), "reward_weights", weights, hint)
    return functions


def build_trainer(
    model_config: ModelConfig, data_config: DataConfig, args: GRPOConfig, callbacks: Sequence[TrainerCallback] = ()
) -> TunixTrainer:
    """Load model, tokenizer, data and reward functions, and make a trainer of them.

    Raises:
        ValueError: one of them can't be loaded, or they don't fit together.
    """
    reward_funcs = choose_rewards(data_config, args)
    judge = rewards.find_reward(data_config.judge_in_force)
    train_rows, eval_rows = _load_rows(data_config, args, [f for f in reward_funcs if not isinstance(f, str)])
    unanswered = bool(eval_rows) and not any(has_column(row, "answer") for row in eval_rows)
    if unanswered and not args.use_grpo and data_config.judge is None:
        reward_funcs, judge, args.reward_weights = [], None, None  # SFT without a judge is evaluated by its loss
    elif eval_rows:
        require_columns([judge], eval_rows, "judge")
    tokenizer = load_tokenizer(model_config.model_name)
    if together.is_first():
        warn_of_other_prompts(model_config.model_name, args.system_message)
    _check_evaluations(args, bool(eval_rows))
    full = model_config.trains_all
    dtype = torch.float32 if full else torch_dtype(model_config.model_dtype)
    model = load_model(model_config.model_name, dtype)
    has_adapter = isinstance(model, PeftModel)
    if has_adapter and together.is_first():
        lora = f"rank {model_config.lora_rank}, alpha {model_config.lora_alpha:g}"
        is_reference = args.needs_reference and args.reference == "start"
        further = "; it is the reference policy, as it is now" if is_reference else ""
        print(f"{model_config.model_name}: an adapter ({lora}), trained further{further}")
    trainer = TunixTrainer(
        model,
        reward_funcs,
        args,
        train_rows,
        eval_rows or None,
        processing_class=tokenizer,
        peft_config=None if has_adapter or full else lora_config(model_config),
        callbacks=[MetricsFile(), FindingsSoFar(), *callbacks],
        judge=judge,
        full=full,
    )
    show_progress(trainer)
    return trainer


def _load_rows(
    config: DataConfig, args: GRPOConfig, reward_funcs: Sequence[RewardFunc]
) -> tuple[list[Row] | datasets.IterableDataset, list[Row]]:
    """Training and evaluation rows. Training rows are checked now, before a large model is loaded."""

    def check_first(row: Row) -> None:
        """Check the first row of a stream. The other rows are not known yet."""
        if args.use_grpo:
            require_columns(reward_funcs, [row])
        elif args.preference_loss is not None:
            pair_of(row)
        else:
            completion_of(row)

    train_rows, eval_rows = load_data(config, args.seed, check_first, supervised=not args.use_grpo)
    if args.use_grpo and isinstance(train_rows, list):
        require_columns(reward_funcs, train_rows)
    return train_rows, eval_rows


def _check_evaluations(args: GRPOConfig, has_rows: bool) -> None:
    """Switch evaluations off where there are no rows for them.

    Raises:
        ValueError: a setting needs evaluations.
    """
    for name, value in (
        ("early_stopping_patience", args.early_stopping_patience),
        ("load_best_model_at_end", args.load_best_model_at_end),
        ("save_strategy", args.save_strategy == "best" and "best"),
        ("lr_scheduler_type", args.follows_metric and args.lr_scheduler_type.value),
    ):
        hint = "evaluations decide this, and there are no evaluation rows: give val_data_path or train_fraction"
        require(has_rows or not value, name, value, hint)
    if not has_rows and args.eval_strategy != "no":
        logger.warning("There are no evaluation rows (val_data_path, train_fraction), so nothing is evaluated.")
        args.eval_strategy = "no"


def settings_in_force(model_config: ModelConfig, data_config: DataConfig, args: GRPOConfig) -> dict[str, Any]:
    """The settings that a run's config.json holds. A preset, or an adapter that is trained further, decides some.

    Raises:
        ValueError: a reward function is unknown, or the LoRA differs from that of the adapter.
    """
    name = model_config.model_name
    if base_model_name(name) != name:
        adapter = read_lora(name)
        model_config.take_from_adapter(adapter.r, adapter.lora_alpha, adapter.lora_dropout)
    choose_rewards(data_config, args)
    return settings_of(model_config, data_config, args)
