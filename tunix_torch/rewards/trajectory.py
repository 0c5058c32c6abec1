"""Scores of a reasoning step by step, and of the whole of it, with a discount for later steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .answers import REASONING_TAGS, extract_steps
from .composite_reward import RewardBreakdown, RewardComponent, RewardFn, score_with_breakdown
from .conversations import completion_text


@dataclass(frozen=True)
class TrajectoryScore:
    """The scores of one completion's steps, and of the completion."""

    steps: list[RewardBreakdown]  # one for each step, not discounted
    discounted: list[float | None]  # discount ** i * steps[i].total, None where no component applies
    mean: float | None  # of those discounted scores that apply; 0.0 without steps, None where none applies
    whole: RewardBreakdown | None  # of the whole completion; None without trajectory components


def score_steps(
    components: Sequence[RewardComponent],
    prompt: str,
    steps: Sequence[str],
    columns: Mapping[str, object] | None = None,
) -> list[RewardBreakdown]:
    """The weighted total and the parts of every step; ranges as in `composite_reward`.

    A step is given to the components as a completion whose reasoning part is that step alone, so the rewards of this
    package that look at the reasoning work on it as they are. `columns` has the data set's values for this one prompt,
    for example `{"answer": "72"}`; each step gets them.

    Raises:
        ValueError: as `score_with_breakdown`.

    >>> from tunix_torch.rewards import structure_reward
    >>> scores = score_steps([RewardComponent("structure", structure_reward)], "?", ["48 / 2 = 24.", "72"])
    >>> [score.total for score in scores]
    [1.0, 0.675]
    """
    opening, closing = REASONING_TAGS
    completions = [f"{opening}{step}{closing}" for step in steps]
    repeated = {name: [value] * len(steps) for name, value in (columns or {}).items()}
    return score_with_breakdown(components, [prompt] * len(steps), completions, **repeated)


def score_trajectory(
    step_components: Sequence[RewardComponent],
    prompt: str,
    completion: str,
    discount: float = 1.0,
    trajectory_components: Sequence[RewardComponent] = (),
    columns: Mapping[str, object] | None = None,
) -> TrajectoryScore:
    """The scores of the steps of `completion` (`extract_steps`), step i times `discount` ** i, and of the whole of it.

    `mean` lies in the range of the step components' weighted sum, widened to include 0. The process reward of the
    hackathon trainer; scoring steps instead of outcomes follows Lightman et al. 2023 (arXiv:2305.20050).

    Raises:
        ValueError: `discount` is not in [0, 1]; and as `score_with_breakdown`.

    >>> from tunix_torch.rewards import format_reward, structure_reward
    >>> step_components = [RewardComponent("structure", structure_reward)]
    >>> completion = "<reasoning>48 / 2 = 24.\\n48 + 24 = 72.</reasoning> <answer>72</answer>"
    >>> score = score_trajectory(step_components, "?", completion, 0.5, [RewardComponent("format", format_reward)])
    >>> score.discounted, score.mean, score.whole.total
    ([1.0, 0.5], 0.75, 1.0)
    """
    _check_discount(discount)
    steps = score_steps(step_components, prompt, extract_steps(completion_text(completion)), columns)
    discounted = [None if step.total is None else discount**i * step.total for i, step in enumerate(steps)]
    whole = None
    if trajectory_components:
        row = {name: [value] for name, value in (columns or {}).items()}
        [whole] = score_with_breakdown(trajectory_components, [prompt], [completion], **row)
    return TrajectoryScore(steps, discounted, _mean(discounted), whole)


def trajectory_reward(components: Sequence[RewardComponent], discount: float = 1.0) -> RewardFn:
    """A reward function `(prompts, completions, **columns)`: the `mean` of `score_trajectory`, in the same range.

    Raises:
        ValueError: `discount` is not in [0, 1]; and, from the function returned, what `score_with_breakdown` raises.

    >>> from tunix_torch.rewards import structure_reward
    >>> reward_fn = trajectory_reward([RewardComponent("structure", structure_reward)], discount=0.5)
    >>> reward_fn(["?"] * 2, ["<reasoning>48 / 2 = 24.\\n48 + 24 = 72.</reasoning>", "72"])
    [0.75, 0.0]
    """
    _check_discount(discount)

    def mean_of_steps(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float | None]:
        rewards = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: values[i] for name, values in columns.items()}
            rewards.append(score_trajectory(components, prompt, completion, discount, columns=row).mean)
        return rewards

    return mean_of_steps


def _check_discount(discount: float) -> None:
    if not 0.0 <= discount <= 1.0:
        raise ValueError(f"discount is {discount}; it has to be in [0, 1], 1 for no discount")


def _mean(scores: list[float | None]) -> float | None:
    if not scores:
        return 0.0
    known = [score for score in scores if score is not None]
    return math.fsum(known) / len(known) if known else None
