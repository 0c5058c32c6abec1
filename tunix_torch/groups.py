"""A job's settings in agent-tunix's groups. None: not given, see `nested.GRPOTrainingConfig`."""

from dataclasses import dataclass


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float | None = None  # peak
    warmup_ratio: float | None = None  # warm-up as a share of all steps
    max_grad_norm: float | None = None
    weight_decay: float | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    lr_scheduler_type: str | None = None


@dataclass
class AlgorithmConfig:
    """The group `grpo`: how a group of completions becomes a loss."""

    num_generations: int | None = None  # completions a prompt
    num_iterations: int | None = None  # passes over a batch
    beta: float | None = None  # weight of the KL penalty
    epsilon: float | None = None  # clipping
    epsilon_high: float | None = None
    algorithm: str | None = None
    kl_estimator: str | None = None
    loss_aggregation: str | None = None


@dataclass
class GenerationConfig:
    """Widths, and how completions are sampled."""

    max_prompt_length: int | None = None
    max_generation_steps: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@dataclass
class TrainingConfig:
    """How long, and in what portions. `micro_batch_size` counts prompts, as in agent-tunix.

    A step is one batch. There are `max_steps` of them, else `num_batches * num_epochs`, else `num_epochs` times those
    of the data set. `learning_rate`, `warmup_ratio` and `max_grad_norm` may be given here or in `OptimizerConfig`.
    """

    micro_batch_size: int | None = None  # prompts a step
    num_batches: int | None = None
    num_epochs: float | None = None
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
