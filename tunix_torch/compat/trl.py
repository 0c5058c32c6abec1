"""`GRPOConfig` and `GRPOTrainer` by TRL's names, defaults and meanings, so that a script moves with one import changed.

    from tunix_torch.compat.trl import GRPOConfig, GRPOTrainer  # in place of: from trl import GRPOConfig, GRPOTrainer

Both are translations: the config, of `trl_config.py`, becomes a `tunix_torch.GRPOConfig`, and the trainer is a
`TunixTrainer`.
"""

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from ..config.grpo import GRPOConfig as OurConfig
from ..config.services import blamed_on
from ..config.settings import require
from ..data.prompts import prepare_rows, token_counts
from ..data.rows import Row
from ..data.sources import training_rows
from ..evals.answers import Answers
from ..evals.evaluation import functions_to_report
from ..learn.weights import aggregation_weights
from ..model.loading import load_model, load_tokenizer
from ..rewarding.advantages import compute_group_advantages
from ..rewarding.models import RewardModel
from ..rewarding.scoring import RewardFunc
from ..trainer import TunixTrainer
from .trl_config import GRPOConfig, to_ours

logger = logging.getLogger(__name__)

# Arguments of TRL's trainer that are refused, with the reason.
REFUSED_ARGUMENTS = {
    "quantization_config": "weights are not quantised here; leave it out, or load a smaller model",
    "tools": "tools are not called here; leave it out",
    "rollout_func": "completions are sampled by this library; leave it out",
    "environment_factory": "there are no environments here; score completions by reward_funcs",
}
UNCLIPPED = ("cispo", "sapo", "vespo")  # loss types whose value depends on log-probabilities even where ratios are 1


class GRPOTrainer(TunixTrainer):
    """TRL's trainer by its arguments. Without `peft_config` all weights learn, unless the model has a LoRA.

    Args:
        model: a hub id, a folder, or a loaded model.
        reward_funcs: functions, and reward models by name or loaded.
        args: this module's `GRPOConfig`.
        processing_class: the tokenizer; None: the model's own.
        optimizers: an optimizer and its schedule, in place of those that the settings name.
        quantization_config, tools, rollout_func, environment_factory: refused.

    Raises:
        ValueError: see `TunixTrainer`; an argument is refused; or there is no data or no reward.
    """

    aux_loss_enabled = False
    how_to_skip = ""  # no field of TRL's config says so

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: "GRPOConfig | None" = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
        rollout_func: Callable | None = None,
        environment_factory: Any = None,
    ) -> None:
        given = {
            "quantization_config": quantization_config,
            "tools": tools,
            "rollout_func": rollout_func,
            "environment_factory": environment_factory,
        }
        for name, reason in REFUSED_ARGUMENTS.items():
            require(not given[name], name, given[name], reason)
        require(train_dataset is not None, "train_dataset", None, "`train_dataset` is required: the rows to learn from")
        no_reward = "No reward source provided: give at least one function or reward model"
        require(bool(reward_funcs), "reward_funcs", reward_funcs, no_reward)
        name = str(model) if isinstance(model, str | Path) else model.config._name_or_path
        args = args or GRPOConfig(f"{name.split('/')[-1]}-GRPO")
        if not isinstance(args, GRPOConfig):
            hint = "give a GRPOConfig of tunix_torch.compat.trl, or take tunix_torch.TunixTrainer"
            raise ValueError(f"args: a {type(args).__name__}; {hint}")
        set_seed(args.seed)
        ours, processing_class = to_ours(args), processing_class or load_tokenizer(name)
        _prepare_for_streams(ours, train_dataset)
        if isinstance(model, str | Path):
            model = _load(name, args, is_frozen=peft_config is not None)
        super().__init__(
            model,
            reward_funcs,
            ours,
            _with_room_for_all(train_dataset, processing_class, ours),
            eval_dataset,
            processing_class,
            peft_config,
            callbacks,
            judge=False,  # evaluations report rewards, since nothing says what is right
            reward_processing_classes=reward_processing_classes,
            full=peft_config is None and not isinstance(model, PeftModel),
        )
        self.optimizer, self.lr_scheduler = optimizers

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """See `transformers.Trainer`. A stream is read by one process, whatever training rows are read by."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        workers = self.args.dataloader_num_workers
        self.args.dataloader_num_workers = 0 if isinstance(rows, datasets.IterableDataset) else workers
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_num_workers = workers

    @property
    def reward_func_names(self) -> list[str]:
        """The names under which rewards are logged."""
        return self.scorer.names

    @property
    def reward_processing_classes(self) -> list[PreTrainedTokenizerBase | None]:
        """The tokenizer of each reward model; None for a function."""
        return [f.tokenizer if isinstance(f, RewardModel) else None for f in self.scorer.functions]

    @property
    def entropy_coef(self) -> float:
        """The weight of the entropy bonus, as it is now."""
        self.begin_run_if_needed()
        return self.entropy.coef

    @property
    def ref_model(self) -> "ReferenceWeights | None":
        """The weights of the reference policy; None where there is none, or it is the model without its adapter."""
        self.begin_run_if_needed()
        return None if self.reference is None else ReferenceWeights(self.reference)

    def further_metrics(self, rows: Sequence[Row], samples: Answers | None) -> dict[str, float]:
        """What `AdapterTrainer.further_metrics` gives, and `loss` where rewards and lengths of the samples decide it.

        That is so without a KL penalty and an entropy bonus for the loss types that clip ratios: these are 1.
        """
        args, metrics = self.args, super().further_metrics(rows, samples)
        if samples is None or args.beta > 0 or args.has_entropy_bonus or args.loss_type in UNCLIPPED:
            return metrics
        table = [[math.nan if v is None else v for v in of_one] for of_row in samples.rewards for of_one in of_row]
        weights = self.scorer.weights[functions_to_report(self.scorer, rows)]  # of the functions that were called
        totals = (torch.tensor(table, dtype=torch.float64) * weights).nansum(dim=1)  # (B,)
        lengths = torch.tensor([length for of_row in samples.lengths for length in of_row])
        size, scaled = len(samples.lengths[0]), args.reward_scale != "none"
        if size == 1:  # a completion alone is no better than its group
            return metrics | {"loss": 0.0}
        std = totals.std() if args.reward_scale == "batch" else None
        advantages = compute_group_advantages(totals, size, args.algorithm, scaled, args.advantage_epsilon, std)
        mask = torch.arange(args.generation_max_length) < lengths[:, None]
        weights = aggregation_weights(mask, args.aggregation, args.generation_max_length)
        return metrics | {"loss": -float((weights.sum(dim=1) * advantages).sum())}

    @property
    def reward_weights(self) -> torch.Tensor:
        """The weight of each reward function, (R,)."""
        return self.scorer.weights


class ReferenceWeights:
    """The weights of a reference policy by the names of the parameters that they are copies of."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights with their names."""
        yield from self.weights.items()

    def get_parameter(self, name: str) -> torch.Tensor:
        """The weights of this name."""
        return self.weights[name]


def _with_room_for_all(rows: Any, tokenizer: PreTrainedTokenizerBase, args: OurConfig) -> Any:
    """Make `max_prompt_length` the length of the longest prompt, since TRL has no limit. Returns the rows with their
    tokens. A stream, whose rows are not known yet, keeps the limit, and longer prompts are left out with a warning."""
    rows = training_rows(rows)
    if not isinstance(rows, Sized):
        return rows
    require(len(rows) > 0, "train_dataset", rows, "no rows")
    kwargs = {"chat_template_kwargs": args.chat_template_kwargs, "wrap_prompts": args.wrap_prompts}
    rows = prepare_rows(rows, tokenizer, sys.maxsize, system_message=args.system_message, **kwargs)
    args.max_prompt_length = max(1, *token_counts(rows))
    return rows


def _prepare_for_streams(args: OurConfig, rows: Any) -> None:
    """See that a stream is read by one process alone, as in TRL."""
    if not isinstance(rows, datasets.IterableDataset):
        return
    dispatched = args.accelerator_config.dispatch_batches
    hint = "Iterable datasets require `dispatch_batches=False`, since rows hold texts; leave it out"
    require(not dispatched, "accelerator_config", {"dispatch_batches": dispatched}, hint)
    if args.dataloader_num_workers:
        logger.warning("dataloader_num_workers=%d: a stream is read by this process", args.dataloader_num_workers)
        args.dataloader_num_workers = 0


def _load(name: str, args: "GRPOConfig", is_frozen: bool) -> PreTrainedModel | PeftModel:
    """The model of this name, of the type that `model_init_kwargs` or `bf16` asks for, else float32."""
    kwargs = dict(args.model_init_kwargs or {})
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", "bfloat16" if args.bf16 and is_frozen else "float32"))
    dtype = "float32" if args.cast_lm_head_to_fp32 else dtype
    if isinstance(dtype, str) and dtype != "auto":
        known = isinstance(getattr(torch, dtype, None), torch.dtype)
        require(known, "model_init_kwargs", args.model_init_kwargs, f"no such dtype as {dtype!r}; bfloat16, float32")
        dtype = getattr(torch, dtype)
    for harmless in ("attn_implementation", "device_map"):  # the forward pass and the device are this library's own
        kwargs.pop(harmless, None)
    hint = "code of the hub is not run; load the model yourself, and give that"
    require(not kwargs.pop("trust_remote_code", False), "model_init_kwargs", args.model_init_kwargs, hint)
    if not kwargs and dtype != "auto":
        return load_model(name, dtype)
    with blamed_on("model_init_kwargs", args.model_init_kwargs):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **kwargs)
