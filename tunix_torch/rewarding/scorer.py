"""Holds the reward functions of a run, with their names, weights and time limit, and the processes that call them."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerState

from ..config.grpo import GRPOConfig
from ..data.rows import Row
from ..runtime import together
from .context import RewardContext, means
from .models import RewardModel, is_model_name, make_reward_model
from .scoring import RewardFunc, call_rewards, name_of, names_of, table_of
from .workers import RewardWorkers, reward_workers

Rewards = RewardFunc | str | nn.Module | Sequence[RewardFunc | str | nn.Module]  # what `reward_funcs` takes
RAISED_BY_REWARDS = "It was raised while reward functions or the judge were called."
Tokenizers = PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None]  # and `reward_processing_classes`


def check_rewards(functions: Any, setting: str = "reward_funcs") -> None:
    """Check that rewards are functions or, in `reward_funcs`, reward models.

    Args:
        functions: one function, a sequence of them, or None.
        setting: the name of the argument that holds them, for error messages.

    Raises:
        ValueError: one of them is the name of a function or another object that can't be called.
    """
    for function in _listed(functions):
        if isinstance(function, str) and not (setting == "reward_funcs" and is_model_name(function)):
            hint = "the name of a function is not looked up here; give the function itself"
            raise ValueError(f"{setting}={function!r}: {hint}, such as tunix_torch.rewards.find_reward('correctness')")
        if isinstance(function, nn.Module) and setting != "reward_funcs":
            hint = "a score has no value that means right; give a function"
            raise ValueError(f"{setting}: a {type(function).__name__}, but reward models are not taken here; {hint}")
        if not callable(function) and not isinstance(function, str):
            raise ValueError(f"{setting}={function!r:.80}: a {type(function).__name__}, expected a function")


def _listed(functions: Any) -> list[Any]:
    """One reward function, several, or None, as a list."""
    if functions is None:
        return []
    return list(functions) if isinstance(functions, Sequence) and not isinstance(functions, str) else [functions]


class Scorer:
    """Scores completions by R reward functions.

    Args:
        functions: one function or reward model, a sequence of R of them, or None. Reward models are loaded.
        weights: one weight for each function; None: each has the weight 1.
        timeout: seconds that all functions together may take for a batch; None: no limit.
        processing_classes: the tokenizers of reward models: one for each of `functions`, None for a function and where
            the model's own is meant; a single one where there is one function. None: each model's own.
        model_settings: further arguments of `RewardModel`.

    Raises:
        ValueError: one of the functions is no function and no reward model, or there is not one tokenizer for each.
    """

    def __init__(
        self,
        functions: Rewards | None,
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
        processing_classes: Tokenizers | None = None,
        **model_settings: Any,
    ) -> None:
        check_rewards(functions)
        listed = _listed(functions)
        tokenizers = _tokenizers(processing_classes, len(listed))
        self.functions: list[RewardFunc] = [
            make_reward_model(f, tokenizer, _what(f), **model_settings) if isinstance(f, str | nn.Module) else f
            for f, tokenizer in zip(listed, tokenizers, strict=True)
        ]
        self.names = names_of(self.functions)
        self.weights = torch.tensor(weights or [1.0] * len(self.functions), dtype=torch.float64)  # (R,)
        self.timeout = timeout
        self.metrics: dict[str, float] = {}  # what the functions have logged about the newest batch
        self.last_extra: dict[str, list[Any]] = {}  # and their columns, each with one value a completion
        self._workers: RewardWorkers | None = None

    @classmethod
    def of(
        cls,
        functions: Rewards | None,
        processing_classes: Tokenizers | None,
        args: GRPOConfig,
    ) -> "Scorer":
        """The scorer of a run with these settings."""
        return cls(
            functions,
            args.reward_weights,
            args.reward_timeout,
            processing_classes,
            num_rows=args.per_device_train_batch_size * args.num_completions_per_prompt,
            num_tokens=args.max_prompt_length + args.generation_max_length,
            chat_template_kwargs=args.chat_template_kwargs,
        )

    def judge(self, given: RewardFunc | Literal[False] | None) -> RewardFunc | None:
        """The function that decides at evaluation: the given one, or else the first that is no reward model.

        False: there is none, so evaluations report rewards only.

        Raises:
            ValueError: the given one is no function.
        """
        if given is False:
            return None
        check_rewards(given, "judge")
        functions = [function for function in self.functions if not isinstance(function, RewardModel)]
        return given or next(iter(functions), None)

    def check(self, needed: bool) -> None:
        """Raise ValueError where functions are needed and there are none, or where there are not as many weights."""
        if needed and not self.functions:
            raise ValueError("reward_funcs: GRPO needs at least one reward function")
        if len(self.weights) != len(self.functions):
            raise ValueError(
                f"reward_weights={self.weights.tolist()}: {len(self.functions)} reward functions need as many weights"
            )

    @contextlib.contextmanager
    def in_workers(self, count: int) -> Iterator[None]:
        """Within this context, `count` processes call the functions that are neither async nor models; with 0, this
        process calls them."""
        functions = [function for function in self.functions if not isinstance(function, RewardModel)]
        with reward_workers(functions, count) as self._workers:
            try:
                yield
            finally:
                self._workers = None

    def score(
        self,
        rows: Sequence[Row],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        trainer_state: TrainerState | None = None,
    ) -> Tensor:
        """The value of each function for each of B completions of N rows: (B, R) float64 in main memory, NaN for None.

        What the functions log is then in `metrics`, the mean of each number, and in `last_extra`. Where several
        processes have completions of their own, both are about the completions of all.

        Args:
            completion_ids, trainer_state: see `RewardContext`.

        Raises:
            ValueError: see `call_rewards`.
        """
        if not self.functions:  # a teacher alone is learned from
            return torch.zeros(len(completions), 0, dtype=torch.float64)
        context = RewardContext(completion_ids, trainer_state)
        values, metrics = call_on_all_hosts(self.functions, rows, completions, self.timeout, self._workers, context)
        self.metrics = means(together.gather(metrics))
        self._keep_extra(context.extra, len(completions))
        return table_of(values, completions)

    def _keep_extra(self, columns: dict[str, list[Any]], num_completions: int) -> None:
        """Keep the columns that functions have logged. A process that has logged none under a name has None there."""
        everyone = together.gather((columns, num_completions))
        names = sorted({name for theirs, _ in everyone for name in theirs})
        self.last_extra = {
            name: [value for theirs, count in everyone for value in theirs.get(name, [None] * count)] for name in names
        }

    def describe(self, rewards: Tensor, row: int, group_size: int) -> str:
        """A text for error messages: the rewards, taken from (B, R), of the group that row number `row` belongs to."""
        group = row // group_size
        of_group = rewards[group * group_size : (group + 1) * group_size].tolist()
        return f"group {group} has rewards {self.names}: {of_group}"

    def totals(self, rewards: Tensor, completions: Sequence[str]) -> Tensor:
        """The weighted sum of each row's rewards, without those that are NaN: (B, R) float64 -> (B,) float64.

        Raises:
            ValueError: a total is not finite.
        """
        totals = (rewards * self.weights).nansum(dim=1)
        bad = ~totals.isfinite()
        if bad.any():
            text = completions[int(bad.int().argmax())]
            raise ValueError(f"reward_weights={self.weights.tolist()}: the weighted total of {text!r:.80} overflows")
        return totals


def call_on_all_hosts(
    functions: Sequence[RewardFunc],
    rows: Sequence[Row],
    completions: Sequence[str],
    timeout: float | None,
    workers: RewardWorkers | None,
    context: RewardContext,
) -> tuple[list[list[float | None]], dict[str, list[float]]]:
    """Call functions and reward models. A device computes the models, so every host calls them, one after the other;
    the first host calls the functions. The arguments are those of `call_rewards`.

    Returns:
        R lists of B values, and the numbers that functions have logged, alike on all hosts.

    Raises:
        ValueError: see `call_rewards`.
        Exception: what a function raises. Whatever is raised has the note `RAISED_BY_REWARDS`.
    """
    try:
        return _call_on_all_hosts(functions, rows, completions, timeout, workers, context)
    except Exception as error:
        error.add_note(RAISED_BY_REWARDS)
        raise


def _call_on_all_hosts(
    functions: Sequence[RewardFunc],
    rows: Sequence[Row],
    completions: Sequence[str],
    timeout: float | None,
    workers: RewardWorkers | None,
    context: RewardContext,
) -> tuple[list[list[float | None]], dict[str, list[float]]]:
    started, values = time.monotonic(), {}
    for number, function in enumerate(functions):
        if isinstance(function, RewardModel):
            (values[number],) = call_rewards([function], rows, completions)
            if timeout is not None and time.monotonic() > started + timeout:
                raise ValueError(f"reward_timeout={timeout}: {name_of(function)!r} takes longer than that")
    others = [number for number in range(len(functions)) if number not in values]

    def call() -> tuple[list[list[float | None]], dict[str, list[float]]]:
        plain = [functions[number] for number in others]
        return call_rewards(plain, rows, completions, timeout, workers, started, context), context.metrics

    called, metrics = together.decided_by_first(call)
    values |= dict(zip(others, called, strict=True))
    return [values[number] for number in range(len(functions))], metrics


def _what(function: Any) -> str:
    """The setting that holds a reward model, with the name if it is one, for error messages."""
    return f"reward_funcs={function!r}" if isinstance(function, str) else "reward_funcs"


def _tokenizers(given: Any, count: int) -> list[PreTrainedTokenizerBase | None]:
    """One tokenizer or None for each of `count` reward functions.

    Raises:
        ValueError: there are not as many as functions.
    """
    if given is None:
        return [None] * count
    tokenizers = list(given) if isinstance(given, list | tuple) else [given]
    if len(tokenizers) != count:
        hint = f"must match that of reward_funcs, {count}: give a list with one for each, None for a function"
        raise ValueError(f"reward_processing_classes: their number, {len(tokenizers)}, {hint}")
    return tokenizers
