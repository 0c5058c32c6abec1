"""What a terminal shows of a run: a line that says what happens now, a line a log, and a summary at the end."""

import re
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..runtime import phases
from .live import LiveLine

# The columns of a log's line: the key in the logs, and how its value is shown.
PROGRESS_COLUMNS = (
    ("loss", "loss {:.4f}"),
    ("reward", "reward {:.3f}"),
    ("rewards/correctness_reward/mean", "correct {:.0%}"),
    ("kl", "kl {:.4f}"),
    ("completions/mean_length", "length {:.0f}"),
)
NARROW = 70  # columns: on a narrower terminal what is counted, and a temperature, are left out
LINES = 20  # about so many lines with means are printed above the live line; without one, a line at each log
TREND = 10  # logs whose mean is compared with that of as many before them
SPARKS = {True: "▁▂▃▄▅▆▇█", False: "_.-=+*#@"}  # whether the output takes characters beyond ASCII
ARROWS = {True: {"up": "↗", "down": "↘", "": "→"}, False: {"up": "/", "down": "\\", "": "-"}}
# What the summary shows of training: the first of these that was logged.
TRAINED = {"reward": "training reward", "rewards/accuracies": "training pairs right", "loss": "training loss"}
FORMS = {"reward": "{:.3f}", "loss": "{:.4f}", "eval_loss": "{:.4f}"}  # all else is a share
LONGEST, SHORTEST = 50, 4  # of its curves


def show_progress(trainer: Trainer) -> None:
    """Show a trainer's run by `ConsoleProgress`, in place of what Transformers shows."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ConsoleProgress())


class ConsoleProgress(TrainerCallback):
    """Shows a run on the terminal: a live line at the bottom, and above it about twenty lines a run with the means of
    the steps since the line before. Where standard output is no terminal, or with `disable_tqdm`, there is no live
    line, and a line at each log of a step."""

    def __init__(self) -> None:
        self.since: list[dict[str, float]] = []
        self.started = time.perf_counter()
        self.now: Now | None = None  # what the live line shows; None: there is none

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()
        if state.is_world_process_zero and is_terminal() and not args.disable_tqdm:
            self.now = Now(state)
            phases.watch(self.now)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.now is not None:
            self.now.stepped(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if self.now is not None:
            self.now.logged(logs)
        place = f"step {state.global_step:>4}/{state.max_steps}"
        evaluation = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if evaluation:  # the numbers of single reward functions are in the file only
            shown = [
                f"{name} {value:.1%}" if name.endswith("accuracy") or "mean@" in name else f"{name} {value:.4g}"
                for name, value in evaluation.items()
                if "/" not in name and not name.endswith("reward_std")
            ]
            print(f"{place}  evaluation: {', '.join(shown)}", flush=True)
        elif "loss" in logs:
            self.since.append(logs)
            every = 1 if self.now is None else max(1, state.max_steps // LINES)
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                seconds = time.perf_counter() - self.started
                print(f"{place}  {'  '.join(_means(self.since))}  ({seconds:.0f} s)", flush=True)
                self.since.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.now is not None:
            self.now.train_ended()


def is_terminal() -> bool:
    """Whether standard output is a terminal on which a line can be drawn again."""
    return sys.stdout.isatty() and not Console(file=sys.stdout).is_dumb_terminal


def _means(logs: Sequence[dict[str, float]]) -> list[str]:
    shown = []
    for key, form in PROGRESS_COLUMNS:
        if key == "loss" and "reward" in logs[0]:  # GRPO's is about 0 where a policy learns from its own samples
            continue
        values = [row[key] for row in logs if key in row]
        if values:
            shown.append(form.format(sum(values) / len(values)))
    return shown


class Now:
    """What the live line says. It stands from the beginning of training to its end, and while a later evaluation runs.

    Args:
        state: of the trainer, at the beginning of training.
    """

    def __init__(self, state: TrainerState) -> None:
        self.first = self.step = state.global_step
        self.last, self.training = state.max_steps, True
        self.rewards = [row["reward"] for row in state.log_history if "reward" in row]
        self.losses = [row["loss"] for row in state.log_history if "loss" in row]
        self.accuracies = [row["eval_accuracy"] for row in state.log_history if "eval_accuracy" in row]
        self.speed: float | None = None  # tokens a second of sampling, or else of learning
        self.phases: list[tuple[str, str]] = []  # those that have begun, each with how far it is
        self.began_at: float | None = None  # when the first step began
        self.spent, self._since = 0.0, 0.0  # seconds in evaluations, which the time that is left doesn't count
        self.widest = 0  # characters of the longest text that has said what happens
        self.unicode = takes_unicode(sys.stdout.encoding)
        self.line = LiveLine(self.text)
        self.line.start()

    # ---- what happens ----

    def began(self, phase: str) -> None:
        now = time.perf_counter()
        if phase == "evaluating":
            self._since = now
            if not self.training:
                self.line.start()
        elif self.began_at is None:
            self.began_at, self.spent = now, 0.0
        self.phases = [*self.phases, (phase, "")]

    def ended(self, phase: str) -> None:
        self.phases = self.phases[:-1]
        if phase == "evaluating":
            self.spent += time.perf_counter() - self._since
            if not self.training:
                self.line.stop()

    def advanced(self, what: str, done: int, total: int, how: str = "") -> None:
        if not self.phases:
            return
        phase = self.phases[-1][0]
        if (phase == "evaluating") == (what == phases.QUESTIONS):  # it samples too
            self.phases = [*self.phases[:-1], (phase, f"{done}/{total} {how or what}")]

    def stepped(self, step: int) -> None:
        """An optimizer step is done."""
        self.step = step

    def logged(self, logs: dict[str, float]) -> None:
        """Take what the line shows from a log."""
        for key, values in (("reward", self.rewards), ("loss", self.losses), ("eval_accuracy", self.accuracies)):
            if key in logs:
                values.append(logs[key])
        for key in ("learning_tokens_per_second", "rollout_tokens_per_second"):  # the latter where there are rollouts
            self.speed = logs.get(key, self.speed)

    def train_ended(self) -> None:
        """Training is over; evaluations may follow."""
        self.training = False
        self.line.stop()

    def close(self) -> None:
        """Leave nothing on the terminal, and watch no longer: the run has ended by an exception, or training is over.

        After training, evaluations are still shown.
        """
        self.line.stop()
        if self.training:
            phases.watch(None)

    # ---- what is shown ----

    def text(self, width: int) -> Text:
        """The line: of its parts as many as fit into so many columns, those that are needed most first."""
        arrow = ARROWS[self.unicode]
        phase, progress = self.phases[-1] if self.phases else ("", "")
        doing = f"{phase} {progress}".strip()
        if width < NARROW:
            doing = re.sub("(?<=[0-9]) .*", "", doing)
        else:
            self.widest = max(self.widest, len(doing))  # so that the other parts do not come and go with it
        parts = [(f"step {self.step}/{self.last}", "bold"), (doing.ljust(self.widest), "cyan")]
        if (left := self._left()) is not None:
            parts.append((f"{left} left", ""))
        if self.rewards:
            parts.append((f"reward {self.rewards[-1]:.3f} {arrow[trend(self.rewards)]}", "green"))
        elif self.losses:
            parts.append((f"loss {self.losses[-1]:.4f} {arrow[trend(self.losses)]}", "green"))
        if self.accuracies:
            known = self.accuracies[-2:]
            way = "" if known[0] == known[-1] else "up" if known[-1] > known[0] else "down"
            parts.append((f"accuracy {known[-1]:.1%} {arrow[way]}", "green"))
        if self.speed is not None:
            parts.append((f"{self.speed:,.0f} tokens/s", "dim"))
        fitting, used = parts[:1], len(parts[0][0])
        for text, style in parts[1:]:
            if text and used + 2 + len(text) <= width:
                fitting.append((text, style))
                used += 2 + len(text)
        line = Text()
        for text, style in sorted(fitting, key=lambda part: part[1] == "cyan"):
            line.append(text, style=style).append("  ")  # what happens now stands at the end
        return line

    def _left(self) -> str | None:
        done = self.step - self.first
        if self.began_at is None or not done or self.step >= self.last:
            return None
        seconds = (time.perf_counter() - self.began_at - self.spent) / done * (self.last - self.step)
        minutes, seconds = divmod(int(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def trend(values: Sequence[float]) -> str:
    """Where numbers go: "up" or "down" where the mean of the last ten differs from that of the ten before them by more
    than half of their standard deviation; else "". Where there are fewer, halves of them are compared, of at least five
    each."""
    count = min(TREND, len(values) // 2)
    if count < TREND // 2:
        return ""
    last, before = values[-count:], values[-2 * count : -count]
    both = [*last, *before]
    mean = sum(both) / len(both)
    deviation = (sum((value - mean) ** 2 for value in both) / len(both)) ** 0.5
    difference = sum(last) / count - sum(before) / count
    return "" if abs(difference) <= deviation / 2 else "up" if difference > 0 else "down"


def takes_unicode(encoding: str | None) -> bool:
    """Whether an output of this encoding takes the characters of sparklines and arrows."""
    try:
        (SPARKS[True] + "".join(ARROWS[True].values())).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def sparkline(values: Sequence[float], width: int, unicode: bool = True) -> str:
    """Numbers as a row of bars of growing height; of more numbers than `width`, the means of equal parts."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        parts = [values[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
        values = [sum(part) / len(part) for part in parts]
    low, high = min(values), max(values)
    marks, spread = SPARKS[unicode], high - low
    return "".join(marks[int((value - low) / spread * (len(marks) - 1) + 0.5) if spread else 0] for value in values)


def summary(
    history: Sequence[dict[str, float]],
    width: int = 80,
    encoding: str | None = "utf-8",
    temperature: float | None = None,
) -> list[str]:
    """A table that sums up a run, as lines: the first and the last value of each figure and a curve between them, and
    of right answers to held-out questions the 95% interval of the last; without it where the terminal is too narrow.

    Args:
        history: `log_history` of the trainer's state.
        width: columns of the terminal.
        temperature: at which evaluations sample, which is said where there is room; None: it is not known.
    """
    rows = [("", "first", "last", "95% interval")]
    curves: list[list[float]] = [[]]
    for key, name in _summed(history, temperature if width >= NARROW else None).items():
        logged, form = [row for row in history if key in row], FORMS.get(key, "{:.1%}")
        values = [row[key] for row in logged]
        first = form.format(values[0]) if len(values) > 1 else ""
        rows.append((name, first, form.format(values[-1]), _interval(logged[-1], key)))
        curves.append(values if len(values) > 1 else [])
    if len(rows) == 1:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    room = width - 1 - sum(widths[:3]) - 3 * 2
    with_intervals = any(row[3] for row in rows[1:]) and room >= widths[3] + 2 + SHORTEST
    if not with_intervals:
        widths = widths[:3]
    length = max(SHORTEST, min(LONGEST, room - (widths[3] + 2 if with_intervals else 0)))
    bars = takes_unicode(encoding)
    lines = []
    for row, values in zip(rows, curves, strict=True):
        name, *cells = (cell.ljust(n) for cell, n in zip(row, widths, strict=False))
        curve = sparkline(values, length, bars) if values else ""
        lines.append("  ".join([name, *cells, curve]).rstrip())
    return lines


def _summed(history: Sequence[dict[str, float]], temperature: float | None) -> dict[str, str]:
    """The keys in the logs of what the summary shows, each with its name, which has the temperature if it is given."""
    sampled = "sampled" if temperature is None else f"temperature {temperature:g}"
    logged = {key for row in history for key in row}
    names = {
        "eval_accuracy": "accuracy (greedy)",
        **{key: f"{key.removeprefix('eval_')} ({sampled})" for key in sorted(logged) if key.startswith("eval_mean@")},
        "eval_rewards/accuracies": "held-out pairs right",
        "eval_loss": "held-out loss",
        **{key: TRAINED[key] for key in [key for key in TRAINED if key in logged][:1]},
    }
    return {key: name for key, name in names.items() if key in logged}


def _interval(row: dict[str, float], key: str) -> str:
    """The 95% interval of a figure of an evaluation, where it has one."""
    bounds = [row.get(f"eval_interval/{key.removeprefix('eval_')}_{end}") for end in ("low", "high")]
    return "" if None in bounds else "{:.1%} to {:.1%}".format(*bounds)
