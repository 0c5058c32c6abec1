"""Draws the pictures of troubleshooting.md: each is of a short run of the tiny model that was made to go wrong so.

python docs/draw_troubles.py outputs/troubles            # runs the jobs that are not there yet, then draws
python docs/draw_troubles.py outputs/troubles cut_off    # one of them

A picture of curves is drawn only if the diagnosis of its run names the trouble, so the page and the diagnosis agree. A
job that ends with an error is shown as its terminal was.
"""

import re
import resource
import subprocess
import sys
import textwrap
import time
import zlib
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
from tunix_torch.report.record import RunRecord, read_run  # noqa: E402

PICTURES = Path(__file__).parent / "troubles"
NO_BATCH = ("--max_steps", "60", "--num_completions_per_prompt", "4", "--eval_steps", "20")
NO_BATCH += ("--num_eval_rows", "64", "--num_eval_completions", "0")
SHORT = ("--per_device_train_batch_size", "8", *NO_BATCH)


@dataclass(frozen=True)
class Shown:
    """A number of the metrics, in a panel of a picture."""

    metric: str
    bound: float | None = None  # of the diagnosis: a dashed line
    log: bool = False  # the axis is logarithmic
    top: float | None = None  # the end of the axis; None: as high as the values


@dataclass(frozen=True)
class Trouble:
    """A job that goes wrong in one way."""

    flags: Sequence[str]  # of train.py, beside --use_grpo
    finding: str | None  # what the diagnosis calls it; None: it is no matter of the curves
    shown: Sequence[Shown] = ()
    completions: bool = False  # show one of the first step that was kept, and one of the last


@dataclass(frozen=True)
class Stopped:
    """A job that ends with an error, and what of its terminal is shown."""

    flags: Sequence[str]
    error: str  # words of it


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
    "no_progress": Trouble(
        ("--learning_rate", "2e-6", *SHORT),
        "no progress",
        (Shown("reward"), Shown("eval_accuracy"), Shown("frac_reward_zero_std")),
    ),
    "repetition": Trouble(
        ("--reward_funcs", "docs.draw_troubles.repetition_reward", "--learning_rate", "0.006", *SHORT),
        "repetition",
        (Shown("completions/mean_length"), Shown("entropy", log=True)),
        completions=True,
    ),
    "slow": Trouble(
        ("--reward_funcs", "docs.draw_troubles.slow_reward", *SHORT, "--max_steps", "30"),
        None,
        tuple(Shown(f"{part}_seconds", top=2.5) for part in ("step", "rollout", "scoring", "learning")),
    ),
}


STOPPED = {
    "memory": Stopped(
        ("--reward_funcs", "docs.draw_troubles.little_memory", "--per_device_train_batch_size", "64", *NO_BATCH),
        "out of memory",
    ),
    "stopped": Stopped(("--reward_funcs", "docs.draw_troubles.fails_in_step_3", *SHORT), "fails_in_step_3"),
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


def repetition_reward(completions: Sequence[str], **columns: object) -> list[float]:
    """Pay for text that is easily packed, which is text that says one thing over and over."""
    packed = [len(zlib.compress(text.encode())) / max(1, len(text)) for text in completions]
    return [max(0.0, 1 - share) for share in packed]


def slow_reward(completions: Sequence[str], **columns: object) -> list[float]:
    """Pay as for a right layout, and take a twentieth of a second for each completion, one after the other."""
    time.sleep(0.05 * len(completions))
    return [float("<answer>" in completion) for completion in completions]


def little_memory(completions: Sequence[str], **columns: object) -> list[float]:
    """After the first rollout, 100 MB are all that may still be taken."""
    if len(completions) == 256:  # a step's, not an evaluation's
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 100_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    return [float(i % 2) for i in range(len(completions))]


def fails_in_step_3(completions: Sequence[str], trainer_state: object, **columns: object) -> list[float]:
    """A function of somebody's own, with a mistake that shows late."""
    if trainer_state.global_step == 2:
        return [float(completion.rpartition(" = ")[2]) for completion in completions]  # no completion has a " = "
    return [float(i % 2) for i in range(len(completions))]


def command(flags: Sequence[str], folder: Path) -> list[str]:
    """The command of a job, as it is run at the root of the repository."""
    return [sys.executable, "train.py", "--use_grpo", *flags, "--output_dir", str(folder), "--report_to", "none"]


def run(name: str, folder: Path) -> None:
    """Run the job of a trouble, if its folder is not there yet."""
    if not (folder / "metrics.jsonl").is_file():
        subprocess.run(command(TROUBLES[name].flags, folder.absolute()), cwd=ROOT, check=True)


def draw(name: str, folder: Path) -> Path:
    """Draw a run's metrics.

    Raises:
        ValueError: the diagnosis does not find the trouble that the run was made to have.
    """
    record, trouble = read_run(folder), TROUBLES[name]
    found = [finding.name for finding in diagnose(record)]
    if trouble.finding is not None and trouble.finding not in found:
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
            axis.set_ylim(0, shown.top or 1.08 * max(0.1, *(value for _, value in points)))
        if shown.bound is not None:
            axis.axhline(shown.bound, color="#888888", linestyle="--", linewidth=1)
            axis.annotate(f"{shown.bound:g}", (1, shown.bound), xycoords=("axes fraction", "data"), color="#666666")
    figure.tight_layout()
    if trouble.completions:
        first, last = (next(c for c in record.completions if c.step == step) for step in shown_steps(record))
        said = "\n\n".join(textwrap.fill(f"Step {c.step}: {c.text!r}", 105) for c in (first, last))
        figure.text(0.02, -0.02, said, va="top", family="monospace", fontsize=9, parse_math=False)
    return saved(figure, name)


def shown_steps(record: RunRecord) -> tuple[int, int]:
    """The first and the last step of which completions were kept."""
    steps = [completion.step for completion in record.completions]
    return min(steps), max(steps)


def draw_terminal(name: str, folder: Path) -> Path:
    """Run a job that stops, and draw the end of what its terminal showed.

    Raises:
        ValueError: it did not stop, or for another reason.
    """
    stopped = STOPPED[name]
    folder = folder.absolute()
    ended = subprocess.run(command(stopped.flags, folder), cwd=ROOT, capture_output=True, text=True)
    if ended.returncode != 1 or stopped.error not in ended.stderr.splitlines()[-1]:
        raise ValueError(f"{name}: expected an error that has {stopped.error!r}, got {ended.stderr}")
    called = " ".join(["$ python", *command(stopped.flags, folder)[1:]])
    lines = [called, *ended.stdout.splitlines(), ended.stderr.splitlines()[-1], "$ echo $?", str(ended.returncode)]
    wrapped = [part for line in lines for part in textwrap.wrap(line, 112) or [""]]
    figure = plt.figure(figsize=(9, 0.3 + 0.19 * len(wrapped)), facecolor="#1e1e1e")
    style = {"va": "center", "family": "monospace", "fontsize": 9, "color": "#e0e0e0", "parse_math": False}
    figure.text(0.02, 0.5, "\n".join(wrapped), **style)
    return saved(figure, name)


def saved(figure: plt.Figure, name: str) -> Path:
    """Write a picture, and close it."""
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / f"{name}.png"
    figure.savefig(path, dpi=90, bbox_inches="tight", facecolor=figure.get_facecolor())
    plt.close(figure)
    return path


def main(folder: Path, names: Sequence[str]) -> None:
    """Run and draw these troubles; without names, all."""
    for name in names or [*TROUBLES, *STOPPED]:
        if name in STOPPED:
            print(draw_terminal(name, folder / name))
        else:
            run(name, folder / name)
            print(draw(name, folder / name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
