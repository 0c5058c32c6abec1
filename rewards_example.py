"""Score four completions with every reward, with a composite reward, and with one of your own.

Run: python rewards_example.py
"""

from collections.abc import Sequence

from tunix_torch.rewards import REWARDS, RewardComponent, composite_reward, get_reward, score_with_breakdown

QUESTION = "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?"
SOLUTION = """First, Natalia sold half as many clips in May as in April: 48 / 2 = 24 clips.
Then we add the two months: 48 + 24 = 72 clips.
So she sold 72 clips altogether."""
COMPLETIONS = {
    "right": f"<reasoning>{SOLUTION}</reasoning>\n<answer>72 clips</answer>",
    "malformed": f"{SOLUTION}\n<answer>72</answer>",
    "wrong": "<reasoning>She sold 48 + 24 = 62 clips.</reasoning>\n<answer>62</answer>",
    "rambling": f"<reasoning>{'Let me think about the clips again. ' * 40}</reasoning>\n<answer>72.0</answer>",
}


def no_hedging_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """A reward of your own: 1.0 where the completion does not hedge, else 0.0. Any such function will do."""
    return [float("let me think" not in completion.casefold()) for completion in completions]


COMPONENTS = [
    RewardComponent("correctness", get_reward("correctness"), weight=1.0),
    RewardComponent("format", get_reward("format"), weight=0.5),
    RewardComponent("explanation_quality", get_reward("explanation_quality"), weight=0.2, clip_range=(0.0, 0.5)),
    RewardComponent("no_hedging", no_hedging_reward, weight=0.1),
]


def print_table(title: str, columns: dict[str, Sequence[float | None]]) -> None:
    """Print one row for each completion and one column of values for each reward."""
    print(title)
    print(f"{'':12}" + "".join(f"{name:>21}" for name in columns))
    for name, values in zip(COMPLETIONS, zip(*columns.values(), strict=True), strict=True):
        print(f"{name:12}" + "".join(f"{'-' if value is None else format(value, '.2f'):>21}" for value in values))
    print()


def main() -> None:
    prompts = [QUESTION] * len(COMPLETIONS)
    completions = list(COMPLETIONS.values())
    answer = ["#### 72"] * len(COMPLETIONS)

    print_table(
        "Each reward alone", {name: reward(prompts, completions, answer=answer) for name, reward in REWARDS.items()}
    )

    rows = score_with_breakdown(COMPONENTS, prompts, completions, answer=answer)
    parts = {component.name: [row.parts[component.name] for row in rows] for component in COMPONENTS}
    totals = composite_reward(COMPONENTS)(prompts, completions, answer=answer)  # the function to give to a trainer
    clipped = {
        c.name: "" if c.clip_range is None else " (clipped to {:g} to {:g})".format(*c.clip_range) for c in COMPONENTS
    }
    weights = " + ".join(f"{component.weight} * {component.name}{clipped[component.name]}" for component in COMPONENTS)
    print_table(f"Composite: total = {weights}", parts | {"total": totals})


if __name__ == "__main__":
    main()
