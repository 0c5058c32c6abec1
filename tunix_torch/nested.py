"""A job's settings in groups, as agent-tunix and `run_training.py` have them: `GRPOTrainingConfig`.

What is not given (None) is agent-tunix's value, or for the tiny model its recipe's. Names are agent-tunix's; `flat()`
gives the same job as a `ModelConfig`, a `DataConfig` and a `GRPOConfig`.
"""

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import tiny
from .checkpoint import newest_checkpoint
from .config import DataConfig, GRPOConfig, ModelConfig
from .settings import canonical_names, check_types, require


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float | None = None  # peak; 3e-6
    warmup_ratio: float | None = None  # warm-up as a share of all steps; 0.1
    max_grad_norm: float | None = None  # 0.1
    weight_decay: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    lr_scheduler_type: str | None = None


@dataclass
class AlgorithmConfig:
    """The group `grpo`: how a group of completions becomes a loss."""

    num_generations: int | None = None  # completions a prompt; 4
    num_iterations: int | None = None  # passes over a batch; 1
    beta: float | None = None  # weight of the KL penalty; 0.08
    epsilon: float | None = None  # clipping; 0.2
    epsilon_high: float | None = None
    algorithm: str | None = None
    kl_estimator: str | None = None
    loss_aggregation: str | None = None


@dataclass
class GenerationConfig:
    """Widths, and how completions are sampled."""

    max_prompt_length: int | None = None  # 256
    max_generation_steps: int | None = None  # 512
    temperature: float | None = None  # 0.9
    top_k: int | None = None  # 50
    top_p: float | None = None  # 1.0


@dataclass
class TrainingConfig:
    """How long, and in what portions. `micro_batch_size` counts prompts, as in agent-tunix.

    A step is one batch: there are `num_batches * num_epochs` of them, or `max_steps`; with neither, `num_epochs` times
    the data set. `learning_rate`, `warmup_ratio` and `max_grad_norm` may be given here or in `OptimizerConfig`.
    """

    micro_batch_size: int | None = None  # prompts a step; 4
    num_batches: int | None = None
    num_epochs: float | None = None  # 1
    max_steps: int | None = None
    gradient_accumulation_steps: int | None = None
    gradient_checkpointing: bool | None = None
    rows_per_pass: int | None = None  # completions in one learning pass: GRPOConfig.micro_batch_size
    save_interval_steps: int | None = None
    max_to_keep: int | None = None  # checkpoints
    learning_rate: float | None = None
    warmup_ratio: float | None = None
    max_grad_norm: float | None = None


@dataclass
class EvaluationConfig:
    """When and how the model answers held-out questions."""

    eval_interval_steps: int | None = None
    eval_on_start: bool | None = None
    batch_size: int | None = None  # completions at a time
    num_eval_completions: int | None = None  # sampled ones a question, for mean@k
    eval_temperature: float | None = None
    load_best_model_at_end: bool | None = None
    early_stopping_patience: int | None = None


GROUPS = ("optimizer", "grpo", "generation", "training", "evaluation")

# Where a group's name is neither ours nor one of the aliases that hold everywhere.
RENAMED = {
    ("optimizer", "warmup_ratio"): "warmup_steps",  # below 1, Transformers takes it for a share of all steps
    ("training", "warmup_ratio"): "warmup_steps",
    ("training", "micro_batch_size"): "per_device_train_batch_size",
    ("training", "rows_per_pass"): "micro_batch_size",
    ("training", "save_interval_steps"): "save_steps",
    ("training", "max_to_keep"): "save_total_limit",
    ("evaluation", "eval_interval_steps"): "eval_steps",
    ("evaluation", "batch_size"): "per_device_eval_batch_size",
}

AGENT_TUNIX = {
    "learning_rate": 3e-6,
    "warmup_steps": 0.1,
    "max_grad_norm": 0.1,
    "lr_scheduler_type": "cosine",
    "num_completions_per_prompt": 4,
    "num_iterations": 1,
    "kl_penalty_coef": 0.08,
    "epsilon": 0.2,
    "max_prompt_length": 256,
    "generation_max_length": 512,
    "generation_temperature": 0.9,
    "generation_top_k": 50,
    "generation_top_p": 1.0,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
}


@dataclass
class GRPOTrainingConfig:
    """A whole job for `tunix_torch.train`.

    Attributes:
        wandb_disabled: False also logs to Weights & Biases, which must be installed.
        checkpoint_dir: where checkpoints and results go, instead of output_dir; a run that has left a whole checkpoint
            there is continued.
        args: any other setting of `GRPOConfig`, by its name.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grpo: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 42
    wandb_disabled: bool = True
    output_dir: str = "./outputs"
    checkpoint_dir: str | None = None
    args: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> tuple[ModelConfig, DataConfig, GRPOConfig]:
        """The same job as `train.py` has it.

        Raises:
            ValueError: a value that can't be, or a setting given twice.
        """
        given = self._given()
        settings = (tiny.RECIPE if self.model.model_name == tiny.NAME else AGENT_TUNIX) | {"eval_on_start": True}
        if "max_steps" not in given and "num_train_epochs" in given:
            settings = {name: value for name, value in settings.items() if name != "max_steps"}
        settings |= given | {"output_dir": self.output_dir, "seed": self.seed}
        if self.checkpoint_dir is not None:
            settings["output_dir"] = self.checkpoint_dir
            newest = newest_checkpoint(Path(self.checkpoint_dir))
            settings["resume_from_checkpoint"] = None if newest is None else str(newest)
        if not self.wandb_disabled:
            missing = importlib.util.find_spec("wandb") is None
            require(not missing, "wandb_disabled", False, "wandb is not installed: pip install wandb")
            settings["report_to"] = ["tensorboard", "wandb"]
        # copies, since a job fills in what other fields decide
        return dataclasses.replace(self.model), dataclasses.replace(self.data), GRPOConfig(**settings)

    def _given(self) -> dict[str, Any]:
        """What the groups set, under the names of `GRPOConfig`."""
        names = [f.name for f in dataclasses.fields(GRPOConfig) if f.init]
        given = canonical_names(dict(self.args), names)
        for group in GROUPS:
            config = getattr(self, group)
            check_types(config)
            for name, value in dataclasses.asdict(config).items():
                if value is None or (group, name) in (("training", "num_batches"), ("training", "num_epochs")):
                    continue
                ours = RENAMED.get((group, name)) or next(iter(canonical_names({name: value}, names)))
                require(given.setdefault(ours, value) == value, f"{group}.{name}", value, f"{ours} is {given[ours]!r}")
        training = self.training
        if training.num_batches is not None:
            steps = int(training.num_batches * (training.num_epochs or 1))
            require(given.setdefault("max_steps", steps) == steps, "training.num_batches", steps, "max_steps differs")
        elif training.num_epochs is not None:
            given["num_train_epochs"] = training.num_epochs
        require(0 <= given.get("warmup_steps", 0), "warmup_ratio", given.get("warmup_steps"), "must be in [0, 1)")
        return given
