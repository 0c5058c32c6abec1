"""Draws learning_curve.png, the picture in README.md, from the metrics of runs of the default job.

python -m docs.draw_learning_curve outputs/seed-42 outputs/seed-43 outputs/seed-44
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tunix_torch.report.metrics import load_metrics, series

PICTURE = Path(__file__).parent / "learning_curve.png"
GREEDY, SAMPLED, TRAINING = "#0b5394", "#c55a11", "#9fc5e8"
SMOOTHED_OVER = 10  # steps


def read_points(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Return the steps of a run at which it logged this number, and the numbers.

    Raises:
        ValueError: it has logged none.
    """
    points = series(load_metrics(folder), name)
    if not points:
        raise ValueError(f"{str(folder)!r} has no {name!r}: expected the folder of a run with evaluations")
    steps, values = zip(*points, strict=True)
    return list(steps), list(values)


def smooth(values: Sequence[float]) -> list[float]:
    """Return for each step the mean of the last `SMOOTHED_OVER` values up to it."""
    windows = (values[max(0, i + 1 - SMOOTHED_OVER) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(folders: Sequence[Path], picture: Path) -> None:
    """Draw held-out accuracy and the reward of training; the first run with numbers, the others as thin lines."""
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, (accuracy, reward) = plt.subplots(1, 2, figsize=(10.4, 4.2))
    for number, folder in enumerate(folders):
        width, size, alpha = (2.6, 7, 1) if number == 0 else (1.2, 3, 0.55)
        kinds = [("accuracy", GREEDY, "o-", "greedy"), ("mean@8", SAMPLED, "s--", "mean of 8 sampled")]
        for name, color, form, label in kinds:
            steps, values = read_points(folder, f"eval_{name}")
            percent = [100 * value for value in values]
            shown = label if number == 0 else None
            accuracy.plot(steps, percent, form, color=color, lw=width, ms=size, alpha=alpha, label=shown)
            if number == 0:
                below = name != "accuracy"
                for i in (0, -1):
                    offset = (0, -20 if below else 10)
                    text = f"{percent[i]:.1f}%"
                    at = (steps[i], percent[i])
                    accuracy.annotate(text, at, offset, textcoords="offset points", ha="center", color=color)
        steps, values = read_points(folder, "reward")
        if number == 0:
            reward.plot(steps, values, color=TRAINING, lw=1, label="each step")
        shown = f"mean of {SMOOTHED_OVER} steps" if number == 0 else None
        reward.plot(steps, smooth(values), color=GREEDY, lw=width, alpha=alpha, label=shown)
    accuracy.set(xlabel="step", ylabel="right answers to held-out questions (%)", ylim=(0, 105))
    reward.set(xlabel="step", ylabel="mean reward of training (at most 2)", ylim=(1, 2))
    accuracy.margins(x=0.08)
    for axis in (accuracy, reward):
        axis.grid(alpha=0.25)
        axis.legend(loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m docs.draw_learning_curve RUN [RUN ...]")
    try:
        draw([Path(word) for word in sys.argv[1:]], PICTURE)
    except ValueError as error:
        sys.exit(f"error: {error}")
