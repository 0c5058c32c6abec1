"""Which curves a report shows: the numbers of metrics.jsonl that belong together, as panels with a title each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ..learn.signs import LEAST_ENTROPY
from .completions import Completion, steps_of
from .metrics import Points, Rows, keys_of, mean, series, steps_of_training, thinned

MOST_ROWS = 40  # of the table below a panel
PARTS = ("rollout", "scoring", "reference", "old_policy", "learning")  # of a step, as `runtime/profiling.py` names them
MOST_LEVELS = 6  # of rewards, in the panel of their distribution
MOST_BARS = 12
MOST_COMPARED = 6  # curves of each run, in a panel of a comparison


@dataclass(frozen=True)
class Curve:
    """One line of a panel, or one of the parts that are stacked."""

    label: str
    points: Points
    band: list[tuple[int, float, float]] = field(default_factory=list)  # (step, low, high) around the line
    is_evaluation: bool = False  # few points, each of which is marked
    run: int = 0  # of a comparison: 0 for the first run, 1 for the second


@dataclass(frozen=True)
class Panel:
    """A picture: curves over the steps that share an axis."""

    name: str  # a word, unique in the report
    title: str
    note: str  # how to read it
    curves: list[Curve]
    form: str = "number"  # of the values: number, percent, or seconds
    kind: str = "lines"  # or stacked (areas), or bars (each step a bar, each curve a part of it)
    runs: tuple[str, ...] = ()  # of a comparison: what both runs are called
    exact: bool = False  # the values have no noise, so the curve goes through them

    @property
    def labels(self) -> list[str]:
        """The labels of the curves. In a comparison both runs may have a curve of the same label."""
        return list(dict.fromkeys(curve.label for curve in self.curves))

    def name_of(self, curve: Curve) -> str:
        """A name that no other curve of the panel has."""
        if not self.runs:
            return curve.label
        run = self.runs[curve.run]
        return f"{curve.label}, {run}" if len(self.labels) > 1 else run

    def describe(self) -> str:
        """What a screen reader says instead of the picture."""
        parts = []
        for curve in self.curves:
            (first, before), (last, after) = curve.points[0], curve.points[-1]
            where = f"{show(before, self.form)} at step {first}"
            there = f" to {show(after, self.form)} at step {last}" if len(curve.points) > 1 else ""
            parts.append(f"{self.name_of(curve)}: {'from ' if there else ''}{where}{there}")
        return "; ".join(parts) + "."

    def table(self) -> tuple[list[str], list[list[str]]]:
        """The names of the columns and the rows of the same data. Of many steps, neighbours are put together."""
        columns = [dict(thinned(curve.points, MOST_ROWS)) for curve in self.curves]
        steps = sorted({step for column in columns for step in column})
        rows = [[str(s), *(show(c[s], self.form) if s in c else "" for c in columns)] for s in steps]
        return ["step", *map(self.name_of, self.curves)], rows


def show(value: float, form: str) -> str:
    """A value as a table has it."""
    if form == "percent":
        return f"{value:.1%}"
    return f"{value:.3f} s" if form == "seconds" else f"{value:.4g}"


def panels_of(rows: Rows) -> list[Panel]:
    """The panels for which a run has logged numbers."""
    made = [make(rows) for make in _PANELS]
    return [panel for panel in made if panel is not None and any(curve.points for curve in panel.curves)]


def _panel(name: str, title: str, note: str, curves: Sequence[Curve], form: str = "number") -> Panel:
    return Panel(name, title, note, [curve for curve in curves if curve.points], form)


def _simple(
    name: str,
    title: str,
    note: str,
    keys: dict[str, str],
    form: str = "number",
    evaluated: str | None = None,
    exact: bool = False,
) -> Callable[[Rows], Panel]:
    """A panel of numbers of training steps, by key and label, and of a number of evaluations."""

    def make(rows: Rows) -> Panel:
        training = steps_of_training(rows)
        curves = [Curve(label, series(training, key)) for key, label in keys.items()]
        if evaluated is not None:
            curves.append(Curve("held out", series(rows, evaluated), is_evaluation=True))
        return replace(_panel(name, title, note, curves, form), exact=exact)

    return make


def _accuracy(rows: Rows) -> Panel:
    curves = []
    for key in keys_of(rows):
        name = key.removeprefix("eval_")
        if name == key or "/" in key or not (name.endswith("accuracy") or "mean@" in name):
            continue
        stem, at, samples = (
            key.rpartition("mean@") if "mean@" in key else (key.removesuffix("accuracy"), "", "accuracy")
        )
        bounds = [dict(series(rows, f"{stem}interval/{at}{samples}_{end}")) for end in ("low", "high")]
        points = series(rows, key)
        band = [(step, bounds[0][step], bounds[1][step]) for step, _ in points if all(step in b for b in bounds)]
        label = name.replace("accuracy", "greedy").replace("_", " ").strip()
        curves.append(Curve(label, points, band, is_evaluation=True))
    note = "The share of held-out questions that are answered rightly; the band is the 95% interval."
    return _panel("accuracy", "Right answers", note, curves, "percent")


def _reward(rows: Rows) -> Panel:
    training = steps_of_training(rows)
    names = [key for key in keys_of(training) if key.startswith("rewards/") and key.endswith("/mean")]
    short = {key: key.removeprefix("rewards/").removesuffix("/mean").removesuffix("_reward") for key in names}
    curves = [Curve("total", series(training, "reward"))]
    if len(names) > 1:
        curves += [Curve(short[key].replace("_", " "), series(training, key)) for key in names[:5]]
    note = "The mean reward of a step's completions: the weighted total, and each function by itself."
    return _panel("reward", "Reward", note, curves)


def _length(rows: Rows) -> Panel:
    training = steps_of_training(rows)
    low, high = (dict(series(training, f"completions/{end}_length")) for end in ("min", "max"))
    points = series(training, "completions/mean_length")
    band = [(step, low[step], high[step]) for step, _ in points if step in low and step in high]
    note = "Tokens of a completion: the mean, within the shortest and the longest of the step."
    return _panel("length", "Length of completions", note, [Curve("mean", points, band)])


def _time(rows: Rows) -> Panel:
    training = steps_of_training(rows)
    parts = {name: dict(series(training, f"{name}_seconds")) for name in PARTS}
    parts = {name.replace("_", " "): values for name, values in parts.items() if values}
    total = dict(series(training, "step_seconds"))
    other = {step: max(0.0, total[step] - sum(v.get(step, 0.0) for v in parts.values())) for step in total}
    parts["other" if parts else "whole step"] = other
    curves = [Curve(name, [(step, values.get(step, 0.0)) for step in total]) for name, values in parts.items()]
    note = "Seconds of a step, by what was done."
    return Panel("time", "Time of a step", note, [c for c in curves if c.points], "seconds", "stacked")


def distribution(completions: Sequence[Completion]) -> Panel | None:
    """How the rewards of a step's completions are distributed, and how that moves; None: no completions were kept."""
    rewarded = [(c.step, c.reward) for c in completions if c.reward is not None]
    steps = steps_of([c for c in completions if c.reward is not None])
    if not steps:
        return None
    values = sorted({round(reward, 6) for _, reward in rewarded})
    if len(values) <= MOST_LEVELS:
        labels, level_of = [f"reward {value:g}" for value in values], {v: i for i, v in enumerate(values)}
        levels = [(step, level_of[round(reward, 6)]) for step, reward in rewarded]
    else:
        low, width = values[0], (values[-1] - values[0]) / MOST_LEVELS
        labels = [f"{low + i * width:.3g} to {low + (i + 1) * width:.3g}" for i in range(MOST_LEVELS)]
        levels = [(step, min(MOST_LEVELS - 1, int((reward - low) / width))) for step, reward in rewarded]
    size = -(-len(steps) // MOST_BARS)
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    bar_of = {step: group[-1] for group in groups for step in group}
    counts = {group[-1]: [0] * len(labels) for group in groups}
    for step, level in levels:
        counts[bar_of[step]][level] += 1
    curves = [
        Curve(label, [(step, of_step[i] / sum(of_step)) for step, of_step in counts.items()])
        for i, label in enumerate(labels)
    ]
    note = (
        "The share of a step's completions that got each reward, lowest at the bottom. Several steps may share a bar."
    )
    return Panel("distribution", "Rewards of completions", note, curves, "percent", "bars")


def overlaid(panels: Sequence[tuple[str, list[Panel]]]) -> list[Panel]:
    """Panels that two runs both have, with the curves of both as lines, those of the same label beside each other.

    Args:
        panels: for each run what it is called, and its panels.
    """
    names, (first, second) = zip(*panels, strict=True)
    by_name = {panel.name: panel for panel in second}
    return [_overlaid(panel, by_name[panel.name], names) for panel in first if panel.name in by_name]


def _overlaid(one: Panel, other: Panel, names: tuple[str, ...]) -> Panel:
    labels = [label for label in one.labels if label in other.labels]  # a picture has colours for some of them
    labels = list(dict.fromkeys([*labels, *one.labels, *other.labels]))
    curves = [
        replace(curve, run=run, band=curve.band if curve.is_evaluation else [])
        for label in labels[:MOST_COMPARED]
        for run, panel in enumerate((one, other))
        for curve in panel.curves
        if curve.label == label
    ]
    left_out = f" Left out: {', '.join(labels[MOST_COMPARED:])}." if len(labels) > MOST_COMPARED else ""
    return replace(one, curves=curves, kind="lines", runs=names, note=one.note + left_out)


def mean_seconds(rows: Rows) -> float | None:
    """The mean seconds of a step; None: they were not logged."""
    points = series(steps_of_training(rows), "step_seconds")
    return mean([seconds for _, seconds in points]) if points else None


_PANELS: tuple[Callable[[Rows], Panel], ...] = (
    _accuracy,
    _reward,
    _simple(
        "signal",
        "Groups without a signal",
        "The share of groups whose completions all got the same reward: nothing is learned from them.",
        {"frac_reward_zero_std": "share"},
        "percent",
    ),
    _simple("kl", "KL from the reference", "How far the policy is from where it began, in nats a token.", {"kl": "KL"}),
    _simple(
        "entropy",
        "Entropy",
        f"How undecided the policy is, in nats a token. Below {LEAST_ENTROPY:g} it tries nothing else.",
        {"entropy": "entropy"},
    ),
    _simple(
        "clip",
        "Clipped ratios",
        "The share of tokens whose ratio of new to old probability was clipped. Where each batch is learned from once "
        "(num_iterations 1), it is always 0.",
        {"clip_ratio/region_mean": "both", "clip_ratio/low_mean": "low", "clip_ratio/high_mean": "high"},
        "percent",
    ),
    _length,
    _simple(
        "cut",
        "Cut off",
        "The share of completions without an end at generation_max_length.",
        {"completions/clipped_ratio": "share"},
        "percent",
    ),
    _simple(
        "loss",
        "Loss",
        "With GRPO it says little: advantages are centred, so it stays near 0.",
        {"loss": "training"},
        evaluated="eval_loss",
    ),
    _simple(
        "pairs",
        "Pairs",
        "The share of pairs in which the chosen completion is preferred.",
        {"rewards/accuracies": "share"},
        "percent",
    ),
    _simple(
        "margins",
        "Rewards of pairs",
        "The rewards of chosen and rejected completions, and what lies between.",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin"},
    ),
    _simple(
        "teacher", "KL from the teacher", "The reverse KL from the teacher, in nats a token.", {"teacher_kl": "KL"}
    ),
    _simple("norm", "Norm of the gradient", "Before it is clipped at max_grad_norm.", {"grad_norm": "norm"}),
    _simple(
        "rate",
        "Learning rate",
        "The learning rate of each step. With a warm-up that of the first step is 0: this step changes no weight.",
        {"learning_rate": "rate"},
        exact=True,
    ),
    _time,
    _simple(
        "speed",
        "Tokens a second",
        "While sampling, and while learning.",
        {"rollout_tokens_per_second": "rollout", "learning_tokens_per_second": "learning"},
    ),
)
