"""What reward functions get besides prompts, completions and columns, under the names that TRL's trainer uses."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a worker process needs it only where a function takes it
    from transformers import TrainerState

# The arguments that a trainer gives. The first has one value for each completion; the others are for all of them.
TOKENS, STATE, LOG_METRIC, LOG_EXTRA = "completion_ids", "trainer_state", "log_metric", "log_extra"
GIVEN = (TOKENS, STATE, LOG_METRIC, LOG_EXTRA)

# Names of the trainer's own numbers, which would be mixed with what a function logs.
RESERVED = ("loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "pg_loss", "entropy", "epoch", "step")
RESERVED += ("learning_rate", "grad_norm", "compilations", "accuracy", "mean_length", "runtime")
RESERVED_GROUPS = ("rewards/", "completions/", "clip_ratio/", "sampling/", "eval_", "train_", "mean@")


@dataclass
class RewardContext:
    """What a call of reward functions is part of, and what the functions log in it.

    Args:
        completion_ids: the tokens of each completion as B lists without padding, with the token that ended it; None
            where they are not known.
        trainer_state: of the trainer; None: there is no trainer.
    """

    completion_ids: Sequence[Sequence[int]] | None = None
    trainer_state: "TrainerState | None" = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        """Log a number of this batch. The next log has the mean of all that were given under its name; NaN is left out.

        Raises:
            ValueError: the value is no number or not finite, or the trainer logs a number of its own by this name.
        """
        if not isinstance(name, str) or name in RESERVED or name.startswith(RESERVED_GROUPS):
            raise ValueError(f"log_metric: name={name!r}: the trainer logs its own numbers by it; choose another")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"log_metric({name!r}): {value!r:.80} is no number; log one number") from error
        if math.isinf(number):
            raise ValueError(f"log_metric({name!r}): {number} is not finite")
        if not math.isnan(number):
            self.metrics.setdefault(name, []).append(number)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log a column with one value for each completion that the function was given."""
        self.extra.setdefault(column, []).extend(values)

    def given(self) -> dict[str, Any]:
        """The arguments that are for all completions, by their names."""
        state = {} if self.trainer_state is None else {STATE: self.trainer_state}
        return {**state, LOG_METRIC: self.log_metric, LOG_EXTRA: self.log_extra}

    def add(self, metrics: dict[str, list[float]], extra: dict[str, list[Any]]) -> None:
        """Add what functions have logged elsewhere, about the rows that follow those which were added before."""
        for name, numbers in metrics.items():
            self.metrics.setdefault(name, []).extend(numbers)
        for column, values in extra.items():
            self.extra.setdefault(column, []).extend(values)

    def check_extra(self, num_completions: int) -> None:
        """Raise ValueError where a column does not have one value for each completion."""
        for column, values in self.extra.items():
            if len(values) != num_completions:
                counts = f"{len(values)} values for {num_completions} completions"
                raise ValueError(f"log_extra({column!r}): {counts}; log one for each, from one reward function")


def means(metrics: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """The mean of each metric over all who logged it, in the order of the names."""
    names = sorted({name for theirs in metrics for name in theirs})
    numbers = {name: [number for theirs in metrics for number in theirs.get(name, [])] for name in names}
    return {name: sum(values) / len(values) for name, values in numbers.items()}
