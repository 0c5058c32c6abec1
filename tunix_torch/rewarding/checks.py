"""Whether reward functions are functions."""

from collections.abc import Sequence
from typing import Any

from torch import nn

# ---- what the user gives ----


def check_rewards(functions: Any, setting: str = "reward_funcs") -> None:
    """Reward functions must be functions.

    Raises:
        ValueError: one is a name or a model; names `setting`.
    """
    for function in functions if isinstance(functions, Sequence) and not isinstance(functions, str) else [functions]:
        if isinstance(function, str):
            hint = "a name is not looked up here, and reward models are not taken; give the function itself"
            raise ValueError(f"{setting}={function!r}: {hint}, such as rewards.find_reward('correctness')")
        if isinstance(function, nn.Module):
            hint = "give a function (prompts, completions, **columns) -> list[float] that calls it"
            raise ValueError(f"{setting}: a {type(function).__name__}, but reward models are not taken; {hint}")
        if function is not None and not callable(function):
            raise ValueError(f"{setting}={function!r:.80}: a {type(function).__name__}, expected a function")
