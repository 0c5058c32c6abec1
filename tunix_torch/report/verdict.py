"""Says in one sentence whether a run made its model better, with figures before and after and their intervals."""

import re
from dataclasses import dataclass

from ..evals.estimators import difference_interval, wilson_interval
from .metrics import Rows, keys_of, mean, series, squared_error, steps_of_training
from .record import RunRecord

_SHARE = re.compile(r"(?P<stem>eval_(?:.+_)?)(?P<name>accuracy|mean@\d+)")
_PLAIN = {"reward": "mean reward", "mean_length": "length in tokens", "loss": "loss"}
Interval = tuple[float, float]


@dataclass(frozen=True)
class Change:
    """A figure at the first evaluation and at the last one."""

    key: str  # in metrics.jsonl
    label: str
    is_share: bool  # in [0, 1], shown in percent
    before: float | None  # None: there was one evaluation only
    after: float
    before_interval: Interval | None = None  # 95%; None: not known
    after_interval: Interval | None = None
    difference: Interval | None = None  # 95% of after - before

    def show(self, value: float) -> str:
        """A value of the figure, for people."""
        return f"{value:.1%}" if self.is_share else f"{value:.4g}"

    @property
    def sure(self) -> bool:
        """Whether the change is more than chance explains, as far as the interval is known."""
        return self.difference is not None and (self.difference[0] > 0 or self.difference[1] < 0)


@dataclass(frozen=True)
class Verdict:
    """What came of a run."""

    headline: str
    detail: str
    tone: str  # better, same, worse or unknown
    changes: list[Change]
    first_step: int | None = None  # of the first evaluation; None: there was none
    last_step: int | None = None


def verdict_of(run: RunRecord) -> Verdict:
    """The verdict about a run, by its evaluations, or by its rewards or loss where there were none."""
    evaluations = [row for row in run.rows if any(key.startswith("eval_") for key in row)]
    changes = _changes(run, evaluations)
    if not changes:
        return _without_evaluation(run)
    first, last = evaluations[0]["step"], evaluations[-1]["step"]
    main = changes[0]
    if main.before is None:
        said = f"{_subject(main)} {_is(main)} {main.show(main.after)}"
        return Verdict(said, _once(main, last), "unknown", changes, first, last)
    headline, tone = _moved(main)
    return Verdict(headline, _detail(main, first, last), tone, changes, first, last)


def rivals(one: Verdict, other: Verdict, names: tuple[str, str]) -> tuple[str, str]:
    """Which of two runs ended better, by the first figure of their last evaluations that both have: a headline, and
    what it rests on."""
    known = {change.key: change for change in other.changes}
    pair = next(((mine, known[mine.key]) for mine in one.changes if mine.key in known), None)
    if pair is None:
        return "The two runs have no evaluation in common", "So what each says about itself can't be compared."
    ends = [change.show(change.after) for change in pair]
    figure = f"By {pair[0].label}, at the last evaluation of each."
    intervals = [change.after_interval for change in pair]
    said = f"{ends[0]} in {names[0]}, {ends[1]} in {names[1]}"
    if None not in intervals:
        low, high = difference_interval(pair[0].after, intervals[0], pair[1].after, intervals[1])
        figure += f" {_apart(100 * low, 100 * high, names)}"
        if low <= 0 <= high:
            return f"Neither run is surely ahead: {said}", figure
    if pair[0].after == pair[1].after:
        return f"Neither run is ahead: {said}", figure
    first_ahead = (pair[0].after > pair[1].after) != (pair[0].key == "eval_loss")
    return f"{names[0] if first_ahead else names[1]} ended better: {said}", figure


def _apart(low: float, high: float, names: tuple[str, str]) -> str:
    """By how many points the second run's figure lies above the first one's, or below it, with 95% confidence."""
    if low <= 0 <= high:
        return (
            f"With 95% confidence {names[1]} is between {abs(low):.1f} points below {names[0]} and {high:.1f} above it."
        )
    least, most = sorted((abs(low), abs(high)))
    ahead, behind = (names[1], names[0]) if low > 0 else (names[0], names[1])
    return f"With 95% confidence {ahead} is between {least:.1f} and {most:.1f} points above {behind}."


def _changes(run: RunRecord, rows: Rows) -> list[Change]:
    """What is compared, shares first: those of right answers."""
    shares, others = [], []
    for key in keys_of(rows):
        points = [value for _, value in series(rows, key)]
        if not points:
            continue
        before, after = (points[0] if len(points) > 1 else None), points[-1]
        share = _SHARE.fullmatch(key)
        if share is not None:
            intervals = [_interval(run, rows, share, at) for at in (0, -1)]
            known = None not in (before, *intervals)
            difference = difference_interval(before, intervals[0], after, intervals[1]) if known else None
            shares.append(Change(key, _label(share, run), True, before, after, *intervals, difference))
        elif (name := key.removeprefix("eval_")) in _PLAIN:
            others.append(Change(key, _PLAIN[name], False, before, after))
    order = {"reward": 0, "loss": 1, "mean_length": 2}
    others.sort(key=lambda change: order[change.key.removeprefix("eval_")])
    return shares + others


def _label(share: re.Match[str], run: RunRecord) -> str:
    of, name = share["stem"].removeprefix("eval_").rstrip("_"), "right answers, greedy"
    if share["name"] != "accuracy":
        name = f"right answers, mean of {share['name'].removeprefix('mean@')} samples"
        if "eval_temperature" in run.settings:
            name += f" at temperature {run.settings['eval_temperature']}"
    return f"{name} ({of})" if of else name


def _interval(run: RunRecord, rows: Rows, share: re.Match[str], at: int) -> Interval | None:
    """The 95% interval of a share: as it was logged, or from the number of questions; None: neither is known."""
    bounds = [series(rows, f"{share['stem']}interval/{share['name']}_{end}") for end in ("low", "high")]
    points = series(rows, share[0])
    if all(len(bound) == len(points) for bound in bounds):
        return bounds[0][at][1], bounds[1][at][1]
    questions = run.starts[-1].get("evaluation_rows") if run.starts else None
    if share["name"] == "accuracy" and share["stem"] == "eval_" and questions:
        return wilson_interval(points[at][1], questions)
    return None


def _subject(change: Change) -> str:
    if change.is_share:
        return "Right answers" if change.key.endswith("accuracy") else f"Right answers ({change.label})"
    return f"The {change.label} on held-out questions"


def _is(change: Change) -> str:
    return "are" if change.is_share else "is"


def _moved(change: Change) -> tuple[str, str]:
    """The sentence of the verdict, and its tone."""
    before, after = change.show(change.before), change.show(change.after)
    better = (change.after > change.before) != (change.key == "eval_loss")
    if before == after:
        return f"{_subject(change)} stayed at {after}", "same"
    if change.difference is not None and not change.sure:
        return f"{_subject(change)} went from {before} to {after}, which may be chance", "same"
    verb = "rose" if change.after > change.before else "fell"
    return f"{_subject(change)} {verb} from {before} to {after}", "better" if better else "worse"


def _detail(change: Change, first: int, last: int) -> str:
    when = "before training" if first == 0 else f"at step {first}, the first evaluation,"
    what = f"This compares the answers to held-out questions {when} with those after step {last}."
    if change.difference is not None:
        low, high = (f"{100 * bound:+.1f}" for bound in change.difference)
        return f"{what} The change lies between {low} and {high} points, with 95% confidence."
    if change.is_share:
        return f"{what} How sure that is can't be said, since the run did not log how many questions there were."
    return what


def _once(change: Change, step: int) -> str:
    between = ""
    if change.after_interval is not None:
        between = " (95% interval {} to {})".format(*map(change.show, change.after_interval))
    return f"There was one evaluation, after step {step}{between}, so there is nothing to compare it with."


def _without_evaluation(run: RunRecord) -> Verdict:
    """The verdict by what training steps have logged: the first tenth of the logs, or five of them, against the last.

    A change is named where the 95% interval of it, by the standard errors of both means, has no 0 in it.
    """
    rows = steps_of_training(run.rows)
    for key, name in (("reward", "mean reward"), ("loss", "loss")):
        values = [value for _, value in series(rows, key)]
        if len(values) < 4:
            continue
        width = min(len(values) // 2, max(5, len(values) // 10))
        first, last = values[:width], values[-width:]
        before, after = mean(first), mean(last)
        reach = 1.96 * (squared_error(first) + squared_error(last)) ** 0.5
        low, high = after - before - reach, after - before + reach
        detail = (
            "Nothing was evaluated, so this says nothing about questions that the model has not seen. The first "
            f"{width} and the last {width} of {len(values)} logs are compared: the change lies between {low:+.3g} and "
            f"{high:+.3g}, with 95% confidence."
        )
        if low <= 0 <= high:
            said = f"The {name} of training went from {before:.4g} to {after:.4g}, which may be chance"
            return Verdict(said, detail, "same", [])
        said = f"The {name} of training {'rose' if low > 0 else 'fell'} from {before:.4g} to {after:.4g}"
        return Verdict(said, detail, "better" if (low > 0) == (key == "reward") else "worse", [])
    steps = f"The run has logged {len(rows)} training step{'s' * (len(rows) != 1)} so far"
    return Verdict(steps, "That is too little to compare.", "unknown", [])
