"""A whole job in sections, as agent-tunix and `run_training.py` have it: `GRPOTrainingConfig`.

A setting that is None takes agent-tunix's value, or for the tiny model that of its recipe (`config/recipes.py`).
`model` and `data` have this library's own defaults, but a model that is named by its size is asked GSM8K's questions.
The names are agent-tunix's. `flat()` gives the same job as a `ModelConfig`, a `DataConfig` and a `GRPOConfig`.
"""

import dataclasses
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config.aliases import ALIASES
from ..config.data import DataConfig
from ..config.grpo import GRPOConfig
from ..config.model import TINY_NAME, ModelConfig
from ..config.recipes import AGENT_TUNIX, JOB, TINY
from ..config.settings import canonical_names, check_types, nearest, require, setting

# A section's setting -> that of GRPOConfig, where neither its own name nor an alias says it. One name means two things:
# agent-tunix's `training.micro_batch_size` counts the prompts of a step; `GRPOConfig.micro_batch_size` counts the
# completions of one learning pass, and is `training.rows_per_pass` here.
RENAMED = {
    "optimizer.warmup_ratio": "warmup_steps",  # below 1, Transformers takes it for a share of all steps
    "training.warmup_ratio": "warmup_steps",
    "training.micro_batch_size": "per_device_train_batch_size",
    "training.rows_per_pass": "micro_batch_size",
    "training.save_interval_steps": "save_steps",
    "training.max_to_keep": "save_total_limit",
    "evaluation.eval_interval_steps": "eval_steps",
    "evaluation.batch_size": "per_device_eval_batch_size",
}


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float | None = setting(None, "peak")
    warmup_ratio: float | None = setting(None, "warm-up as a share of all steps")
    max_grad_norm: float | None = setting(None, "gradients are scaled down to this norm")
    weight_decay: float | None = setting(None, "of AdamW")
    adam_beta1: float | None = setting(None, "of AdamW")
    adam_beta2: float | None = setting(None, "of AdamW")
    lr_scheduler_type: str | None = setting(None, "linear, cosine, constant, ...")


@dataclass
class AlgorithmConfig:
    """The section `grpo`: how a group of completions becomes a loss."""

    num_generations: int | None = setting(None, "completions a prompt")
    num_iterations: int | None = setting(None, "passes over a batch")
    beta: float | None = setting(None, "weight of the KL penalty")
    epsilon: float | None = setting(None, "clipping of the ratio")
    epsilon_high: float | None = setting(None, "clipping above; none: epsilon")
    algorithm: str | None = setting(None, "grpo, gspo, dr_grpo, dapo (with beta=0) or rloo")
    kl_estimator: str | None = setting(None, "k1, k2 or k3")
    loss_aggregation: str | None = setting(None, "none: what the algorithm's paper uses")


@dataclass
class GenerationConfig:
    """Widths, and how completions are sampled."""

    max_prompt_length: int | None = setting(None, "tokens")
    max_generation_steps: int | None = setting(None, "completion tokens")
    temperature: float | None = setting(None, "of sampling")
    top_k: int | None = setting(None, "0 is off")
    top_p: float | None = setting(None, "1 is off")


@dataclass
class TrainingConfig:
    """How long, and in what portions. `micro_batch_size` counts prompts, as in agent-tunix.

    A step is one batch. There are `max_steps` of them, else `num_batches * num_epochs`, else `num_epochs` times those
    of the data set. `learning_rate`, `warmup_ratio` and `max_grad_norm` may be given here or in `OptimizerConfig`.
    """

    micro_batch_size: int | None = setting(None, "prompts a step")
    num_batches: int | None = setting(None, "steps an epoch; none: as many as the data set has")
    num_epochs: float | None = setting(None, "passes over the data set, or over num_batches")
    max_steps: int | None = setting(None, "of the whole run, whatever the two above say")
    gradient_accumulation_steps: int | None = setting(None, "batches of prompts to one optimizer step")
    gradient_checkpointing: bool | None = setting(None, "compute activations twice, to save memory")
    rows_per_pass: int | None = setting(
        None, "completions in one learning pass; none: as many as make a good pass on this device; 0: all"
    )
    save_interval_steps: int | None = setting(None, "write a checkpoint every so many steps")
    max_to_keep: int | None = setting(None, "checkpoints; none: all")
    learning_rate: float | None = setting(None, "peak")
    warmup_ratio: float | None = setting(None, "warm-up as a share of all steps")
    max_grad_norm: float | None = setting(None, "gradients are scaled down to this norm")


@dataclass
class EvaluationConfig:
    """When and how the model answers held-out questions."""

    eval_interval_steps: int | None = setting(None, "none: before and after training")
    eval_on_start: bool | None = setting(None, "before training")
    batch_size: int | None = setting(None, "completions at a time")
    num_eval_completions: int | None = setting(None, "sampled ones a question, for mean@k")
    eval_temperature: float | None = setting(None, "of these samples")
    load_best_model_at_end: bool | None = setting(None, "by metric_for_best_model")
    early_stopping_patience: int | None = setting(None, "stop after so many evaluations in a row without a better one")


@dataclass
class GRPOTrainingConfig:
    """A whole job for `tunix_torch.train`.

    `output_dir` and `checkpoint_dir` are where everything is written, ./outputs without them; in `checkpoint_dir` a run
    that has left a whole checkpoint there is continued.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grpo: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = setting(42, "same seed, same run")
    device: str = setting("auto", "auto, tpu, xla, cuda or cpu")
    wandb_disabled: bool = setting(True, "false: also log to Weights & Biases, which must be installed")
    output_dir: str | None = setting(None, "none: the folder of this run, below")
    checkpoint_dir: str | None = setting(None, "checkpoints and results; a run that is there already is continued")
    args: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "any other setting of train.py: args.overlong_prompts=raise"}
    )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "GRPOTrainingConfig":
        """A job from names and values as a YAML file has them: {"model": {"lora_rank": 8}, "seed": 1}.

        Raises:
            ValueError: an unknown name (with the nearest one), or a value that can't be.
        """
        values, names, sections = {}, setting_names(), sections_of_settings()
        for name, value in settings.items():
            if name in sections:
                require(isinstance(value, Mapping), name, value, "expected names and values")
                for unknown in [f"{name}.{key}" for key in value if f"{name}.{key}" not in names]:
                    raise unknown_setting(unknown)
                try:
                    value = sections[name](**value)
                except ValueError as error:
                    raise ValueError(f"{name}.{error}") from error
            elif name not in names:
                raise unknown_setting(name)
            values[name] = value
        return cls(**values)

    def flat(self) -> tuple[ModelConfig, DataConfig, GRPOConfig]:
        """The same job as `train.py` has it.

        Raises:
            ValueError: a value that can't be, or a setting given twice.
        """
        check_types(self)
        given = self._given()
        settings = JOB | (TINY if self.model.model_name == TINY_NAME else AGENT_TUNIX)
        if "num_train_epochs" in given:
            settings.pop("max_steps", None)
        if given.get("algorithm", ("", ""))[1] == "dapo":  # which has no KL penalty
            settings.pop("kl_penalty_coef", None)
        settings |= {name: value for name, (_, value) in given.items()}
        try:
            args = GRPOConfig(**settings)
        except ValueError as error:
            name, equals, rest = str(error).partition("=")
            raise ValueError(f"{given.get(name, (name, None))[0]}{equals}{rest}") from error
        # copies, since a job fills in what other fields decide
        data = dataclasses.replace(self.data)
        if self.model.model_size is not None and data.data_path is None and data.dataset is None:
            data.dataset = "gsm8k"
        return dataclasses.replace(self.model), data, args

    def _given(self) -> dict[str, tuple[str, Any]]:
        """Name in `GRPOConfig` -> (name here, value) of every setting that is given."""
        require(isinstance(self.args, dict), "args", self.args, "expected names and values")
        valid = [f.name for f in dataclasses.fields(GRPOConfig) if f.init]
        given = {name: (f"args.{name}", value) for name, value in canonical_names(self.args, valid).items()}
        for ours, name, value in [*self._of_sections(), *self._of_length("max_steps" in given), *self._of_job()]:
            other, there = given.setdefault(ours, (name, value))
            require(there == value, name, value, f"is also given as {other}={there!r}; give one of the two")
        return given

    def _of_sections(self) -> Iterator[tuple[str, str, Any]]:
        """(name in `GRPOConfig`, name here, value) of what the sections give, but for the length of the run."""
        for section in ("optimizer", "grpo", "generation", "training", "evaluation"):
            config = getattr(self, section)
            try:
                check_types(config)
            except ValueError as error:
                raise ValueError(f"{section}.{error}") from error
            for key, value in dataclasses.asdict(config).items():
                name = f"{section}.{key}"
                if value is None or name in ("training.num_batches", "training.num_epochs", "training.max_steps"):
                    continue
                if key == "warmup_ratio":
                    require(0 <= value < 1, name, value, "must be in [0, 1)")
                yield name_in_grpo_config(name), name, value

    def _of_length(self, in_args: bool) -> Iterator[tuple[str, str, Any]]:
        """How many steps: `max_steps`, else `num_batches * num_epochs`, else `num_epochs` times those of the data set.

        Args:
            in_args: `args` has `max_steps` already, which outweighs `num_epochs`.
        """
        batches, epochs, steps = self.training.num_batches, self.training.num_epochs, self.training.max_steps
        require(batches is None or batches >= 1, "training.num_batches", batches, "must be at least 1")
        require(epochs is None or epochs > 0, "training.num_epochs", epochs, "must be above 0")
        if steps is not None:
            yield "max_steps", "training.max_steps", steps
        elif batches is not None:
            yield "max_steps", "training.num_batches", int(batches * (epochs or 1))
        elif epochs is not None and not in_args:
            yield "num_train_epochs", "training.num_epochs", epochs

    def _of_job(self) -> Iterator[tuple[str, str, Any]]:
        """Yield the settings that belong to no section."""
        yield "seed", "seed", self.seed
        yield "device", "device", self.device
        if self.output_dir is not None:
            yield "output_dir", "output_dir", self.output_dir
        if self.checkpoint_dir is not None:
            yield "output_dir", "checkpoint_dir", self.checkpoint_dir
            yield "resume_from_checkpoint", "checkpoint_dir", "auto"
        if not self.wandb_disabled:
            installed = importlib.util.find_spec("wandb") is not None
            require(installed, "wandb_disabled", False, "wandb is not installed: pip install wandb")
            yield "report_to", "wandb_disabled", ["tensorboard", "wandb"]


def sections_of_settings() -> dict[str, type]:
    """The fields of `GRPOTrainingConfig` that are dataclasses themselves."""
    return {f.name: f.type for f in dataclasses.fields(GRPOTrainingConfig) if dataclasses.is_dataclass(f.type)}


def name_in_grpo_config(name: str) -> str:
    """The field of `GRPOConfig` that a section's setting sets: "training.num_epochs" -> "num_train_epochs"."""
    key = name.rpartition(".")[2]
    return RENAMED.get(name) or ALIASES.get(key, key)


def setting_names() -> list[str]:
    """Every name that a job may set: "seed", "training.num_batches" and so on."""
    sections = sections_of_settings()
    names = [f.name for f in dataclasses.fields(GRPOTrainingConfig) if f.name not in sections]
    return names + [f"{section}.{f.name}" for section, config in sections.items() for f in dataclasses.fields(config)]


def unknown_setting(name: str) -> ValueError:
    """The error for a name that is none, with the one that is most likely meant."""
    names = setting_names()
    elsewhere = [other for other in names if other.rpartition(".")[2] == name.rpartition(".")[2]]
    section, _, key = name.rpartition(".")
    if f"{section}.{ALIASES.get(key)}" in names:
        elsewhere = [f"{section}.{ALIASES[key]}"]
    hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else nearest(name, [*names, *sections_of_settings()])
    return ValueError(f"unknown setting {name!r}{hint}")
