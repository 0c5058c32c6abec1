"""Checks of trends: a reward that pays for the wrong thing or does not rise, and completions that are all the same."""

import zlib
from collections import Counter
from collections.abc import Sequence

from ..evals.estimators import difference_interval
from .completions import Completion, steps_of
from .findings import Finding, Line
from .metrics import Points, Rows, keys_of, mean, series, squared_error, steps_of_training

WIDTH = 20  # logs whose mean is the reward at the time of an evaluation
LEAST_LONG = 4  # long completions; the share of fewer says nothing
LEAST_LAYOUT_LOGS = 10  # of both rewards, for a layout that is learned without the answers
LEAST_FLAT_LOGS = 30  # of the reward, for one that does not rise
ERRORS = 3.0  # by so many standard errors a mean must have changed


def reward_hacking(rows: Rows) -> Finding | None:
    """The reward rises while held-out answers become worse, or while the part of the reward for right answers falls.

    Held-out answers have become worse where the last accuracy is below the best earlier one and the 95% interval of
    their difference has no 0 in it; where a run logged no intervals, by more than 5 points. The reward has risen where
    its mean over WIDTH logs is higher by ERRORS standard errors of both means: 3, since a run has many evaluations to
    compare. Without a judge the function for right answers stands in for one: it must have fallen by ERRORS standard
    errors.
    """
    training = steps_of_training(rows)
    reward = series(training, "reward")
    for key in held_out_keys(rows):
        found = _held_out(rows, key, reward)
        if found is not None:
            return found
    right = _right_answers(keys_of(training))
    values = [] if right is None else series(training, right)
    if not any("eval_runtime" in row for row in rows) and _moved(values) < 0 and _moved(reward) > 0:
        return _hacked(
            f"The reward rose while {right} fell: completions are paid for something else than right answers.",
            [*_ends(reward, "reward"), *_ends(values, right)],
        )
    return None


def _held_out(rows: Rows, key: str, reward: Points) -> Finding | None:
    points = series(rows, key)
    if len(points) < 2:
        return None
    at = max(range(len(points) - 1), key=lambda i: points[i][1])
    (then, best), (now, last) = points[at], points[-1]
    earlier, later = _up_to(reward, then), _up_to(reward, now)
    if not (last < best and change_since(rows, key, at)[1] < 0 and _difference(*map(_values, (earlier, later))) > 0):
        return None
    lines = [Line(then, key, best), Line(now, key, last)]
    lines += [_mean_line(earlier, "reward"), _mean_line(later, "reward")]
    shows = (
        f"The mean reward rose from {lines[2].value:.3g} to {lines[3].value:.3g} between the steps {then} and {now}, "
        f"while the share of right answers to held-out questions fell from {best:.1%} to {last:.1%}."
    )
    return _hacked(shows, lines)


def _hacked(shows: str, lines: Sequence[Line]) -> Finding:
    return Finding(
        name="reward hacking suspected",
        shows=shows,
        lines=lines,
        tries=(
            "read the completions with the highest reward: what do they have that right answers need not have?",
            "a smaller weight for that part of the reward (reward_weights), or a function that can't be gamed so "
            "(docs/rewards.md says by what each can be)",
            "a larger kl_penalty_coef",
            "load_best_model_at_end true, which keeps the model of the best evaluation",
        ),
    )


def format_without_answers(rows: Rows) -> Finding | None:
    """The layout of answers is learned, and right answers are not.

    The function for the layout must end, over the last WIDTH logs, at 0.9 of its best log, and have risen by 0.2 since
    the first WIDTH. Right answers must have risen by less than 0.05, and be below half of what is possible there: both
    functions give at most 1. With a run of fewer than 2 WIDTH logs, halves of it are compared.
    """
    layout, right = layout_and_right(keys_of(rows))
    if layout is None or right is None:
        return None
    laid_out, answered = series(rows, layout), series(rows, right)
    if min(len(laid_out), len(answered)) < LEAST_LAYOUT_LOGS:
        return None
    (first, last), (before, now) = map(_first_and_last, (laid_out, answered))
    learned = last >= 0.9 * max(value for _, value in laid_out) and last - first >= 0.2
    if not learned or now - before >= 0.05 or now >= 0.5:
        return None
    return Finding(
        name="format learned, answers not",
        shows=f"{layout} rose from {first:.2f} to {last:.2f}, while {right} went from {before:.2f} to {now:.2f}: the "
        "policy writes answers in the right layout, which are not right more often.",
        lines=[*_ends(laid_out, layout), *_ends(answered, right)],
        tries=(
            "a smaller weight for the layout (reward_weights), since it is learned",
            "easier questions, or more completions a question (num_completions_per_prompt), so that some are right",
            "supervised fine-tuning on worked answers first (use_grpo false), then GRPO on its adapter (model_name)",
            "a longer run: answers are learned more slowly than a layout",
        ),
    )


def no_progress(rows: Rows) -> Finding | None:
    """Nothing has changed, though there is something to learn from. To be asked where no other finding explains it.

    The mean reward of the last WIDTH logs is within one standard error of that of the first WIDTH, or below; the last
    accuracy of each evaluation set is not surely above the first; and the questions are not solved: fewer than half of
    the groups have equal rewards, or fewer than half of all held-out answers are right. Fewer than LEAST_FLAT_LOGS logs
    prove nothing.
    """
    training = steps_of_training(rows)
    reward, equal = series(training, "reward"), series(training, "frac_reward_zero_std")
    held_out = [series(rows, key) for key in held_out_keys(rows)]
    solved = not held_out or max(points[-1][1] for points in held_out) >= 0.5
    if len(reward) < LEAST_FLAT_LOGS or not equal or (solved and mean(_values(equal)) >= 0.5):
        return None
    width = min(WIDTH, len(reward) // 2)
    first, last = _values(reward)[:width], _values(reward)[-width:]
    error = (squared_error(first) + squared_error(last)) ** 0.5
    if mean(last) - mean(first) > error or any(change_since(rows, key, 0)[0] > 0 for key in held_out_keys(rows)):
        return None
    unmoved = any(len(points) > 2 and len(set(_values(points))) == 1 for points in held_out)
    return Finding(
        name="no progress",
        shows=f"The mean reward was {mean(first):.3g} in the first {width} logs and {mean(last):.3g} in the last ones: "
        f"it has not risen by more than chance explains, though {1 - mean(_values(equal)):.0%} of the groups have "
        "completions of different rewards, from which the policy can learn."
        + " All evaluations gave the same share of right answers, so the policy may hardly have moved."
        * unmoved,
        lines=[_mean_line(reward[:width], "reward"), _mean_line(reward[-width:], "reward")],
        tries=(
            f"a larger learning_rate ({'ten times and more' if unmoved else 'three to ten times'})",
            "more steps: a small change hides in the noise of single batches",
            "more prompts a step, or larger groups (num_completions_per_prompt), whose rewards are less noisy",
            "a larger max_grad_norm, where grad_norm is above it in nearly every step",
            "easier questions first (data_path), or supervised fine-tuning (use_grpo false)",
        ),
    )


def same_text(completions: Sequence[Completion]) -> Finding | None:
    """Completions that say the same whatever was asked, or that repeat themselves.

    The last step that was kept is looked at. Of its completions to different prompts, at least half are the same text,
    and at the first step that was kept they were half as many at most: answers such as "B" are alike by nature, but
    from the start. Or in a fifth of the completions of at least 200 characters, of which there must be LEAST_LONG,
    zlib needs less than 15% of their length: of prose and of worked answers of this length it needs two thirds and
    more, of a sentence that is said ten times 13%.
    """
    steps = steps_of(completions)
    if not steps:
        return None
    first, last = ([c for c in completions if c.step == step] for step in (steps[0], steps[-1]))
    same, before = _share_of_commonest(last), _share_of_commonest(first)
    long = [c.text for c in last if len(c.text) >= 200]
    loops = sum(_packed(text) < 0.15 for text in long) / len(long) if len(long) >= LEAST_LONG else 0.0
    if len(steps) > 1 and same >= 0.5 and before <= same / 2:
        shows = f"{same:.0%} of the completions to different questions are the same text; at first {before:.0%} were."
        lines = [Line(steps[0], "completions: share of the commonest", before)]
        lines.append(Line(steps[-1], "completions: share of the commonest", same))
    elif loops >= 0.2:
        shows = f"{loops:.0%} of the long completions repeat themselves over and over."
        lines = [Line(steps[-1], "completions: share that repeat themselves", loops)]
    else:
        return None
    return Finding(
        name="repetition",
        shows=shows,
        lines=lines,
        tries=(
            "an entropy bonus (entropy_coef) or a larger kl_penalty_coef",
            "a lower learning_rate (a tenth)",
            "repetition_penalty a little above 1",
            "a reward function that does not pay for this text (reward_funcs)",
        ),
    )


def _share_of_commonest(completions: Sequence[Completion]) -> float:
    """Of the prompts of a step, the share that got the commonest text at least once; 0 with fewer than 4 prompts."""
    texts = {(c.prompt, c.text.strip()) for c in completions}
    prompts = {prompt for prompt, _ in texts}
    if len(prompts) < 4:
        return 0.0
    return Counter(text for _, text in texts).most_common(1)[0][1] / len(prompts)


def _packed(text: str) -> float:
    raw = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(raw, 6)) / len(raw)


def held_out_keys(rows: Rows) -> list[str]:
    """The keys under which evaluations logged the share of right answers to held-out questions."""
    keys = [key for key in keys_of(rows) if key.startswith("eval_") and key.endswith("accuracy")]
    return [key for key in keys if series(rows, key)]


def layout_and_right(keys: Sequence[str]) -> tuple[str | None, str | None]:
    """Among keys of metrics, the mean reward for the layout of answers and that for right answers; None: no such."""
    names = [key for key in keys if key.startswith("rewards/") and key.endswith("/mean")]
    layout, right = next((key for key in names if "format" in key), None), _right_answers(names)
    return (None, right) if layout == right else (layout, right)


def _right_answers(names: Sequence[str]) -> str | None:
    """The reward function that tells right answers from wrong ones, by its name."""
    for word in ("correct", "math_equal", "exact", "answer", "accuracy"):
        for name in names:
            if name.startswith("rewards/") and name.endswith("/mean") and word in name.lower():
                return name
    return None


def change_since(rows: Rows, key: str, at: int) -> tuple[float, float]:
    """By how much the last accuracy differs from an earlier one: the 95% interval; where a run logged no intervals, 5
    points to both sides."""
    points, stem = series(rows, key), key.removesuffix("accuracy")
    low, high = (series(rows, f"{stem}interval/accuracy_{end}") for end in ("low", "high"))
    if len(low) != len(points) or len(high) != len(points):
        change = points[-1][1] - points[at][1]
        return change - 0.05, change + 0.05
    intervals = [(low[i][1], high[i][1]) for i in (at, -1)]
    return difference_interval(points[at][1], intervals[0], points[-1][1], intervals[1])


def _up_to(points: Points, step: int) -> Points:
    """The last WIDTH logs up to a step; where it is at the start of the run, its first logs."""
    before = [(at, value) for at, value in points if at <= step][-WIDTH:]
    return before if len(before) >= 5 else points[:WIDTH]


def _values(points: Points) -> list[float]:
    return [value for _, value in points]


def _mean_line(points: Points, key: str) -> Line:
    return Line(points[-1][0], key, mean(_values(points)), len(points))


def _difference(first: Sequence[float], last: Sequence[float]) -> float:
    """By how much the mean has changed, or 0 where that is less than ERRORS standard errors."""
    if min(len(first), len(last)) < 5:
        return 0.0
    error = (squared_error(first) + squared_error(last)) ** 0.5
    change = mean(last) - mean(first)
    return change if abs(change) > ERRORS * error else 0.0


def _moved(points: Points) -> float:
    """The change of the mean from the first WIDTH logs to the last ones, or 0 where it may be chance."""
    width = min(WIDTH, len(points) // 2)
    values = _values(points)
    return _difference(values[:width], values[-width:]) if width else 0.0


def _first_and_last(points: Points) -> tuple[float, float]:
    width = min(WIDTH, len(points) // 2)
    values = _values(points)
    return mean(values[:width]), mean(values[-width:])


def _ends(points: Points, key: str) -> list[Line]:
    return [Line(step, key, value) for step, value in (points[0], points[-1])]
