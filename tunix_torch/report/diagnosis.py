"""Names what the curves of a run show, with the lines of the metrics that say so, and what to try.

Each check is a pure function of the metrics, the settings and the completions that were kept. It states its bound and
why it is there. A run that learns as it should gives no finding.
"""

from collections.abc import Sequence

from ..learn.signs import MOST_KL, RATE, SIGNS, Streak
from .findings import Finding, Line
from .looked_for import LEAST_KL_LOGS, LEAST_LOGS
from .metrics import Points, Rows, mean, series, steps_of_training
from .record import RunRecord
from .suspects import (
    change_since,
    format_without_answers,
    held_out_keys,
    no_progress,
    reward_hacking,
    same_text,
)

# Logs that are looked at together: single batches are noisy. A run of fewer than so many is judged by all of its logs.
WINDOW = 20

RATE_TOO_HIGH = "learning rate too high"


def diagnose(run: RunRecord) -> list[Finding]:
    """All findings about a run, the most serious first. None: nothing was found."""
    rows = steps_of_training(run.rows)
    alike = collapse(rows), same_text(run.completions)
    broken, hacked = broke_at_once(run.rows), reward_hacking(run.rows)
    # what says why a policy that ended its answers at first does not do so any more
    cause = RATE_TOO_HIGH if broken else hacked.name if hacked else None
    found = (
        rate_too_high(rows, broken),
        kl_runs_away(rows),
        hacked,
        *alike,
        nothing_to_learn(rows, alike=any(alike)),
        cut_off(rows, cause),
        format_without_answers(rows),
    )
    known = [finding for finding in found if finding is not None]
    flat = None if known else no_progress(run.rows)
    return known if flat is None else [flat]


def without_findings(run: RunRecord) -> str:
    """What is to be said where nothing was found: that all is well, or that it is too early to tell."""
    logs = len(steps_of_training(run.rows))
    if logs >= LEAST_LOGS:
        return "Nothing was found: the curves show none of the troubles that were looked for."
    return f"Too early to tell: {logs} log{'s' * (logs != 1)} of training steps so far, and a trend takes {LEAST_LOGS}."


def nothing_to_learn(rows: Rows, alike: bool) -> Finding | None:
    """Groups whose rewards are all equal have an advantage of 0, so nothing is learned from them.

    Completions that are `alike`, as another finding says, can have equal rewards whatever the questions are.

    The bound is nine groups of ten, over the last WINDOW logs: then a step costs ten times what it teaches. Where nine
    of ten answers are right, half to three quarters of the groups of 4 are equal, and a run goes on learning from the
    others.
    """
    bound, key = 0.9, "frac_reward_zero_std"
    points, share = _recently(rows, key)
    if share < bound:
        return None
    rewards = series(rows, "reward")
    low, high = min(v for _, v in rewards), max(v for _, v in rewards)
    now = mean([value for _, value in rewards[-WINDOW:]])
    lines = [_line(points[0], key), _line(points[-1], key), Line(rewards[-1][0], "reward", rewards[-1][1])]
    look = "look at what your reward functions return for a right and for a wrong answer (reward_funcs)"
    part = "reward functions that give part of the reward for part of an answer (reward_funcs)"
    if alike:
        why = "This may follow from the finding before: completions that are alike have equal rewards"
        tries = ("what that finding says",)
    elif high > low and now - low > 0.9 * (high - low):
        why = "The reward is near the best it ever was, so the questions are probably solved"
        tries = ("harder questions (data_path)", "stop here: this adapter may be what you wanted")
    elif high == low != 0:
        why = f"The reward was {high:g} in every log, so the reward functions may give every completion the same"
        tries = (look, part)
    else:
        none = "No completion earned anything: the" if high == low else "The"
        why = f"{none} questions may be too hard, or the reward functions do not see a difference"
        easier = "easier questions (data_path), or a model that answers some of them already"
        tries = (easier, look, part) if high == low else (easier, part)
    return Finding(
        name="nothing to learn from",
        shows=f"In {share:.0%} of the groups of the last {len(points)} logs, all completions got the same reward: "
        f"these groups teach nothing. {why}.",
        lines=lines,
        tries=(
            *tries,
            "larger groups (num_completions_per_prompt) or a higher generation_temperature, so that completions differ",
            "dynamic_sampling true, which replaces such groups by those of other questions",
        ),
    )


def cut_off(rows: Rows, cause: str | None) -> Finding | None:
    """Completions that have no end when generation_max_length is reached are scored without their answer.

    The cause is the finding, by its name, that explains why a policy that ended its answers at first no longer does.

    The bound is a quarter of the completions, over the last WINDOW logs: in a group of 4 then one completion, on
    average, is judged by how long it is and not by what it says.
    """
    bound, key = 0.25, "completions/clipped_ratio"
    points, share = _recently(rows, key)
    if share < bound:
        return None
    lengths = series(rows, "completions/mean_length")
    grew = ""
    if lengths and lengths[-1][1] > 1.2 * lengths[0][1]:
        grew = f", and completions grew from {lengths[0][1]:.0f} to {lengths[-1][1]:.0f} tokens"
    first = series(rows, key)[0]
    follows = cause is not None and first[1] < bound
    why = f" At first they had one, so this may follow from another finding: {cause}." if follows else ""
    seen = {first: None, points[0]: None, max(points, key=lambda p: p[1]): None}
    return Finding(
        name="cut-off completions",
        shows=f"{share:.0%} of the completions of the last {len(points)} logs had no end when they reached "
        f"generation_max_length{grew}.{why}",
        lines=[_line(point, key) for point in seen]
        + [Line(step, "completions/mean_length", value) for step, value in lengths[-1:]],
        tries=(f"what the finding says that explains it: {cause}",)
        if follows
        else (
            "a larger generation_max_length",
            "overlong_buffer_length and overlong_penalty, which make length cost reward before the end is reached",
            "mask_truncated_completions true, so that nothing is learned from completions without an end",
            "a system_message that asks for less",
        ),
    )


def rate_too_high(rows: Rows, broken: tuple[Line, Line] | None) -> Finding | None:
    """Steps that were skipped, a KL that jumps, or a reward that is lost again, or lost at once, see `broke_at_once`.

    A step is skipped when its loss or gradient is not finite: one may be bad luck, two are a pattern. The KL jumps
    where one log has ten times the median of the ten before it and more than 0.1 nats a token: an update then moved the
    policy more than all before it. Three jumps count, since an estimate of the KL has a heavy tail. The reward is lost
    where the mean of the last WINDOW logs is below half of the way from the lowest to the best such mean, and by more
    than six standard errors. With any of these, gradients above ten times the median so far are named too; alone they
    are common, since they are clipped by max_grad_norm.
    """
    lines: list[Line] = []
    said = []
    skipped = series(rows, "skipped_steps")
    if skipped and skipped[-1][1] >= 2:
        said.append(f"{skipped[-1][1]:.0f} steps were skipped, since their loss or gradient was not finite")
        lines.append(_line(skipped[-1], "skipped_steps"))
    jumps = _jumps(series(rows, "kl"), 10.0, 0.1)
    if len(jumps) >= 3:
        said.append(f"the KL from the reference policy jumped {len(jumps)} times")
        lines += [_line(point, "kl") for point in jumps[:3]]
    lost = _lost_reward(rows)
    if broken is not None:
        before, now = broken
        said.append(
            f"the reward fell from {before.value:.3g} in the first log to {now.value:.3g}, and did not come back"
        )
        lines += broken
    elif lost is not None:
        best, now = lost
        said.append(f"the mean reward rose to {best.value:.3g} and then fell to {now.value:.3g}")
        lines += [best, now]
    if not said:
        return None
    norms = _jumps(series(rows, "grad_norm"), 10.0, 0.0)
    if norms:
        said.append(f"{len(norms)} gradients were ten times as large as those before")
        lines += [_line(point, "grad_norm") for point in norms[:2]]
    return Finding(
        name=RATE_TOO_HIGH,
        shows=_sentence(said),
        lines=lines,
        tries=(
            RATE,
            "warmup_steps, so that the first steps are small",
            "more prompts a step (per_device_train_batch_size, gradient_accumulation_steps), whose gradient has less "
            "noise",
        ),
    )


def broke_at_once(rows: Rows) -> tuple[Line, Line] | None:
    """The reward of the first log, which the policy earned before it learned, and the mean of the last WINDOW logs,
    where learning has only cost reward.

    No log of the last WINDOW reaches the first one, and held-out answers are surely right less often than at first.
    Where there are no evaluations, half of the first reward is lost, by more than six standard deviations of single
    logs, and by more than one of the completions of the first log: a first reward that hardly a completion earned may
    be chance.
    """
    points = series(steps_of_training(rows), "reward")
    if len(points) <= LEAST_LOGS:
        return None
    first, last = points[0], points[1:][-WINDOW:]
    values = [value for _, value in last]
    now = mean(values)
    spread = (sum((value - now) ** 2 for value in values) / len(values)) ** 0.5
    held_out = [key for key in held_out_keys(rows) if len(series(rows, key)) >= 2]
    of_first = max(dict(series(rows, "reward_std")).get(first[0], 0.0), abs(first[1]) / 2)
    fell = (
        any(change_since(rows, key, 0)[1] < 0 for key in held_out)
        if held_out
        else first[1] - now > max(6 * spread, of_first)
    )
    if max(values) >= first[1] or not fell:
        return None
    return _line(first, "reward"), Line(last[-1][0], "reward", now, len(last))


def kl_runs_away(rows: Rows) -> Finding | None:
    """The policy goes further and further from the reference.

    The bound is a mean of half of MOST_KL, 0.5 nats a token, over the last WINDOW logs, with that mean still growing:
    above 1.5 times the one before. A run that learns stays below it as a rule; above MOST_KL text is likely to be
    broken, so that there no growth is needed. Without a KL penalty no KL is logged, and nothing is said.
    """
    points = series(rows, "kl")
    if len(points) < LEAST_KL_LOGS:
        return None
    width = min(WINDOW, len(points) // 2)
    before = mean([value for _, value in points[-2 * width : -width]])
    now = mean([value for _, value in points[-width:]])
    if not (now > MOST_KL or (now > MOST_KL / 2 and now > 1.5 * before)):
        return None
    return Finding(
        name="KL running away",
        shows=f"The KL from the reference policy was {now:.3g} nats a token over the last {width} logs, and "
        f"{before:.3g} over the {width} before. Runs that learn stay below {MOST_KL / 2:g} as a rule; above "
        f"{MOST_KL:g} text is likely to be broken.",
        lines=[_line(points[0], "kl"), _line(points[-width], "kl"), _line(points[-1], "kl")],
        tries=("a larger kl_penalty_coef", RATE, "fewer num_iterations over the same rollout", "an earlier checkpoint"),
    )


def collapse(rows: Rows) -> Finding | None:
    """The policy no longer tries anything else, or ends at once: the signs of `learn/signs.py`, which a run warns of.

    The bounds of entropy and length are given there, and how many steps in a row they must hold.
    """
    said, lines = [], []
    for sign in SIGNS:
        if sign.name not in ("entropy", "empty completions"):
            continue  # the others have findings of their own
        streak = None
        for step, value in series(rows, sign.metric):
            if not sign.holds(value):
                streak = None
                continue
            streak = streak or Streak(step, step, value, value)
            streak.last, streak.least, streak.most = step, min(streak.least, value), max(streak.most, value)
            if streak.steps >= sign.steps:
                said.append(sign.saw.format(least=streak.least, most=streak.most) + f", which means that {sign.means}")
                lines += [Line(streak.first, sign.metric, streak.most), Line(step, sign.metric, value)]
                break
    if not said:
        return None
    return Finding(
        name="collapse",
        shows=_sentence(said),
        lines=lines,
        tries=(
            "a checkpoint from before it began",
            "an entropy bonus (entropy_coef, use_adaptive_entropy) or a larger kl_penalty_coef",
            "a higher epsilon_high, so that rare tokens may become more likely",
            RATE,
        ),
    )


def _recently(rows: Rows, key: str) -> tuple[Points, float]:
    """The values of the last WINDOW logs that have this key, and their mean; 0 where these are too few to tell."""
    points = series(rows, key)[-WINDOW:]
    return points, mean([value for _, value in points]) if len(points) >= LEAST_LOGS else 0.0


def _line(point: tuple[int, float], key: str) -> Line:
    return Line(point[0], key, point[1])


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def _jumps(points: Sequence[tuple[int, float]], times: float, least: float) -> list[tuple[int, float]]:
    """The points above `least` that are so many times the median of the ten before them."""
    found = []
    for i in range(LEAST_LOGS, len(points)):
        before = sorted(value for _, value in points[max(0, i - 10) : i])
        if points[i][1] > max(least, times * before[len(before) // 2]):
            found.append(points[i])
    return found


def _lost_reward(rows: Rows) -> tuple[Line, Line] | None:
    """The best mean of the reward and the last one, each with its last step, where the last one has lost it again."""
    points = series(rows, "reward")
    if len(points) < 2 * WINDOW:
        return None
    values = [value for _, value in points]
    means = [mean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]
    at = max(range(len(means)), key=means.__getitem__)
    best, now, window = means[at], means[-1], values[at : at + WINDOW]
    error = (sum((v - best) ** 2 for v in window) / (WINDOW - 1) / WINDOW) ** 0.5
    if best - now <= max(0.5 * (best - min(means)), 6 * error) or min(means[at:]) == max(means):
        return None
    return Line(points[at + WINDOW - 1][0], "reward", best, WINDOW), Line(points[-1][0], "reward", now, WINDOW)
