"""Learning curves for `time_to_accuracy.py`: when each run reaches the goal, ratios, the table and the picture.

A run that never reaches the goal takes infinitely long, which is null in JSON and "never" in print. All functions are
pure, except the one that draws the picture.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from .summary import spread_of

NEVER = math.inf
COLORS = {"ours": "tab:blue", "trl": "tab:orange"}


@dataclass(frozen=True)
class Point:
    """The accuracy on held-out questions after `step` steps, which took `seconds` of training."""

    step: int
    seconds: float
    accuracy: float


@dataclass(frozen=True)
class Curve:
    """One run of one peer."""

    seed: int
    points: list[Point]  # the first is the start of training, at step 0 and second 0
    seconds: list[float]  # of training, at the end of each step
    startup_seconds: float  # before training began, which count in none of the above


def make_curve(
    seed: int, seconds: Sequence[float], startup_seconds: float, start: float, accuracies: dict[str, float]
) -> Curve:
    """Return the curve of one run.

    Args:
        seconds: of training, at the end of each step.
        start: the accuracy of the model that training began with.
        accuracies: by the step, which is text, as JSON has no other keys.
    """
    later = [Point(int(step), seconds[int(step) - 1], value) for step, value in accuracies.items()]
    points = [Point(0, 0.0, start), *sorted(later, key=lambda point: point.step)]
    return Curve(seed, points, list(seconds), startup_seconds)


def first_crossing(curve: Curve, goal: float) -> Point | None:
    """Return the first measured point at the goal or above, without interpolation; None when there is none."""
    return next((point for point in curve.points if point.accuracy >= goal), None)


def seconds_to(goal: float, curve: Curve) -> float:
    """Return the seconds of training until the goal, or `NEVER`."""
    crossing = first_crossing(curve, goal)
    return NEVER if crossing is None else crossing.seconds


def ratios(peer: Sequence[Curve], ours: Sequence[Curve], goal: float) -> list[float]:
    """Return how many times as long the peer takes to the goal as this library, for each seed.

    A ratio is infinite where only this library reaches the goal, and 0 where only the peer does. A seed is left out
    when neither reaches the goal, or both start at it.
    """
    pairs = [(seconds_to(goal, a), seconds_to(goal, b)) for a, b in zip(peer, ours, strict=True)]
    return [a / b for a, b in pairs if a != b or 0 < a < NEVER]


def _spread_for_json(values: Sequence[float]) -> dict[str, float | None] | None:
    """Return the spread with None in place of `NEVER`, as JSON has no infinity; None when there are no values."""
    if not values:
        return None
    return {name: None if value == NEVER else value for name, value in spread_of(values).items()}


def summarise_peer(curves: Sequence[Curve], goal: float) -> dict[str, Any]:
    """Return one peer's figures over all its runs."""
    crossings = [first_crossing(curve, goal) for curve in curves]
    of_each_step = [b - a for curve in curves for a, b in itertools.pairwise([0.0, *curve.seconds])]
    return {
        "seconds_to_goal": _spread_for_json([seconds_to(goal, curve) for curve in curves]),
        "steps_to_goal": _spread_for_json([NEVER if point is None else point.step for point in crossings]),
        "runs_at_goal": sum(point is not None for point in crossings),
        "runs": len(curves),
        "seconds_per_step": spread_of(of_each_step),
        "first_step_seconds": spread_of([curve.seconds[0] for curve in curves]),
        "training_seconds": spread_of([curve.seconds[-1] for curve in curves]),
        "startup_seconds": spread_of([curve.startup_seconds for curve in curves]),
        "final_accuracy": spread_of([curve.points[-1].accuracy for curve in curves]),
        "curves": {str(curve.seed): [astuple(point) for point in curve.points] for curve in curves},
    }


def summarise(curves: dict[str, list[Curve]], goal: float) -> dict[str, Any]:
    """Return all figures of the runs, which `--json` writes. Ratios are to the first peer."""
    first = next(iter(curves))
    return {
        "goal": goal,
        "start_accuracy": curves[first][0].points[0].accuracy,
        "peers": {peer: summarise_peer(runs, goal) for peer, runs in curves.items()},
        "ratios": {
            peer: _spread_for_json(ratios(runs, curves[first], goal)) for peer, runs in curves.items() if peer != first
        },
        "ratios_to": first,
    }


def _number(value: float | None, digits: int) -> str:
    return "never" if value is None else f"{value:.{digits}f}"


def _cell(spread: dict[str, float | None], digits: int) -> str:
    low, middle, high = (_number(spread[name], digits) for name in ("min", "median", "max"))
    return f"{middle} ({low}, {high})"


def table(summary: dict[str, Any]) -> str:
    """Return the table in Markdown, for README.md."""
    goal = f"{summary['goal']:.0%}"
    header = [
        "peer",
        f"s to {goal}: median (min, max)",
        "steps to it",
        "runs that got there",
        "s a step",
        "first step",
        "start-up, not counted",
        "accuracy at the end",
        f"times as long as {summary['ratios_to']}",
    ]
    lines = [header, ["---"] * len(header)]
    for peer, figures in summary["peers"].items():
        ratio = summary["ratios"].get(peer)
        accuracy = {name: 100 * value for name, value in figures["final_accuracy"].items()}
        lines.append(
            [
                peer,
                _cell(figures["seconds_to_goal"], 1),
                _cell(figures["steps_to_goal"], 0),
                f"{figures['runs_at_goal']} of {figures['runs']}",
                _cell(figures["seconds_per_step"], 2),
                _cell(figures["first_step_seconds"], 2),
                _cell(figures["startup_seconds"], 1),
                f"{_cell(accuracy, 1)} %",
                "" if ratio is None else _cell(ratio, 2),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(curves: dict[str, list[Curve]], goal: float, file: Path) -> None:
    """Draw accuracy over seconds of training: a line for each run, with a dot where it first reaches the goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    for peer, runs in curves.items():
        for number, curve in enumerate(runs):
            label = f"{peer} ({len(runs)} run{'s' if len(runs) > 1 else ''})" if number == 0 else None
            xs, ys = [point.seconds for point in curve.points], [100 * point.accuracy for point in curve.points]
            axis.plot(xs, ys, color=COLORS[peer], linewidth=1, label=label)
            crossing = first_crossing(curve, goal)
            if crossing is not None:
                axis.plot(crossing.seconds, 100 * crossing.accuracy, "o", color=COLORS[peer])
    axis.axhline(100 * goal, color="gray", linestyle="--", linewidth=1)
    axis.set(xlabel="seconds of training", ylabel="held-out greedy pass@1, %", xlim=(0, None))
    axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)
