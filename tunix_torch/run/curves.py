"""Draws the metrics of a run as curves, in one picture beside its other files."""

import importlib.util
import sys
from pathlib import Path

from ..checkpoints.card import CURVES_FILE
from ..report.metrics import load_metrics


def plot_training_curves(output_dir: str | Path) -> Path | None:
    """Draw accuracy, reward, loss, KL, entropy and completion length of a run into CURVES_FILE.

    Returns:
        the file; None where Matplotlib, which is no requirement of training, is not installed: then a line says so.
    """
    if importlib.util.find_spec("matplotlib") is None:
        hint = "matplotlib is not installed: pip install 'tunix-torch[plots]'"
        print(f"The curves of {output_dir} were not drawn: {hint}", file=sys.stderr)
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = load_metrics(output_dir)
    panels = {
        "accuracy": [
            name for name in ("eval_accuracy", *sorted({k for r in rows for k in r if "_mean@" in k and "/" not in k}))
        ],
        "reward": ["reward", "reward_std"],
        "loss": ["loss"],
        "KL from the reference": ["kl"],
        "entropy": ["entropy"],
        "completion length": ["completions/mean_length"],
    }
    panels = {title: [n for n in names if any(n in row for row in rows)] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names} or {"no metrics": []}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.5 * columns, 3 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            marker = "o" if name.startswith("eval_") else None
            axis.plot(*zip(*points, strict=True), label=name.removeprefix("eval_"), marker=marker)
        axis.set(title=title, xlabel="step")
        if len(names) > 1:
            axis.legend()
    figure.tight_layout()
    path = Path(output_dir) / CURVES_FILE
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
