"""Combines several reward functions to a weighted sum, and shows what each of them adds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

# (prompts, completions, **columns) -> one value for each completion, None where the reward does not apply
RewardFn = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class RewardComponent:
    """One term of a composite reward: the value of `reward_fn`, clipped to `clip_range`, times `weight`.

    With `normalize`, the clipped value is mapped from `clip_range` to [0, 1] before it is weighted. `metadata` holds
    notes of the user and changes no value.

    Raises:
        ValueError: `weight` is not finite, `clip_range` is not (low, high) with low < high, or `normalize` is set
            without a finite `clip_range`.
    """

    name: str
    reward_fn: RewardFn
    weight: float = 1.0
    normalize: bool = False
    clip_range: tuple[float, float] | None = None
    metadata: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight of {self.name!r} is {self.weight}; it has to be a finite number")
        if self.clip_range is not None and not self.clip_range[0] < self.clip_range[1]:
            raise ValueError(f"clip_range of {self.name!r} is {self.clip_range}; it has to be (low, high), low < high")
        if self.normalize and (self.clip_range is None or not all(map(math.isfinite, self.clip_range))):
            raise ValueError(
                f"normalize of {self.name!r} is True and clip_range {self.clip_range}; it maps clip_range to [0, 1], "
                "so give a finite (low, high)"
            )


@dataclass(frozen=True)
class RewardBreakdown:
    """The score of one completion: the weighted total, and each component's value before it was weighted."""

    total: float | None  # None where no component applies to the completion
    parts: dict[str, float | None]  # name -> value after clipping and mapping to [0, 1]; None where it does not apply


def composite_reward(components: Sequence[RewardComponent]) -> RewardFn:
    """A reward function `(prompts, completions, **columns)` that gives the weighted sum of the components.

    Its values lie in the sum of the components' weighted ranges. A component that gives None for a completion is left
    out of that sum, and the other weights do not change. Where no component applies, the value is None. DeepSeek-R1
    (arXiv:2501.12948) and TRL's `reward_weights` use the same plain weighted sum.

    The components get the completions unchanged, as texts or lists of messages; the rewards of this package take both.

    Raises:
        ValueError: there are no components, or two have the same name. The returned function raises what
            `score_with_breakdown` raises.

    >>> from tunix_torch.rewards import correctness_reward, format_reward
    >>> components = [RewardComponent("correctness", correctness_reward), RewardComponent("format", format_reward, 0.5)]
    >>> reward_fn = composite_reward(components)
    >>> reward_fn(["6 * 12?"] * 2, ["<answer>72</answer>", "<answer>70</answer>"], answer=["72", None])
    [1.1, 0.1]
    """
    _check_names(components)

    def weighted_total(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float | None]:
        return [row.total for row in score_with_breakdown(components, prompts, completions, **columns)]

    return weighted_total


def score_with_breakdown(
    components: Sequence[RewardComponent], prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[RewardBreakdown]:
    """The weighted total and the components' values for every completion, in the ranges of `composite_reward`.

    Raises:
        ValueError: there are no components, or two have the same name; or a reward function does not give one value for
            each completion, or gives a value that is not finite after clipping.

    >>> from tunix_torch.rewards import format_reward
    >>> score_with_breakdown([RewardComponent("format", format_reward, weight=0.5)], ["?"], ["<answer>72</answer>"])
    [RewardBreakdown(total=0.1, parts={'format': 0.2})]
    """
    _check_names(components)
    columns_of_values = [_component_values(component, prompts, completions, columns) for component in components]
    return [_weigh(components, values) for values in zip(*columns_of_values, strict=True)]


def _check_names(components: Sequence[RewardComponent]) -> None:
    names = [component.name for component in components]
    if not names:
        raise ValueError("components is empty; it needs at least one RewardComponent")
    if len(set(names)) < len(names):
        raise ValueError(f"components are named {names}; every name has to be different")


def _component_values(
    component: RewardComponent, prompts: Sequence[str], completions: Sequence[str], columns: dict[str, object]
) -> list[float | None]:
    values = component.reward_fn(prompts, completions, **columns)
    if len(values) != len(completions):
        raise ValueError(
            f"reward_fn of {component.name!r} gave {len(values)} values; it has to give one for each of the "
            f"{len(completions)} completions"
        )
    return [None if value is None else _clip_and_normalize(component, float(value)) for value in values]


def _clip_and_normalize(component: RewardComponent, value: float) -> float:
    if component.clip_range is not None:
        low, high = component.clip_range
        value = min(max(value, low), high)
    if not math.isfinite(value):
        raise ValueError(f"reward_fn of {component.name!r} gave {value}; it has to give finite numbers or None")
    if component.normalize:
        value = (value - low) / (high - low)
    return value


def _weigh(components: Sequence[RewardComponent], values: tuple[float | None, ...]) -> RewardBreakdown:
    weighted = [
        component.weight * value for component, value in zip(components, values, strict=True) if value is not None
    ]
    parts = {component.name: value for component, value in zip(components, values, strict=True)}
    return RewardBreakdown(total=sum(weighted) if weighted else None, parts=parts)
