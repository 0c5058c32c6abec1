"""`GRPOConfig`: every setting of `TunixTrainer`, on top of `transformers.TrainingArguments`."""

from dataclasses import dataclass
from typing import Any

from transformers import SchedulerType, TrainingArguments

from ..grpo import LOSS_AGGREGATIONS, LOSS_TYPES
from ..runtime import device as process_device
from ..runtime import mesh, together
from ..runtime.fsdp import Splitting
from .best_metric import check_best_metric
from .checks import PASSED_ON, WITH_REFERENCE, check_values
from .fsdp import make_splitting, read_fsdp
from .generation import read_generation_kwargs
from .loss import loss_type_of
from .machine import OnThisMachine
from .mappings import read_mappings
from .services import blamed_on_inherited
from .settings import accept_aliases, check_types, require, setting

SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # these follow `metric_for_best_model`

SAMPLING_LEVELS = {"gspo": "sequence"}  # the importance_sampling_level of algorithms, where it isn't token

SYSTEM_MESSAGE = (
    "Reason step by step between <reasoning> and </reasoning>, "
    "then give only the final answer between <answer> and </answer>."
)


@accept_aliases
@dataclass
class GRPOConfig(OnThisMachine):
    """Settings of `TunixTrainer`: those of `transformers.TrainingArguments`, and GRPO's.

    One optimizer step is one rollout batch: `per_device_train_batch_size` counts prompts (times
    `gradient_accumulation_steps`), `max_steps` counts rollout batches. With `steps_per_generation`, the batches of so
    many steps are sampled at once.

    Raises:
        ValueError: a value is out of range, a combination can't work, or a name is unknown. The message says what would
            be right.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "chat_template_kwargs"]

    # settings of TrainingArguments, with other defaults
    output_dir: str | None = setting("./outputs", "where everything is written")
    per_device_train_batch_size: int = setting(8, "prompts a step (with SFT: rows a step)")
    learning_rate: float = setting(1e-5, "peak learning rate")
    logging_steps: float = setting(1, "log every so many steps")
    optim: str = setting("adamw_torch", "optimizer; the fused default of Transformers refuses XLA tensors")
    report_to: None | str | list[str] = setting(
        "tensorboard", "where to log to, besides the terminal and metrics.jsonl"
    )
    logging_nan_inf_filter: bool = setting(
        False, "the filter of Transformers, which waits for every loss; a loss that is not finite is left out anyway"
    )
    dataloader_drop_last: bool = setting(True, "leave out an epoch's last, smaller batch: its shape would be new")
    remove_unused_columns: bool = setting(False, "must stay False: reward functions read the data set's columns")

    use_grpo: bool = setting(True, "reinforcement learning; False: supervised fine-tuning on the rows' completions")
    device: str = setting("auto", "auto, tpu, xla, cuda or cpu; a process keeps the device it started with")
    num_tpu_cores: int | None = setting(None, "TPU cores to use; only 1 so far")
    system_message: str = setting(SYSTEM_MESSAGE, "instruction put before every question; '' for none")
    wrap_prompts: bool = setting(
        True,
        "put a text prompt into a user's turn of the chat template; False: the model sees the text as it stands, which "
        "is TRL's meaning",
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None,
        'names and values for the chat template, such as {"enable_thinking": false}, as JSON; a row\'s own column of '
        "this name wins",
    )
    packing: bool = setting(
        False,
        "with SFT: put several rows side by side into rows of max_prompt_length + generation_max_length tokens, "
        "so that little padding is computed; per_device_train_batch_size then counts packed rows",
    )
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
    gather_for_rollout: bool | None = setting(
        None,
        "with fsdp: true gathers all weights for a rollout, false gathers layer after layer for each token; none: true "
        "where all weights take at most half of the free memory",
    )

    # advantages and loss
    algorithm: str = setting("grpo", "grpo, gspo, dr_grpo, dapo or rloo")
    normalize_advantages: bool = setting(True, "divide by the group's standard deviation (dr_grpo and rloo never do)")
    advantage_epsilon: float = setting(1e-8, "added to that standard deviation")
    scale_rewards: str | None = setting(
        None, "divide by the standard deviation of: group, batch or none; none given: see normalize_advantages"
    )
    multi_objective_aggregation: str = setting(
        "sum_then_normalize", "or normalize_then_sum (GDPO): each reward function is normalized within the group first"
    )
    overlong_buffer_length: int = setting(0, "the last tokens, in which a completion's reward falls (DAPO); 0: none")
    overlong_penalty: float = setting(1.0, "what it has fallen by at the greatest length")
    mask_truncated_completions: bool = setting(False, "learn nothing from completions that have no end")
    use_kl_penalty: bool = setting(True, "penalise KL from the reference policy, see reference")
    reference: str = setting(
        "start",
        "the reference policy: start, the policy as this run starts (a new LoRA: the base model), or base, the model "
        "without its adapter",
    )
    sync_ref_model: bool = setting(False, "move the reference policy towards the policy every ref_model_sync_steps")
    ref_model_mixup_alpha: float = setting(
        0.6, "the reference becomes alpha * policy + (1 - alpha) * reference, weight by weight; needs sync_ref_model"
    )
    ref_model_sync_steps: int = setting(512, "optimizer steps between two such moves; needs sync_ref_model")
    kl_penalty_coef: float = setting(0.01, "weight of the KL penalty; 0: no reference is computed (also beta, kl_coef)")
    kl_estimator: str = setting("k3", "k1 (Tunix 'kl'), k2 ('mse_kl') or k3 ('low_var_kl')")
    kl_clamp_value: float | None = setting(None, "limit the KL estimate of a token to this absolute value")
    use_bias_correction_kl: bool = setting(False, "multiply the KL estimate by the ratio: its gradient is unbiased")
    num_iterations: int = setting(1, "passes over a rollout batch, an optimizer step each")
    steps_per_generation: int = setting(
        1, "steps that share a rollout: so many times the prompts of a step are sampled at once, and then learned from"
    )
    epsilon: float = setting(0.2, "ratios are clipped at 1 - epsilon (also clip_range)")
    epsilon_high: float | None = setting(None, "and at 1 + epsilon_high; none: epsilon, or 0.28 with dapo")
    epsilon_c: float | None = setting(None, "dual clip: cap of the ratio for negative advantages, above 1; none: off")
    delta: float | None = setting(None, "cap of the ratio that is not clipped, above 1 + epsilon_high; none: off")
    loss_type: str | None = setting(None, ", ".join(LOSS_TYPES) + " (TRL's names); none: what the algorithm has")
    importance_sampling_level: str | None = setting(
        None, "ratios of token or sequence; none: token, or sequence with gspo"
    )
    sapo_temperature_neg: float = setting(1.05, "sapo: temperature for advantages that are not positive")
    sapo_temperature_pos: float = setting(1.0, "sapo: temperature for positive advantages")
    vespo_k_pos: float = setting(2.0, "vespo: exponent of the ratio, for advantages of at least 0")
    vespo_lambda_pos: float = setting(3.0, "vespo: its decay, for advantages of at least 0")
    vespo_k_neg: float = setting(3.0, "vespo: exponent of the ratio, for negative advantages")
    vespo_lambda_neg: float = setting(2.0, "vespo: its decay, for negative advantages")
    loss_aggregation: str | None = setting(
        None, "of token losses: " + ", ".join(LOSS_AGGREGATIONS) + "; none: what the algorithm's paper uses"
    )
    off_policy_mask_threshold: float | None = setting(
        None, "leave out rows of negative advantage whose mean KL from the policy that sampled is larger; none: off"
    )
    sampler_correction: str = setting(
        "none",
        "weights for sampling from another policy than learns (top-k, top-p): none, token_truncate, token_mask, "
        "sequence_truncate or sequence_mask",
    )
    sampler_correction_max: float | None = setting(3.0, "the largest such weight: it is cut, or its tokens are masked")
    sampler_correction_min: float | None = setting(None, "the smallest such weight, likewise")
    entropy_coef: float = setting(0.0, "weight of the entropy bonus, the mean entropy of a token; 0: none")
    use_adaptive_entropy: bool = setting(
        False, "after each step add entropy_coef_delta to it where entropy is below entropy_target, else take it off"
    )
    entropy_coef_min: float = setting(0.0, "the smallest adaptive weight")
    entropy_coef_max: float = setting(1.0, "the largest adaptive weight")
    entropy_coef_delta: float = setting(0.005, "by which it changes in a step")
    entropy_target: float = setting(0.2, "nats a token; above it there is no bonus where the weight is adaptive")
    top_entropy_quantile: float = setting(
        1.0, "policy loss only on this share of a batch's tokens, those of highest entropy; 1: all"
    )
    disable_dropout: bool = setting(False, "switch off all dropout, that of the LoRA included")
    max_skipped_steps: int = setting(
        5,
        "a step whose loss or gradient is not finite changes nothing, and its batch is kept in output_dir/bad_batches; "
        "so many of them in a row stop the run with a checkpoint",
    )
    micro_batch_size: int | None = setting(
        None,
        "completions in one learning pass: divides the group size or is a multiple of it; "
        "none: as many groups as make 4,096 tokens on the CPU and 32,768 on CUDA, on a TPU one for each device (SFT: "
        "the whole batch); 0: the whole batch",
    )
    # learning from preferences, and from a teacher
    preference_loss: str | None = setting(
        None, "with use_grpo false, learn from chosen and rejected completions by dpo, ipo, simpo or orpo"
    )
    preference_beta: float | None = setting(
        None,
        "its beta: how near the policy stays to the reference (dpo, ipo), the scale of rewards (simpo), or lambda "
        "(orpo); none: 0.1, or 2 with simpo",
    )
    simpo_gamma: float = setting(0.5, "the margin between the rewards of chosen and rejected that simpo asks for")
    label_smoothing: float = setting(0.0, "the probability that a pair is labelled the wrong way round, below 0.5")
    teacher: str | None = setting(
        None,
        "on-policy distillation: a model of the same tokenizer, or base, the model without its adapter; its reverse KL "
        "at every sampled token is added to the loss, and reward functions are not needed",
    )
    distillation_coef: float = setting(1.0, "weight of that KL in the loss")

    reward_weights: list[float] | None = setting(None, "weight of each reward function; none: 1 each, or the preset's")
    reward_timeout: float | None = setting(
        None, "a reward function that takes longer, in seconds, has failed; none: only a warning tells of slow ones"
    )
    on_reward_error: str = setting(
        "stop",
        "when a reward function fails: stop, with a checkpoint, or skip_group: learn nothing from the groups for which "
        "it fails. At evaluation the run stops",
    )
    max_reward_errors: float = setting(
        0.1, "with skip_group: stop when more than this share of the last 100 groups failed, or all groups of a step"
    )
    reward_processes: int = setting(
        0, "processes that call the reward functions, each for some of the prompts: for slow ones; 0: this one"
    )

    allow_changes: list[str] | None = setting(
        None,
        "what a resumed run may change although it changes what is learned: names of settings, training_data, "
        "base_weights, reward_functions, processes; a line says what differs",
    )
    save_batches: int = setting(
        0, "keep the first so many steps, inputs and results, in output_dir/batches for python -m crosscheck --from-run"
    )
    completions_max_mb: int = setting(
        100,
        "the completions of each logged step, and an evaluation's answers to its first 64 questions, are kept in "
        "output_dir/completions as Parquet files of at most so many megabytes: where that gets tight, fewer steps are "
        "kept, spread evenly over the run; 0: nothing is kept",
    )
    log_completions: bool = setting(
        False,
        "show a table of prompts, completions, rewards and advantages on the terminal at each log, and send it to W&B, "
        "Trackio and TensorBoard where report_to names them",
    )
    log_completions_steps: int | None = setting(
        None, "with log_completions: only at the first log after every so many steps; none: at each log"
    )
    num_completions_to_print: int | None = setting(
        8, "with log_completions: so many on the terminal, those of the first prompts; none: all"
    )
    log_unique_prompts: bool = setting(False, "with log_completions: one completion of each prompt only")
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
        self.check_device()
        read_mappings(self)
        if isinstance(self.scale_rewards, bool):  # TRL's older form
            self.scale_rewards = "group" if self.scale_rewards else "none"
        for name, value in read_generation_kwargs(self.generation_kwargs).items():
            setattr(self, name, value)
        check_types(self)
        check_values(self)
        given = read_fsdp(self)
        self._resolve()
        together.join_hosts(*mesh.hosts())
        if self.disable_tqdm is None:  # else Transformers decides by the level of its log, which commands raise
            self.disable_tqdm = False
        with blamed_on_inherited(self, PASSED_ON):
            super().__post_init__()
        if self.follows_metric:  # by default these schedules take every metric for a loss
            mode = {"mode": "max" if self.greater_is_better else "min"}
            self.lr_scheduler_kwargs = mode | (self.lr_scheduler_kwargs or {})
        together.join_mesh(process_device.KIND)
        self.splitting: Splitting | None = make_splitting(self, given)  # None: each process has all weights

    @property
    def follows_metric(self) -> bool:
        """Whether the learning rate follows `metric_for_best_model`."""
        return self.lr_scheduler_type in SCHEDULES_BY_METRIC

    @property
    def beta(self) -> float:
        """The KL coefficient in force: 0 when there is no penalty."""
        has_penalty = self.use_kl_penalty and self.algorithm != "dapo" and self.teacher is None
        return self.kl_penalty_coef if has_penalty else 0.0

    @property
    def pair_beta(self) -> float:
        """The beta of the preference loss in force."""
        if self.preference_beta is not None:
            return self.preference_beta
        return 2.0 if self.preference_loss == "simpo" else 0.1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with the reference policy, so that a run keeps it."""
        return self.beta > 0 if self.preference_loss is None else self.preference_loss in WITH_REFERENCE

    @property
    def clip_high(self) -> float:
        """The upper epsilon in force."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return max(0.28, self.epsilon) if self.algorithm == "dapo" else self.epsilon

    @property
    def aggregation(self) -> str:
        """The loss aggregation in force."""
        return self.loss_aggregation or LOSS_TYPES[loss_type_of(self)]

    @property
    def sequence_level(self) -> bool:
        """Whether all tokens of a completion share one ratio."""
        return (self.importance_sampling_level or SAMPLING_LEVELS.get(self.algorithm, "token")) == "sequence"

    @property
    def reward_scale(self) -> str:
        """What advantages are divided by the standard deviation of: "group", "batch" or "none"."""
        return self.scale_rewards or ("group" if self.normalize_advantages else "none")

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss weighs by how far the policy that sampled is from the one that learns."""
        return self.sampler_correction != "none"

    @property
    def drops_failed_groups(self) -> bool:
        """Whether groups whose rewards fail are left out of what is learned, and do not end the run."""
        return self.on_reward_error == "skip_group"

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether the loss has an entropy bonus, if of weight 0 at times."""
        return self.entropy_coef != 0 or self.use_adaptive_entropy

    @property
    def rows_per_step(self) -> int:
        """Completions in the rollout batch of this process: B."""
        return self.per_device_train_batch_size * self.num_completions_per_prompt

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
        check_best_metric(self)
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
