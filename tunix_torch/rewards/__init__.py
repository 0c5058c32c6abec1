"""Reward functions, to be called as `(prompts, completions, **columns) -> list[float | None]`, one value a completion.

They look at the completions, which are texts or lists of messages; those that judge correctness also take the column
`answer`, of texts or numbers. They are pure functions and use the standard library only, except for `math_equal`, which
imports mpmath when it first needs it. `docs/rewards.md` says what each pays for and how a policy can exploit it.

`REWARDS` has this project's own functions, with values in [0, 1]. `PRESET_REWARDS` has those of other systems, in
ranges of their own, and `math_equal`. `PRESETS` has the weighted sets of rewards that those systems train with.

`llm_judge` makes a reward function that asks a server. It is not pure, so it stands in the room `rewarding`, and is
looked up there when it is first used.
"""

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

from .agent_tunix import check_answer, check_numbers, match_format_approximately, match_format_exactly
from .answers import answers_match, extract_answer, extract_reasoning, extract_steps, find_numbers, parse_number
from .composite_reward import RewardBreakdown, RewardComponent, RewardFn, composite_reward, score_with_breakdown
from .correctness_reward import correctness_reward
from .explanation_quality_reward import explanation_quality_reward
from .format_reward import format_reward
from .gemma2_grpo import (
    gemma2_accuracy_reward,
    gemma2_format_reward,
    gemma2_length_bonus,
    gemma2_logic_reward,
    gemma2_self_correction_bonus,
)
from .hackathon import conciseness_reward, jaccard_correctness_reward, structure_reward
from .math_equal import math_equal_reward
from .notebook import notebook_correctness_reward, notebook_format_reward, notebook_reasoning_quality_reward
from .reasoning_coherence_reward import reasoning_coherence_reward
from .trajectory import TrajectoryScore, score_steps, score_trajectory, trajectory_reward

__all__ = [
    "PRESETS",
    "PRESET_REWARDS",
    "REWARDS",
    "RewardBreakdown",
    "RewardComponent",
    "RewardFn",
    "TrajectoryScore",
    "answers_match",
    "check_answer",
    "check_numbers",
    "composite_reward",
    "conciseness_reward",
    "correctness_reward",
    "explanation_quality_reward",
    "extract_answer",
    "extract_reasoning",
    "extract_steps",
    "find_numbers",
    "find_reward",
    "format_reward",
    "gemma2_accuracy_reward",
    "gemma2_format_reward",
    "gemma2_length_bonus",
    "gemma2_logic_reward",
    "gemma2_self_correction_bonus",
    "get_preset",
    "get_reward",
    "jaccard_correctness_reward",
    "llm_judge",
    "match_format_approximately",
    "match_format_exactly",
    "math_equal_reward",
    "notebook_correctness_reward",
    "notebook_format_reward",
    "notebook_reasoning_quality_reward",
    "parse_number",
    "reasoning_coherence_reward",
    "score_steps",
    "score_trajectory",
    "score_with_breakdown",
    "structure_reward",
    "trajectory_reward",
]

REWARDS: dict[str, RewardFn] = {
    "correctness": correctness_reward,
    "format": format_reward,
    "reasoning_coherence": reasoning_coherence_reward,
    "explanation_quality": explanation_quality_reward,
}

PRESET_REWARDS: dict[str, RewardFn] = {
    "match_format_exactly": match_format_exactly,
    "match_format_approximately": match_format_approximately,
    "check_answer": check_answer,
    "check_numbers": check_numbers,
    "notebook_format": notebook_format_reward,
    "notebook_correctness": notebook_correctness_reward,
    "notebook_reasoning_quality": notebook_reasoning_quality_reward,
    "gemma2_format": gemma2_format_reward,
    "gemma2_logic": gemma2_logic_reward,
    "gemma2_accuracy": gemma2_accuracy_reward,
    "gemma2_self_correction": gemma2_self_correction_bonus,
    "gemma2_length": gemma2_length_bonus,
    "jaccard_correctness": jaccard_correctness_reward,
    "structure": structure_reward,
    "conciseness": conciseness_reward,
    "math_equal": math_equal_reward,
}

# name of the preset -> {name of the reward: weight}
PRESETS: dict[str, dict[str, float]] = {
    "agent_tunix": {
        "match_format_exactly": 1.0,
        "match_format_approximately": 1.0,
        "check_answer": 1.0,
        "check_numbers": 1.0,
    },
    "notebook": {"notebook_format": 0.3, "notebook_correctness": 0.5, "notebook_reasoning_quality": 0.2},
    "gemma2_grpo": {
        "gemma2_format": 0.25,
        "gemma2_logic": 0.30,
        "gemma2_accuracy": 0.45,
        "gemma2_self_correction": 1.0,
        "gemma2_length": 1.0,
    },
    "composite": {"jaccard_correctness": 0.5, "structure": 0.3, "conciseness": 0.2},
}


def __getattr__(name: str) -> Any:
    if name != "llm_judge":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module("tunix_torch.rewarding.judge").llm_judge


def get_reward(name: str) -> RewardFn:
    """Look up a reward function by its name in `REWARDS` and `PRESET_REWARDS`.

    Raises:
        ValueError: there is no reward of that name.

    >>> get_reward("format") is format_reward
    True
    >>> get_reward("corectness")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: reward 'corectness' is unknown; the names are correctness, format, ...; did you mean 'correctness'?
    """
    named = REWARDS | PRESET_REWARDS
    if name not in named:
        raise ValueError(_unknown("reward", name, named))
    return named[name]


def find_reward(name: str) -> RewardFn:
    """Look up a reward function by name, as `get_reward` does, or import it by a path such as `my_module.my_reward`.

    Raises:
        ValueError: there is no reward of that name, no such module, or the object found there can't be called.

    >>> find_reward("tunix_torch.rewards.format_reward.format_reward") is find_reward("format")
    True
    >>> find_reward("tunix_torch.rewards.no_such_reward")
    Traceback (most recent call last):
    ValueError: reward 'tunix_torch.rewards.no_such_reward': module 'tunix_torch.rewards' has no 'no_such_reward'
    """
    if name.startswith("rewards.") and importlib.util.find_spec("rewards") is None:
        name = f"tunix_torch.{name}"  # where the settings of older runs name a function of this package
    module_name, _, attribute = name.rpartition(".")
    if "." not in name:
        return get_reward(name)
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"reward {name!r}: expected a dotted path such as my_module.my_reward")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and another one that it imports does not
        hint = "expected a module in this folder or an installed one"
        raise ValueError(f"reward {name!r}: no module {error.name!r}; {hint}") from error
    if not hasattr(module, attribute):
        raise ValueError(f"reward {name!r}: module {module_name!r} has no {attribute!r}")
    function = getattr(module, attribute)
    if not callable(function):
        raise ValueError(f"reward {name!r}: a {type(function).__name__}, expected a function")
    return function


def get_preset(name: str) -> list[tuple[RewardFn, float]]:
    """The reward functions of a preset in `PRESETS`, each with its weight.

    Raises:
        ValueError: there is no preset of that name.

    >>> [(reward_fn.__name__, weight) for reward_fn, weight in get_preset("composite")]
    [('jaccard_correctness_reward', 0.5), ('structure_reward', 0.3), ('conciseness_reward', 0.2)]
    >>> get_preset("agent-tunix")
    Traceback (most recent call last):
    ValueError: preset 'agent-tunix' is unknown; the names are agent_tunix, notebook, gemma2_grpo, composite; \
did you mean 'agent_tunix'?
    """
    if name not in PRESETS:
        raise ValueError(_unknown("preset", name, PRESETS))
    return [(get_reward(reward), weight) for reward, weight in PRESETS[name].items()]


def _unknown(kind: str, name: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{kind} {name!r} is unknown; the names are {', '.join(names)}{hint}"
