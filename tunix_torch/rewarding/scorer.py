"""Holds the reward functions of a run, with their names, weights and time limit, and the processes that call them."""

import contextlib
import logging
import math
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerState

from ..config.grpo import GRPOConfig
from ..data.rows import Row
from ..runtime import together
from .context import RewardContext, means
from .failures import ErrorBudget
from .models import RewardModel, is_model_name, make_reward_model
from .scoring import RewardFunc, call_and_drop, call_rewards, name_of, names_of, table_of
from .values import RAISED_BY_REWARDS, is_of_rewards
from .workers import RewardWorkers, reward_workers

logger = logging.getLogger(__name__)

Rewards = RewardFunc | str | nn.Module | Sequence[RewardFunc | str | nn.Module]  # what `reward_funcs` takes
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
        budget: groups whose rewards fail are dropped within this budget; None: a failure is an error.
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
        budget: ErrorBudget | None = None,
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
        self.timeout, self.budget = timeout, budget
        self._dropped: list[int] = []  # the completions of the newest batch whose groups were dropped
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
            ErrorBudget(args.max_reward_errors, _rollouts_of_a_step(args)) if args.drops_failed_groups else None,
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
        processes have completions of their own, both are about the completions of all. With a budget, groups whose
        rewards failed have NaN only, and `totals` has NaN for them.

        Args:
            completion_ids, trainer_state: see `RewardContext`.

        Raises:
            ValueError: see `call_rewards`; or more groups have failed than the budget allows.
        """
        self._dropped = []
        if not self.functions:  # a teacher alone is learned from
            return torch.zeros(len(completions), 0, dtype=torch.float64)
        context = RewardContext(completion_ids, trainer_state)
        with raised_by_all():
            called = call_on_all_hosts(
                self.functions, rows, completions, self.timeout, self._workers, context, self.budget
            )
        values, metrics, failed = called
        self.metrics = means(together.gather(metrics))
        self._keep_extra(context.extra, len(completions))
        if self.budget is not None:
            self._drop(failed, len(rows), len(completions), 0 if trainer_state is None else trainer_state.global_step)
        rewards = table_of(values, completions, self._dropped)
        rewards[self._dropped] = math.nan
        with raised_by_all():
            self.totals(rewards, completions)  # which may overflow
        return rewards

    def _drop(self, failed: dict[int, str], num_groups: int, num_rows: int, step: int) -> None:
        """Note and log which groups are dropped. All processes decide alike whether they are too many.

        Raises:
            ValueError: they are.
        """
        size = num_rows // num_groups
        self._dropped = [row for group in sorted(failed) for row in range(group * size, (group + 1) * size)]
        counts = together.sum_numbers({"failed": len(failed), "groups": num_groups})
        self.metrics["rewards/skipped_groups"] = float(counts["failed"])
        first = failed[min(failed)] if failed else "they are those of another process"
        what = f"Step {step + 1}: the rewards of {len(failed)} of {num_groups} groups failed. The first: {first}"
        if failed and together.is_first_peer():
            logger.warning("%s. on_reward_error='skip_group': nothing is learned from these", what)
        too_many = self.budget.count(counts["failed"], counts["groups"], step)
        if too_many is not None:
            with noted():
                raise ValueError(f"on_reward_error='skip_group': {too_many}. {what}")

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
        """The weighted sum of each row's rewards, without those that are NaN: (B, R) float64 -> (B,) float64. It is NaN
        in groups of the newest batch that were dropped.

        Raises:
            ValueError: a total is not finite.
        """
        totals = (rewards * self.weights).nansum(dim=1)
        bad = ~totals.isfinite()
        if bad.any():
            text = completions[int(bad.int().argmax())]
            raise ValueError(f"reward_weights={self.weights.tolist()}: the weighted total of {text!r:.80} overflows")
        totals[self._dropped] = math.nan
        return totals


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Whatever is raised within this context gets the note `RAISED_BY_REWARDS`, if it has none that begins so."""
    try:
        yield
    except Exception as error:
        if not is_of_rewards(error):
            error.add_note(f"{RAISED_BY_REWARDS}by reward functions, reward models or the judge")
        raise


@contextlib.contextmanager
def raised_by_all() -> Iterator[None]:
    """What a process raises while it scores its completions within this context is raised by all, and noted."""
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    with noted():
        together.raise_together(problem)


def call_on_all_hosts(
    functions: Sequence[RewardFunc],
    rows: Sequence[Row],
    completions: Sequence[str],
    timeout: float | None,
    workers: RewardWorkers | None,
    context: RewardContext,
    budget: ErrorBudget | None = None,
) -> tuple[list[list[float | None]], dict[str, list[float]], dict[int, str]]:
    """Call functions and reward models. A device computes the models, so every host calls them, one after the other;
    the first host calls the functions. The arguments are those of `call_rewards`.

    Args:
        budget: see `Scorer`. A reward model that raises is an error all the same: that is no fault of a row.

    Returns:
        R lists of B values, the numbers that functions have logged, and for each group that failed what went wrong,
        alike on all hosts.

    Raises:
        ValueError: see `call_rewards`.
        Exception: what a function raises.
    """
    said = "\0".join(completions).encode()
    together.check_same(lambda: {"hash of the completions": zlib.crc32(said)})  # rounding must not part the devices
    started, values, failed = time.monotonic(), {}, {}
    most = 0.0 if budget is None else budget.left(len(rows))
    for number, function in enumerate(functions):
        if isinstance(function, RewardModel):
            how = None, None, started, RewardContext()
            if budget is None:
                (values[number],) = call_rewards([function], rows, completions, *how, search=False)
            else:
                (values[number],), why = call_and_drop([function], rows, completions, *how, most, search=False)
                failed |= why
            if timeout is not None and time.monotonic() > started + timeout:
                raise ValueError(f"reward_timeout={timeout}: {name_of(function)!r} takes longer than that")
    others = [number for number in range(len(functions)) if number not in values]

    def call() -> tuple[list[list[float | None]], dict[str, list[float]], list[tuple[int, str]]]:
        plain, how = [functions[number] for number in others], (timeout, workers, started, context)
        if budget is None:
            return call_rewards(plain, rows, completions, *how), context.metrics, []
        called, why = call_and_drop(plain, rows, completions, *how, most)
        return called, context.metrics, list(why.items())

    called, metrics, why = together.decided_by_first(call)
    values |= dict(zip(others, called, strict=True))
    return [values[number] for number in range(len(functions))], metrics, dict(map(tuple, why)) | failed


def _rollouts_of_a_step(args: GRPOConfig) -> int:
    """How many rollouts an optimizer step learns from; where steps share a rollout, one."""
    return 1 if args.steps_per_generation > 1 else args.gradient_accumulation_steps


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
