"""Every setting: `ModelConfig`, `DataConfig`, and `GRPOConfig`, which is a `transformers.TrainingArguments`.

Each field is a flag of `train.py` and a key of its config files. Names that TRL, Tunix and other trainers use for the
same thing are accepted everywhere as aliases.
"""

import dataclasses
import difflib
import functools
import types
from dataclasses import dataclass, field
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers import TrainingArguments

from . import device as process_device
from .device import KINDS

ALGORITHMS = ("grpo", "gspo", "dr_grpo", "dapo", "rloo")
KL_ESTIMATORS = ("k1", "k2", "k3")
LOSS_AGGREGATIONS = (
    "token-mean",
    "sequence-mean-token-mean",
    "sequence-mean-token-scale",
    "seq-mean-token-sum",
    "sequence-mean-token-sum-norm",
)
DTYPES = ("auto", "float32", "bfloat16")

SYSTEM_MESSAGE = (
    "Reason step by step between <reasoning> and </reasoning>, "
    "then give only the final answer between <answer> and </answer>."
)

# The name that others use -> ours.
ALIASES = {
    "num_generations": "num_completions_per_prompt",
    "beta": "kl_penalty_coef",
    "kl_coef": "kl_penalty_coef",
    "clip_range": "epsilon",
    "temperature": "generation_temperature",
    "top_p": "generation_top_p",
    "top_k": "generation_top_k",
    "max_completion_length": "generation_max_length",
    "max_generation_steps": "generation_max_length",
    "max_response_length": "generation_max_length",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "num_training_steps": "max_steps",
    "dtype": "model_dtype",
}


def _setting(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


def nearest(name: str, names: list[str]) -> str:
    """A hint such as "; did you mean 'epsilon'?", or "" when nothing comes close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def canonical_names(settings: dict[str, Any], valid: list[str]) -> dict[str, Any]:
    """Replace aliases by our names.

    Raises:
        ValueError: a name that is neither a field nor an alias (with the nearest one), or the same setting twice.
    """
    result: dict[str, Any] = {}
    for name, value in settings.items():
        ours = name if name in valid else ALIASES.get(name, name)
        if ours not in valid:
            raise ValueError(f"unknown setting {name!r}{nearest(name, [*valid, *ALIASES])}")
        if ours in result and result[ours] != value:
            raise ValueError(f"{name}={value!r}: the same setting as {ours!r}, which is already {result[ours]!r}")
        result[ours] = value
    return result


def _accept_aliases(cls: type) -> type:
    """Let the constructor of a dataclass take aliases, and name the nearest field when it gets an unknown name."""
    init, valid = cls.__init__, [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(init)
    def init_with_aliases(self: Any, *args: Any, **settings: Any) -> None:
        init(self, *args, **canonical_names(settings, valid))

    cls.__init__ = init_with_aliases
    return cls


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type; True for annotations that are not understood."""
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def check_types(config: Any) -> None:
    """Check the fields of a dataclass of settings against their annotations; inherited ones where they are numbers.

    Raises:
        ValueError: a value of another type, naming the field.
    """
    hints = get_type_hints(type(config))
    for name in config.__dataclass_fields__:
        hint, value = hints[name], getattr(config, name, None)
        checked = name in type(config).__annotations__ or hint in (int, float, bool)
        if checked and not _fits(value, hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ValueError(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")


def _require(condition: bool, name: str, value: object, right: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: {right}")


@dataclass
class ModelConfig:
    """Which model, and the LoRA on it."""

    model_name: str = _setting("tiny", "a Hugging Face model: hub id or folder; 'tiny' is made here, offline")
    model_dtype: str = _setting(
        "auto", "of the base weights: auto (bfloat16 on TPU and CUDA, else float32), float32, bfloat16"
    )
    lora_rank: int = _setting(16, "rank of the LoRA matrices")
    lora_alpha: float = _setting(32.0, "the LoRA's output is scaled by lora_alpha / lora_rank")
    lora_dropout: float = _setting(0.0, "dropout on the LoRA's input while learning")

    def __post_init__(self) -> None:
        check_types(self)
        _require(self.model_dtype in DTYPES, "model_dtype", self.model_dtype, f"choose one of {', '.join(DTYPES)}")
        _require(self.lora_rank >= 1, "lora_rank", self.lora_rank, "must be at least 1")
        _require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "must be above 0")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "must be in [0, 1)")


@dataclass
class DataConfig:
    """Which questions, and how they are put to the model."""

    data_path: str | None = _setting(
        None, "training rows: a .json or .jsonl file, or a Hugging Face data set; none: generated arithmetic"
    )
    val_data_path: str | None = _setting(
        None, "evaluation rows, likewise; none: generated ones with generated training rows"
    )
    dataset_config: str | None = _setting(None, "configuration of a Hugging Face data set, e.g. 'main' of openai/gsm8k")
    dataset_split: str = _setting("train", "split of a Hugging Face data set to train on")
    val_dataset_split: str = _setting("test", "split of a Hugging Face data set to evaluate on")
    num_train_rows: int | None = _setting(None, "use at most so many training rows (generated: make so many, 4096)")
    num_eval_rows: int = _setting(256, "use at most so many evaluation rows")
    reward_funcs: list[str] = field(
        default_factory=lambda: ["correctness", "format"],
        metadata={"help": "names from rewards/; the first one decides whether an answer counts as right"},
    )

    def __post_init__(self) -> None:
        check_types(self)
        rows = self.num_train_rows
        _require(rows is None or rows >= 1, "num_train_rows", rows, "must be at least 1")
        _require(self.num_eval_rows >= 1, "num_eval_rows", self.num_eval_rows, "must be at least 1")
        _require(len(self.reward_funcs) >= 1, "reward_funcs", self.reward_funcs, "name at least one reward function")


@_accept_aliases
@dataclass
class GRPOConfig(TrainingArguments):
    """Settings of `TunixTrainer`: those of `transformers.TrainingArguments`, and GRPO's.

    One optimizer step is one rollout batch: `per_device_train_batch_size` counts prompts (times
    `gradient_accumulation_steps`), `max_steps` counts rollout batches.

    Raises:
        ValueError: a value out of range, a combination that can't work, or an unknown name; says what would be right.
    """

    # what TrainingArguments has, with other defaults
    output_dir: str | None = _setting("./outputs", "where everything is written")
    per_device_train_batch_size: int = _setting(8, "prompts a step (with SFT: rows a step)")
    learning_rate: float = _setting(1e-5, "peak learning rate")
    logging_steps: float = _setting(1, "log every so many steps")
    optim: str = _setting("adamw_torch", "optimizer; the fused default of Transformers refuses XLA tensors")
    report_to: None | str | list[str] = _setting(
        "tensorboard", "where to log to, besides the terminal and metrics.jsonl"
    )
    dataloader_drop_last: bool = _setting(True, "leave out an epoch's last, smaller batch: its shape would be new")
    remove_unused_columns: bool = _setting(False, "must stay False: reward functions read the data set's columns")

    use_grpo: bool = _setting(True, "reinforcement learning; False: supervised fine-tuning on the rows' completions")
    device: str = _setting("auto", "auto, xla, cuda or cpu; a process keeps the device it started with")
    num_tpu_cores: int | None = _setting(None, "TPU cores to use; only 1 so far")
    system_message: str = _setting(SYSTEM_MESSAGE, "instruction put before every question; '' for none")
    max_prompt_length: int = _setting(
        256, "prompts are padded to this many tokens; longer ones are left out and counted"
    )
    max_length: int | None = _setting(
        None, "prompt and completion together; sets max_prompt_length to what is left over"
    )

    # rollouts
    num_completions_per_prompt: int = _setting(4, "group size G (also num_generations)")
    generation_max_length: int = _setting(256, "completion tokens (also max_completion_length, max_generation_steps)")
    generation_temperature: float = _setting(0.8, "sampling temperature (also temperature)")
    generation_top_p: float = _setting(0.9, "nucleus sampling: 1 is off (also top_p)")
    generation_top_k: int = _setting(50, "sample among the k likeliest tokens: 0 is off (also top_k)")
    stop_check_interval: int = _setting(16, "look every so many tokens whether all completions have ended")

    # advantages and loss
    algorithm: str = _setting("grpo", "grpo, gspo, dr_grpo, dapo or rloo")
    normalize_advantages: bool = _setting(True, "divide by the group's standard deviation (dr_grpo and rloo never do)")
    advantage_epsilon: float = _setting(1e-8, "added to that standard deviation")
    use_kl_penalty: bool = _setting(
        True, "penalise KL from the reference policy, which is the model without its adapter"
    )
    kl_penalty_coef: float = _setting(
        0.01, "weight of the KL penalty; 0: no reference is computed (also beta, kl_coef)"
    )
    kl_estimator: str = _setting("k3", "k1 (Tunix 'kl'), k2 ('mse_kl') or k3 ('low_var_kl')")
    kl_clamp_value: float | None = _setting(None, "limit the KL estimate of a token to this absolute value")
    num_iterations: int = _setting(1, "passes over a rollout batch, an optimizer step each")
    epsilon: float = _setting(0.2, "ratios are clipped at 1 - epsilon (also clip_range)")
    epsilon_high: float | None = _setting(None, "and at 1 + epsilon_high; none: epsilon, or 0.28 with dapo")
    epsilon_c: float | None = _setting(None, "dual clip: cap of the ratio for negative advantages, above 1; none: off")
    loss_aggregation: str | None = _setting(
        None, "of token losses: " + ", ".join(LOSS_AGGREGATIONS) + "; none: what the algorithm's paper uses"
    )
    micro_batch_size: int | None = _setting(
        None,
        "completions in one learning pass: divides the group size or is a multiple of it; "
        "none: one group (SFT: the whole batch); 0: the whole batch",
    )
    reward_weights: list[float] | None = _setting(None, "weight of each reward function; none: 1 each")

    save_batches: int = _setting(
        0, "keep the first so many steps, inputs and results, in output_dir/batches for python -m crosscheck --from-run"
    )

    # evaluation
    num_eval_completions: int = _setting(0, "also sample so many completions a question at evaluation, for mean@k")
    eval_temperature: float = _setting(1.0, "temperature of these samples")

    def __post_init__(self) -> None:
        self._check_device()
        check_types(self)
        self._check_values()
        self._resolve()
        super().__post_init__()
        self._n_gpu = min(1, self.n_gpu)  # one process, one GPU: Trainer would split batches over all that it sees
        # TrainingArguments has a property of this name, which Trainer reads; a field of ours replaces it
        self.device = self._setup_devices

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, with the device as the word that was asked for."""
        return super().to_dict() | {"device": self._requested_device}

    @property
    def beta(self) -> float:
        """The KL coefficient in force: 0 when there is no penalty."""
        return self.kl_penalty_coef if self.use_kl_penalty and self.algorithm != "dapo" else 0.0

    @property
    def clip_high(self) -> float:
        """The upper epsilon in force."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return max(0.28, self.epsilon) if self.algorithm == "dapo" else self.epsilon

    @property
    def aggregation(self) -> str:
        """The loss aggregation in force."""
        by_algorithm = {"dapo": "token-mean", "dr_grpo": "sequence-mean-token-scale"}
        return self.loss_aggregation or by_algorithm.get(self.algorithm, "sequence-mean-token-mean")

    @property
    def rows_per_pass(self) -> int | None:
        """Rows in one learning pass; None: the whole batch."""
        if self.micro_batch_size is None:
            return self.num_completions_per_prompt if self.use_grpo else None
        return self.micro_batch_size or None

    def _check_device(self) -> None:
        chosen = process_device.KIND
        if isinstance(self.device, torch.device):  # of a config that is made from another one
            self.device = chosen
        self._requested_device = self.device
        _require(self.device in KINDS, "device", self.device, f"choose one of {', '.join(KINDS)}")
        if self.device not in ("auto", chosen):
            raise ValueError(
                f"device={self.device!r}: this process has already chosen {chosen!r}; "
                f"set TUNIX_DEVICE={self.device} before tunix_torch is imported"
            )
        self.use_cpu = chosen == "cpu"
        self.dataloader_pin_memory = chosen == "cuda"
        cores = self.num_tpu_cores
        _require(cores in (None, 1), "num_tpu_cores", cores, "one core is used; leave it out or set it to 1")

    def _check_values(self) -> None:
        group = self.num_completions_per_prompt
        if self.use_grpo:
            _require(group > 1, "num_completions_per_prompt", group, "GRPO compares completions: at least 2 are needed")
        _require(
            self.generation_temperature > 0, "generation_temperature", self.generation_temperature, "must be above 0"
        )
        _require(0 < self.generation_top_p <= 1, "generation_top_p", self.generation_top_p, "must be in (0, 1]")
        _require(self.advantage_epsilon >= 0, "advantage_epsilon", self.advantage_epsilon, "must not be negative")
        _require(self.kl_penalty_coef >= 0, "kl_penalty_coef", self.kl_penalty_coef, "must not be negative")
        _require(0 < self.epsilon < 1, "epsilon", self.epsilon, "must be in (0, 1)")
        _require(self.epsilon_c is None or self.epsilon_c > 1, "epsilon_c", self.epsilon_c, "must be above 1")
        clamp = self.kl_clamp_value
        _require(clamp is None or clamp > 0, "kl_clamp_value", clamp, "must be above 0")
        _require(self.eval_temperature > 0, "eval_temperature", self.eval_temperature, "must be above 0")
        for name in (
            "generation_max_length",
            "max_prompt_length",
            "num_iterations",
            "stop_check_interval",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in (
            "generation_top_k",
            "num_eval_completions",
            "save_batches",
            "seed",
            "learning_rate",
            "max_grad_norm",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        for name, choices in (
            ("algorithm", ALGORITHMS),
            ("kl_estimator", KL_ESTIMATORS),
            ("loss_aggregation", (None, *LOSS_AGGREGATIONS)),
        ):
            value = getattr(self, name)
            _require(value in choices, name, value, f"choose one of {', '.join(c for c in choices if c)}")
        if self.algorithm == "dapo" and self.kl_penalty_coef not in (0.0, type(self).kl_penalty_coef):
            raise ValueError(
                f"kl_penalty_coef={self.kl_penalty_coef}: algorithm 'dapo' has no KL penalty; leave it out"
            )
        if self.num_iterations > 1 and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"num_iterations={self.num_iterations} with gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}: several passes step the optimizer after each batch; "
                "raise per_device_train_batch_size and set micro_batch_size instead"
            )
        if self.save_batches and (self.gradient_accumulation_steps > 1 or not self.use_grpo):
            raise ValueError(f"save_batches={self.save_batches}: works with use_grpo, without gradient accumulation")
        micro = self.micro_batch_size
        _require(micro is None or micro >= 0, "micro_batch_size", micro, "must not be negative")
        if micro and self.use_grpo:
            fits = group % micro == 0 or micro % group == 0
            right = f"must divide num_completions_per_prompt={group} or be a multiple of it"
            _require(fits, "micro_batch_size", micro, right)
        _require(
            not (self.bf16 or self.fp16),
            "bf16/fp16",
            True,
            "choose the precision with model_dtype (ModelConfig) instead",
        )
        _require(
            not self.remove_unused_columns, "remove_unused_columns", True, "must be False; rewards read the columns"
        )

    def _resolve(self) -> None:
        """Fill in what other fields decide."""
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        if self.max_length is not None:
            left = self.max_length - self.generation_max_length
            right = f"must leave room for a prompt beside generation_max_length={self.generation_max_length}"
            _require(left >= 1, "max_length", self.max_length, right)
            if self.max_prompt_length not in (type(self).max_prompt_length, left):
                raise ValueError(
                    f"max_prompt_length={self.max_prompt_length}: max_length leaves {left}; give one of the two"
                )
            self.max_prompt_length = left
        _require(self.clip_high >= self.epsilon, "epsilon_high", self.epsilon_high, "must not be below epsilon")
