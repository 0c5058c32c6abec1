"""Scores each step of a reasoning, with a discount for later steps, and the completion as a whole."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .answers import REASONING_TAGS, extract_steps
from .composite_reward import RewardBreakdown, RewardComponent, RewardFn, score_with_breakdown
from .conversations import completion_text


@dataclass(frozen=True)
class TrajectoryScore:
    """The scores of one completion and of its steps."""

    steps: list[RewardBreakdown]  # one score for each step, not discounted
    discounted: list[float | None]  # discount ** i * steps[i].total, None where no component applies
    mean: float | None  # the mean of the discounted scores that are not None; 0.0 without steps, None if all are None
    whole: RewardBreakdown | None  # the score of the whole completion; None without trajectory components


def score_steps(
    components: Sequence[RewardComponent],
    prompt: str,
    steps: Sequence[str],
    columns: Mapping[str, object] | None = None,
) -> list[RewardBreakdown]:
    """The weighted total and the components' values for every step, in the ranges of `composite_reward`.

    The components get each step as a completion whose reasoning part is that step alone, so that the rewards of this
    package that look at the reasoning work unchanged.

    Args:
        columns: the data set's values for this one prompt, for example `{"answer": "72"}`; every step gets them.

    Raises:
        ValueError: see `score_with_breakdown`.

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
    """Score the steps of a completion, as `extract_steps` finds them, and the completion as a whole.

    The score of step i is multiplied by `discount` ** i. `mean` lies in the range of the step components' weighted sum,
    widened to include 0. This is the process reward of the hackathon trainer; scoring steps instead of outcomes follows
    Lightman et al. 2023 (arXiv:2305.20050).

    Raises:
        ValueError: `discount` is not in [0, 1]; see also `score_with_breakdown`.

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
    """A reward function `(prompts, completions, **columns)` that gives the `mean` of `score_trajectory`, in its range.

    Raises:
        ValueError: `discount` is not in [0, 1]. The returned function raises what `score_with_breakdown` raises.

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
    """The mean of the scores that are not None; 0.0 without scores, None if all are None."""
    if not scores:
        return 0.0
    known = [score for score in scores if score is not None]
    return math.fsum(known) / len(known) if known else None
