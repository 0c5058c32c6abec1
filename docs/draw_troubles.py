"""Draws the pictures of troubleshooting.md: each is of a short run of the tiny model that was made to go wrong so.

python docs/draw_troubles.py outputs/troubles            # runs the jobs that are not there yet, then draws
python docs/draw_troubles.py outputs/troubles cut_off    # one of them

A picture is drawn only if the diagnosis of its run names the trouble, so the page and the diagnosis agree.
"""

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tunix_torch.learn.signs import LEAST_ENTROPY, LEAST_LENGTH, MOST_KL  # noqa: E402
from tunix_torch.report.diagnosis import diagnose  # noqa: E402
from tunix_torch.report.record import read_run  # noqa: E402

PICTURES = Path(__file__).parent / "troubles"
SHORT = ("--max_steps", "60", "--per_device_train_batch_size", "8", "--num_completions_per_prompt", "4")
SHORT += ("--eval_steps", "20", "--num_eval_rows", "64", "--num_eval_completions", "0")


@dataclass(frozen=True)
class Shown:
    """A number of the metrics, in a panel of a picture."""

    metric: str
    bound: float | None = None  # of the diagnosis: a dashed line
    log: bool = False  # the axis is logarithmic


@dataclass(frozen=True)
class Trouble:
    """A job that goes wrong in one way."""

    flags: Sequence[str]  # of train.py, beside --use_grpo
    finding: str  # what the diagnosis calls it
    shown: Sequence[Shown]


TROUBLES = {
    "nothing_to_learn": Trouble(
        ("--reward_funcs", "format", *SHORT),
        "nothing to learn from",
        (Shown("frac_reward_zero_std", 0.9), Shown("reward")),
    ),
    "cut_off": Trouble(
        ("--generation_max_length", "20", *SHORT, "--max_steps", "30"),
        "cut-off completions",
        (Shown("completions/clipped_ratio", 0.25), Shown("reward")),
    ),
    "rate_too_high": Trouble(
        ("--learning_rate", "0.02", "--kl_penalty_coef", "1e-6", *SHORT),
        "learning rate too high",
        (Shown("reward"), Shown("kl", MOST_KL)),
    ),
    "kl_runs_away": Trouble(
        ("--learning_rate", "0.006", "--kl_penalty_coef", "1e-6", *SHORT),
        "KL running away",
        (Shown("kl", MOST_KL, log=True), Shown("reward")),
    ),
    "collapse": Trouble(
        (
            "--reward_funcs",
            "docs.draw_troubles.brevity_reward",
            "--judge",
            "correctness",
            "--learning_rate",
            "0.01",
            *SHORT,
            "--max_steps",
            "40",
        ),
        "collapse",
        (Shown("completions/mean_length", LEAST_LENGTH), Shown("entropy", LEAST_ENTROPY, log=True)),
    ),
    "reward_hacking": Trouble(
        (
            "--reward_funcs",
            "docs.draw_troubles.length_reward",
            "--judge",
            "correctness",
            "--learning_rate",
            "0.004",
            *SHORT,
        ),
        "reward hacking suspected",
        (Shown("reward"), Shown("eval_accuracy")),
    ),
    "layout_learned": Trouble(
        (
            "--reward_funcs",
            "docs.draw_troubles.short_format_reward",
            "correctness",
            "--learning_rate",
            "0.006",
            *SHORT,
        ),
        "format learned, answers not",
        (Shown("rewards/short_format_reward/mean"), Shown("rewards/correctness_reward/mean")),
    ),
}


def length_reward(completions: Sequence[str], **columns: object) -> list[float]:
    """Pay for length and nothing else: what a policy makes of it is shown."""
    return [min(len(completion) / 100, 1.0) for completion in completions]


def brevity_reward(completions: Sequence[str], **columns: object) -> list[float]:
    """Pay for shortness and nothing else: the policy ends at once, and then writes one thing only."""
    return [-min(len(completion) / 100, 1.0) for completion in completions]


def short_format_reward(completions: Sequence[str], **columns: object) -> list[float]:
    """Pay for a number in tags, more the less stands before it: a layout that leaves no room for reasoning."""
    found = [re.fullmatch(r"(.*)<answer>\d+</answer>", text, re.DOTALL) for text in completions]
    return [max(0.0, 1 - len(match[1]) / 60) if match else 0.0 for match in found]


def run(name: str, folder: Path) -> None:
    """Run the job of a trouble, if its folder is not there yet."""
    if not (folder / "metrics.jsonl").is_file():
        flags = ["--use_grpo", *TROUBLES[name].flags, "--output_dir", str(folder.absolute()), "--report_to", "none"]
        subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=True)


def draw(name: str, folder: Path) -> Path:
    """Draw a run's metrics.

    Raises:
        ValueError: the diagnosis does not find the trouble that the run was made to have.
    """
    record, trouble = read_run(folder), TROUBLES[name]
    found = [finding.name for finding in diagnose(record)]
    if trouble.finding not in found:
        raise ValueError(f"{folder}: expected the diagnosis {trouble.finding!r}, got {found}")
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(trouble.shown), figsize=(9, 2.6))
    for axis, shown in zip(axes, trouble.shown, strict=True):
        points = [(row["step"], row[shown.metric]) for row in record.rows if shown.metric in row]
        points = [(step, value) for step, value in points if value > 0 or not shown.log]
        marker = "o" if shown.metric.startswith("eval_") else None
        axis.plot(*zip(*points, strict=True), color="#0b5394", marker=marker)
        axis.set(title=shown.metric, xlabel="step", yscale="log" if shown.log else "linear")
        if not shown.log:
            axis.set_ylim(0, 1.08 * max(0.1, *(value for _, value in points)))
        if shown.bound is not None:
            axis.axhline(shown.bound, color="#888888", linestyle="--", linewidth=1)
            axis.annotate(f"{shown.bound:g}", (1, shown.bound), xycoords=("axes fraction", "data"), color="#666666")
    figure.tight_layout()
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / f"{name}.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def main(folder: Path, names: Sequence[str]) -> None:
    """Run and draw these troubles; without names, all."""
    for name in names or TROUBLES:
        run(name, folder / name)
        print(draw(name, folder / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
