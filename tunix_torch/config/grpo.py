"""`GRPOConfig`: every setting of `TunixTrainer`, on top of `transformers.TrainingArguments`."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.training_args import OptimizerNames

from ..grpo import ALGORITHMS, KL_ESTIMATORS, LOSS_AGGREGATIONS
from ..runtime import device as process_device
from ..runtime import mesh, together
from ..runtime.choice import KINDS
from .settings import accept_aliases, check_types, require, setting

OVERLONG_PROMPTS = ("drop", "raise")
REFERENCES = ("start", "base")

# Of `TrainingArguments`: what nobody would read, or `transformers.Trainer` alone, beside its own forward pass.
NOT_FOR_US = (
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
    "neftune_noise_alpha",
    "label_smoothing_factor",
    "auto_find_batch_size",
    "deepspeed",
    "fsdp",
)

CHOICES = {  # of `TrainingArguments`
    "lr_scheduler_type": SchedulerType,
    "optim": OptimizerNames,
    "eval_strategy": IntervalStrategy,
    "logging_strategy": IntervalStrategy,
    "save_strategy": SaveStrategy,
}
SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # which follow `metric_for_best_model`

SYSTEM_MESSAGE = (
    "Reason step by step between <reasoning> and </reasoning>, "
    "then give only the final answer between <answer> and </answer>."
)


@accept_aliases
@dataclass
class GRPOConfig(TrainingArguments):
    """Settings of `TunixTrainer`: those of `transformers.TrainingArguments`, and GRPO's.

    One optimizer step is one rollout batch: `per_device_train_batch_size` counts prompts (times
    `gradient_accumulation_steps`), `max_steps` counts rollout batches.

    Raises:
        ValueError: a value out of range, a combination that can't work, or an unknown name; says what would be right.
    """

    # what TrainingArguments has, with other defaults
    output_dir: str | None = setting("./outputs", "where everything is written")
    per_device_train_batch_size: int = setting(8, "prompts a step (with SFT: rows a step)")
    learning_rate: float = setting(1e-5, "peak learning rate")
    logging_steps: float = setting(1, "log every so many steps")
    optim: str = setting("adamw_torch", "optimizer; the fused default of Transformers refuses XLA tensors")
    report_to: None | str | list[str] = setting(
        "tensorboard", "where to log to, besides the terminal and metrics.jsonl"
    )
    dataloader_drop_last: bool = setting(True, "leave out an epoch's last, smaller batch: its shape would be new")
    remove_unused_columns: bool = setting(False, "must stay False: reward functions read the data set's columns")

    use_grpo: bool = setting(True, "reinforcement learning; False: supervised fine-tuning on the rows' completions")
    device: str = setting("auto", "auto, xla, cuda or cpu; a process keeps the device it started with")
    num_tpu_cores: int | None = setting(None, "TPU cores to use; only 1 so far")
    system_message: str = setting(SYSTEM_MESSAGE, "instruction put before every question; '' for none")
    max_prompt_length: int = setting(
        256, "prompts are padded to this many tokens; see overlong_prompts for longer ones"
    )
    overlong_prompts: str = setting("drop", "what happens to longer prompts: drop (they are counted) or raise")
    max_length: int | None = setting(
        None, "prompt and completion together; sets max_prompt_length to what is left over"
    )

    # rollouts
    num_completions_per_prompt: int = setting(4, "group size G (also num_generations)")
    generation_max_length: int = setting(256, "completion tokens (also max_completion_length, max_generation_steps)")
    generation_temperature: float = setting(0.8, "sampling temperature (also temperature)")
    generation_top_p: float = setting(0.9, "nucleus sampling: 1 is off (also top_p)")
    generation_top_k: int = setting(50, "sample among the k likeliest tokens: 0 is off (also top_k)")
    stop_check_interval: int = setting(
        16, "look every so many tokens which completions have ended, on the CPU every time"
    )

    # advantages and loss
    algorithm: str = setting("grpo", "grpo, gspo, dr_grpo, dapo or rloo")
    normalize_advantages: bool = setting(True, "divide by the group's standard deviation (dr_grpo and rloo never do)")
    advantage_epsilon: float = setting(1e-8, "added to that standard deviation")
    use_kl_penalty: bool = setting(True, "penalise KL from the reference policy, see reference")
    reference: str = setting(
        "start",
        "the reference policy: start, the policy as this run starts (a new LoRA: the base model), or base, the model "
        "without its adapter",
    )
    kl_penalty_coef: float = setting(0.01, "weight of the KL penalty; 0: no reference is computed (also beta, kl_coef)")
    kl_estimator: str = setting("k3", "k1 (Tunix 'kl'), k2 ('mse_kl') or k3 ('low_var_kl')")
    kl_clamp_value: float | None = setting(None, "limit the KL estimate of a token to this absolute value")
    num_iterations: int = setting(1, "passes over a rollout batch, an optimizer step each")
    epsilon: float = setting(0.2, "ratios are clipped at 1 - epsilon (also clip_range)")
    epsilon_high: float | None = setting(None, "and at 1 + epsilon_high; none: epsilon, or 0.28 with dapo")
    epsilon_c: float | None = setting(None, "dual clip: cap of the ratio for negative advantages, above 1; none: off")
    loss_aggregation: str | None = setting(
        None, "of token losses: " + ", ".join(LOSS_AGGREGATIONS) + "; none: what the algorithm's paper uses"
    )
    micro_batch_size: int | None = setting(
        None,
        "completions in one learning pass: divides the group size or is a multiple of it; "
        "none: as many groups as make 4,096 tokens on the CPU and 32,768 on CUDA, on a TPU one for each device (SFT: "
        "the whole batch); 0: the whole batch",
    )
    reward_weights: list[float] | None = setting(None, "weight of each reward function; none: 1 each, or the preset's")
    reward_timeout: float | None = setting(None, "stop with an error when a reward function takes longer, in seconds")
    reward_processes: int = setting(
        0, "processes that call the reward functions, each for some of the prompts: for slow ones; 0: this one"
    )

    save_batches: int = setting(
        0, "keep the first so many steps, inputs and results, in output_dir/batches for python -m crosscheck --from-run"
    )
    profile_step: int | None = setting(
        None, "record this optimizer step, from 1, as a Chrome/Perfetto trace in output_dir/profile; the first warm up"
    )

    # evaluation
    num_eval_completions: int = setting(0, "also sample so many completions a question at evaluation, for mean@k")
    eval_temperature: float = setting(1.0, "temperature of these samples")
    early_stopping_patience: int | None = setting(
        None, "stop after so many evaluations in a row without a better metric_for_best_model (accuracy)"
    )

    def __post_init__(self) -> None:
        self._check_device()
        self._read_mappings()
        check_types(self)
        self._check_values()
        self._resolve()
        together.join_hosts(*mesh.hosts())
        super().__post_init__()
        if self.follows_metric:  # they take every metric for a loss otherwise
            mode = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = mode | (self.lr_scheduler_kwargs or {})
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # rows hold texts, which a process can't send to others
        self._n_gpu = min(1, self.n_gpu)  # one process, one GPU: Trainer would split batches over all that it sees
        # TrainingArguments has a property of this name, which Trainer reads; a field of ours replaces it
        # Accelerate numbers the CPU of several processes, and torch.load doesn't know a "cpu:0"
        self.device = torch.device("cpu") if self._setup_devices.type == "cpu" else self._setup_devices

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, with the device as the word that was asked for."""
        return super().to_dict() | {"device": self._requested_device}

    @property
    def process_index(self) -> int:
        """Which process this is, for Transformers, where 0 writes; of several hosts torch-xla calls each one 0."""
        return super().process_index if together.num_hosts() == 1 else int(not together.is_first())

    def evaluation_metrics(self, judged: bool = True) -> list[str]:
        """What `TunixTrainer.evaluate` gives, without `eval_`; not judged: there is no judge, as in plain SFT."""
        metrics = ["accuracy", "mean_length"] if judged else []
        if judged and self.num_eval_completions:
            metrics.append(f"mean@{self.num_eval_completions}")
        return [*metrics, *([] if self.use_grpo else ["loss"]), "runtime"]

    @property
    def follows_metric(self) -> bool:
        """Whether the learning rate follows `metric_for_best_model`."""
        return self.lr_scheduler_type in SCHEDULES_BY_METRIC

    def check_best_metric(self, judged: bool = True) -> None:
        """Raises ValueError when `metric_for_best_model` is a metric that no evaluation gives."""
        metric, metrics = self.metric_for_best_model, self.evaluation_metrics(judged)
        good = metric is None or metric.removeprefix("eval_") in metrics
        require(good, "metric_for_best_model", metric, f"an evaluation gives {', '.join(metrics)}")

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
        """Rows in one learning pass where all completions may be as long as they can; None: the whole batch."""
        return self.rows_in_pass_of(self.num_completions_per_prompt * self.generation_max_length)

    def rows_in_pass_of(self, completion_tokens: float) -> int | None:
        """Rows in one learning pass where a group has so many completion tokens; None: the whole batch."""
        if self.micro_batch_size is not None or not self.use_grpo:
            return self.micro_batch_size or None
        budget = mesh.tokens_per_pass()
        if budget is None:
            groups = mesh.axis_size("fsdp")  # each device a group of its own
        else:  # as many groups as the budget holds, and at least one, in passes of about the same size
            tokens = self.max_prompt_length + completion_tokens
            passes = math.ceil(self.per_device_train_batch_size / max(1, budget // tokens))
            groups = math.ceil(self.per_device_train_batch_size / passes)
        return self.num_completions_per_prompt * groups

    def _check_device(self) -> None:
        chosen = process_device.KIND
        if isinstance(self.device, torch.device):  # of a config that is made from another one
            self.device = chosen
        self._requested_device = self.device
        require(self.device in KINDS, "device", self.device, f"choose one of {', '.join(KINDS)}")
        if self.device not in ("auto", chosen):
            raise ValueError(
                f"device={self.device!r}: this process has already chosen {chosen!r}; "
                f"set TUNIX_DEVICE={self.device} before tunix_torch is imported"
            )
        self.use_cpu = chosen == "cpu"
        self.dataloader_pin_memory = chosen == "cuda"
        cores = self.num_tpu_cores
        require(cores in (None, 1), "num_tpu_cores", cores, "one core is used; leave it out or set it to 1")

    def _read_mappings(self) -> None:
        """Take settings that are mappings from the texts of flags."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}={value!r}: not valid JSON: {error}") from error
        value = self.lr_scheduler_kwargs
        right = 'expected names and values, such as {"num_cycles": 2}'
        require(value is None or isinstance(value, dict), "lr_scheduler_kwargs", value, right)

    def _check_values(self) -> None:
        self._check_lengths()
        group = self.num_completions_per_prompt
        if self.use_grpo:
            require(group > 1, "num_completions_per_prompt", group, "GRPO compares completions: at least 2 are needed")
        require(
            self.generation_temperature > 0, "generation_temperature", self.generation_temperature, "must be above 0"
        )
        require(0 < self.generation_top_p <= 1, "generation_top_p", self.generation_top_p, "must be in (0, 1]")
        require(self.advantage_epsilon >= 0, "advantage_epsilon", self.advantage_epsilon, "must not be negative")
        require(self.kl_penalty_coef >= 0, "kl_penalty_coef", self.kl_penalty_coef, "must not be negative")
        require(0 < self.epsilon < 1, "epsilon", self.epsilon, "must be in (0, 1)")
        require(self.epsilon_c is None or self.epsilon_c > 1, "epsilon_c", self.epsilon_c, "must be above 1")
        clamp = self.kl_clamp_value
        require(clamp is None or clamp > 0, "kl_clamp_value", clamp, "must be above 0")
        require(self.eval_temperature > 0, "eval_temperature", self.eval_temperature, "must be above 0")
        for name in (
            "generation_max_length",
            "max_prompt_length",
            "num_iterations",
            "stop_check_interval",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in (
            "generation_top_k",
            "num_eval_completions",
            "reward_processes",
            "save_batches",
            "seed",
            "learning_rate",
            "max_grad_norm",
            "weight_decay",
            "adam_epsilon",
            "warmup_steps",
            "eval_delay",
            "dataloader_num_workers",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        require(self.seed < 2**32, "seed", self.seed, "must be below 2**32")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must be in [0, 1)")
        timeout = self.reward_timeout
        require(timeout is None or timeout > 0, "reward_timeout", timeout, "must be above 0")
        limit = self.save_total_limit
        require(limit is None or limit >= 0, "save_total_limit", limit, "must not be negative; 0: no limit")
        for name in ("early_stopping_patience", "profile_step"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        for name, choices in (
            ("algorithm", ALGORITHMS),
            ("reference", REFERENCES),
            ("overlong_prompts", OVERLONG_PROMPTS),
            ("kl_estimator", KL_ESTIMATORS),
            ("loss_aggregation", (None, *LOSS_AGGREGATIONS)),
        ):
            value = getattr(self, name)
            require(value in choices, name, value, f"choose one of {', '.join(c for c in choices if c)}")
        for name, kind in CHOICES.items():
            value, choices = getattr(self, name), [choice.value for choice in kind]
            require(value in choices, name, value, f"choose one of {', '.join(choices)}")
        if self.algorithm == "dapo" and self.kl_penalty_coef not in (0.0, type(self).kl_penalty_coef):
            raise ValueError(
                f"kl_penalty_coef={self.kl_penalty_coef}: algorithm 'dapo' has no KL penalty; leave it out, or 0"
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
        require(micro is None or micro >= 0, "micro_batch_size", micro, "must not be negative")
        if micro and self.use_grpo:
            fits = group % micro == 0 or micro % group == 0
            right = f"must divide num_completions_per_prompt={group} or be a multiple of it"
            require(fits, "micro_batch_size", micro, right)
        require(
            not (self.bf16 or self.fp16),
            "bf16/fp16",
            True,
            "choose the precision with model_dtype (ModelConfig) instead",
        )
        for name in NOT_FOR_US:
            require(not getattr(self, name), name, getattr(self, name), "does not work here: leave it out")
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):  # what `accelerate launch` sets
            value = os.environ.get(name, "false")
            require(value.lower() == "false", name, value, "does not work here: accelerate launch --multi_gpu")
        require(
            not self.remove_unused_columns, "remove_unused_columns", True, "must be False; rewards read the columns"
        )

    def _check_lengths(self) -> None:
        """How long a run is, and how often it logs, evaluates and saves."""
        steps = self.max_steps
        require(steps == -1 or steps >= 1, "max_steps", steps, "must be at least 1, or -1: num_train_epochs decides")
        require(self.num_train_epochs > 0, "num_train_epochs", self.num_train_epochs, "must be above 0")
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value, strategy = getattr(self, name), name.replace("steps", "strategy")
            good = value is None or 0 < value < 1 or (value >= 1 and value == int(value))
            right = f"must be a whole number above 0, or, below 1, a share of all steps ({strategy}='no': never)"
            require(good, name, value, right)

    def _resolve(self) -> None:
        """Fill in what other fields decide."""
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        for name, value in (
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("save_strategy", self.save_strategy == "best" and "best"),
            ("early_stopping_patience", self.early_stopping_patience),
            ("lr_scheduler_type", self.follows_metric and SchedulerType(self.lr_scheduler_type).value),
        ):
            right = "evaluations decide this: set eval_strategy (or eval_steps)"
            require(not value or self.eval_strategy != "no", name, value, right)
            if value and self.metric_for_best_model is None:
                self.metric_for_best_model = "accuracy"
        self.check_best_metric()
        if self.early_stopping_patience:
            self.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
        if self.max_length is not None:
            left = self.max_length - self.generation_max_length
            right = f"must leave room for a prompt beside generation_max_length={self.generation_max_length}"
            require(left >= 1, "max_length", self.max_length, right)
            if self.max_prompt_length not in (type(self).max_prompt_length, left):
                raise ValueError(
                    f"max_prompt_length={self.max_prompt_length}: max_length leaves {left}; give one of the two"
                )
            self.max_prompt_length = left
        require(self.clip_high >= self.epsilon, "epsilon_high", self.epsilon_high, "must not be below epsilon")
