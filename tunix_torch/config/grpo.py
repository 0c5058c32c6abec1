"""`GRPOConfig`: every setting of `TunixTrainer`, on top of `transformers.TrainingArguments`."""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments

from ..grpo import LOSS_AGGREGATIONS
from ..runtime import device as process_device
from ..runtime import mesh, together
from ..runtime.choice import KINDS
from .checks import check_values
from .generation import read_generation_kwargs
from .settings import accept_aliases, check_types, require, setting

SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # these follow `metric_for_best_model`

SYSTEM_MESSAGE = (
    "Reason step by step between <reasoning> and </reasoning>, "
    "then give only the final answer between <answer> and </answer>."
)


@accept_aliases
@dataclass
class GRPOConfig(TrainingArguments):
    """Settings of `TunixTrainer`: those of `transformers.TrainingArguments`, and GRPO's.

    One optimizer step is one rollout batch: `per_device_train_batch_size` counts prompts (times
    `gradient_accumulation_steps`), `max_steps` counts rollout batches. With `steps_per_generation`, the batches of so
    many steps are sampled at once.

    Raises:
        ValueError: a value is out of range, a combination can't work, or a name is unknown. The message says what would
            be right.
    """

    # settings of TrainingArguments, with other defaults
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
    min_p: float | None = setting(
        None, "sample among tokens at least so likely as this share of the likeliest one; 0 or none: off"
    )
    repetition_penalty: float = setting(
        1.0, "above 1: tokens of the prompt and of the completion so far become less likely; 1 is off"
    )
    generation_kwargs: dict[str, Any] | str | None = setting(
        None, 'more of these settings by the names of Transformers, such as {"top_k": 20}; they win over the others'
    )
    dynamic_sampling: bool = setting(
        False, "replace groups whose rewards are all equal by those of other training rows, as DAPO does"
    )
    max_sampling_rounds: int = setting(
        4, "with dynamic_sampling: rollouts of a batch at most, the first one included; then equal groups stay"
    )
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
    steps_per_generation: int = setting(
        1, "steps that share a rollout: so many times the prompts of a step are sampled at once, and then learned from"
    )
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
        for name, value in read_generation_kwargs(self.generation_kwargs).items():
            setattr(self, name, value)
        check_types(self)
        check_values(self)
        self._resolve()
        together.join_hosts(*mesh.hosts())
        super().__post_init__()
        if self.follows_metric:  # by default these schedules take every metric for a loss
            mode = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = mode | (self.lr_scheduler_kwargs or {})
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # rows hold texts, which a process can't send to others
        self._n_gpu = min(1, self.n_gpu)  # one process, one GPU: Trainer would split batches over all that it sees
        # Trainer reads `device`, a property of TrainingArguments that our field replaces. With several processes
        # Accelerate calls the CPU "cpu:0", which torch.load doesn't know, so it is "cpu" here.
        self.device = torch.device("cpu") if self._setup_devices.type == "cpu" else self._setup_devices

    def to_dict(self) -> dict[str, Any]:
        """Return what `TrainingArguments.to_dict` does, but with the device as the word that was asked for."""
        return super().to_dict() | {"device": self._requested_device}

    @property
    def process_index(self) -> int:
        """The number of this process: Transformers lets 0 write files, and torch-xla would call every host 0."""
        return super().process_index if together.num_hosts() == 1 else int(not together.is_first())

    def evaluation_metrics(self, judged: bool = True) -> list[str]:
        """The metrics that `TunixTrainer.evaluate` gives, without `eval_`; `judged` is False in SFT without a judge."""
        metrics = ["accuracy", "mean_length"] if judged else []
        if judged and self.num_eval_completions:
            metrics.append(f"mean@{self.num_eval_completions}")
        return [*metrics, *([] if self.use_grpo else ["loss"]), "runtime"]

    @property
    def follows_metric(self) -> bool:
        """Whether the learning rate follows `metric_for_best_model`."""
        return self.lr_scheduler_type in SCHEDULES_BY_METRIC

    def check_best_metric(self, judged: bool = True) -> None:
        """Raise ValueError when `metric_for_best_model` is a metric that no evaluation gives."""
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
    def rows_per_step(self) -> int:
        """Completions in the rollout batch of this process: B."""
        return self.per_device_train_batch_size * self.num_completions_per_prompt

    @property
    def rows_per_pass(self) -> int | None:
        """Rows in one learning pass where every completion may have its greatest length; None: the whole batch."""
        return self.rows_in_pass_of(self.num_completions_per_prompt * self.generation_max_length)

    def rows_in_pass_of(self, completion_tokens: float) -> int | None:
        """Rows in one learning pass where a group has `completion_tokens` tokens in all; None: the whole batch."""
        if self.micro_batch_size is not None or not self.use_grpo:
            return self.micro_batch_size or None
        budget = mesh.tokens_per_pass()
        if budget is None:
            groups = mesh.axis_size("fsdp")  # one group for each device
        else:  # as many groups as the budget holds, and at least one, in passes of about the same size
            tokens = self.max_prompt_length + completion_tokens
            passes = math.ceil(self.per_device_train_batch_size / max(1, budget // tokens))
            groups = math.ceil(self.per_device_train_batch_size / passes)
        return self.num_completions_per_prompt * groups

    def _check_device(self) -> None:
        chosen = process_device.KIND
        if isinstance(self.device, torch.device):  # this config is made from another one
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
        """Parse settings that are mappings, where a flag gave them as JSON text."""
        for name in self._VALID_DICT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and value.startswith("{"):
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}={value!r}: not valid JSON: {error}") from error
        value = self.lr_scheduler_kwargs
        hint = 'expected names and values, such as {"num_cycles": 2}'
        require(value is None or isinstance(value, dict), "lr_scheduler_kwargs", value, hint)

    def _resolve(self) -> None:
        """Fill in the fields that follow from other fields."""
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"
        for name, value in (
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("save_strategy", self.save_strategy == "best" and "best"),
            ("early_stopping_patience", self.early_stopping_patience),
            ("lr_scheduler_type", self.follows_metric and SchedulerType(self.lr_scheduler_type).value),
        ):
            hint = "evaluations decide this: set eval_strategy (or eval_steps)"
            require(not value or self.eval_strategy != "no", name, value, hint)
            if value and self.metric_for_best_model is None:
                self.metric_for_best_model = "accuracy"
        self.check_best_metric()
        if self.early_stopping_patience:
            self.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
        if self.max_length is not None:
            left = self.max_length - self.generation_max_length
            hint = f"must leave room for a prompt beside generation_max_length={self.generation_max_length}"
            require(left >= 1, "max_length", self.max_length, hint)
            if self.max_prompt_length not in (type(self).max_prompt_length, left):
                raise ValueError(
                    f"max_prompt_length={self.max_prompt_length}: max_length leaves {left}; give one of the two"
                )
            self.max_prompt_length = left
        require(self.clip_high >= self.epsilon, "epsilon_high", self.epsilon_high, "must not be below epsilon")
