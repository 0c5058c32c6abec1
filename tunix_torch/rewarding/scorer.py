"""Holds the reward functions of a run, with their names, weights and time limit, and the processes that call them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.rows import Row
from .scoring import RewardFunc, names_of, score_completions
from .workers import RewardWorkers, reward_workers


def check_rewards(functions: Any, setting: str = "reward_funcs") -> None:
    """Check that reward functions are functions.

    Args:
        functions: one function, a sequence of them, or None.
        setting: the name of the argument that holds them, for error messages.

    Raises:
        ValueError: one of them is a name, a model or another object that can't be called.
    """
    for function in functions if isinstance(functions, Sequence) and not isinstance(functions, str) else [functions]:
        if isinstance(function, str):
            hint = "a name is not looked up here, and reward models are not taken; give the function itself"
            raise ValueError(f"{setting}={function!r}: {hint}, such as tunix_torch.rewards.find_reward('correctness')")
        if isinstance(function, nn.Module):
            hint = "give a function (prompts, completions, **columns) -> list[float] that calls it"
            raise ValueError(f"{setting}: a {type(function).__name__}, but reward models are not taken; {hint}")
        if function is not None and not callable(function):
            raise ValueError(f"{setting}={function!r:.80}: a {type(function).__name__}, expected a function")


class Scorer:
    """Scores completions by R reward functions.

    Args:
        functions: one function, a sequence of R of them, or None.
        weights: one weight for each function; None: each has the weight 1.
        timeout: seconds that all functions together may take for a batch; None: no limit.

    Raises:
        ValueError: one of the functions is no function.
    """

    def __init__(
        self,
        functions: RewardFunc | Sequence[RewardFunc] | None,
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ) -> None:
        check_rewards(functions)
        self.functions = [functions] if callable(functions) else list(functions or [])
        self.names = names_of(self.functions)
        self.weights = torch.tensor(weights or [1.0] * len(self.functions), dtype=torch.float64)  # (R,)
        self.timeout = timeout
        self._workers: RewardWorkers | None = None

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
        """Within this context, `count` processes call the functions that are not async; with 0, this process does."""
        with reward_workers(self.functions, count) as self._workers:
            try:
                yield
            finally:
                self._workers = None

    def score(self, rows: Sequence[Row], completions: Sequence[str]) -> Tensor:
        """The value of each function for each of B completions of N rows: (B, R) float64 in main memory, NaN for None.

        Raises:
            ValueError: see `score_completions`.
        """
        if not self.functions:  # a teacher alone is learned from
            return torch.zeros(len(completions), 0, dtype=torch.float64)
        return score_completions(self.functions, rows, completions, self.timeout, self._workers)

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
