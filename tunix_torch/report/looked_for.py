"""Says which troubles the diagnosis could look for in a run, and of which the numbers were not logged, and why.

A check without its numbers finds nothing. That must not read as if it had looked.
"""

from collections.abc import Callable
from dataclasses import dataclass

from .completions import steps_of
from .metrics import keys_of, series, steps_of_training
from .record import RunRecord
from .suspects import LEAST_FLAT_LOGS, LEAST_LAYOUT_LOGS, held_out_keys, layout_and_right

# Logs of a number of training steps that a trend takes. A KL that grows is compared with the KL before.
LEAST_LOGS = 5
LEAST_KL_LOGS = 2 * LEAST_LOGS


@dataclass(frozen=True)
class Looked:
    """What a diagnosis could look for.

    Attributes:
        names: the troubles that were looked for, each as a phrase.
        missing: the others, each as a sentence that says which number is not there, and why.
    """

    names: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def as_lines(self) -> list[str]:
        """Both lists for a terminal; no lines where nothing was judged yet."""
        lines = [f"Looked for: {', '.join(self.names)}."] if self.names else []
        return lines + [f"Could not be looked for: {text}" for text in self.missing]


def looked_for(run: RunRecord) -> Looked:
    """The troubles that could be looked for in a run. Before LEAST_LOGS logs of training steps there are none."""
    if len(steps_of_training(run.rows)) < LEAST_LOGS:
        return Looked()
    names, missing = [_rate(run)], []
    for name, why_not in _NEEDS.items():
        reason = why_not(run)
        if reason is None:
            names.append(name)
        else:
            missing.append(f"{name} ({reason}).")
    return Looked(tuple(names), tuple(missing))


def why_no_kl(run: RunRecord) -> str | None:
    """Why a run has logged no KL from the reference policy, such as "not logged, since kl_penalty_coef is 0".

    None: it has logged one.
    """
    if series(run.rows, "kl"):
        return None
    settings = run.settings
    reasons = (
        ("use_grpo", False, f"{run.method} samples no completions"),
        ("kl_penalty_coef", 0.0, "kl_penalty_coef is 0"),
        ("use_kl_penalty", False, "use_kl_penalty is false"),
        ("algorithm", "dapo", "the algorithm dapo has no KL penalty"),
    )
    for name, value, words in reasons:
        if name in settings and settings[name] == value:
            return f"not logged, since {words}"
    return "not logged, since a teacher replaces the KL penalty" if settings.get("teacher") else "not logged"


def curves_not_there(run: RunRecord) -> list[str]:
    """Of the curves that a reader will miss, why they are not there, each as a sentence."""
    said = []
    if not held_out_keys(run.rows) and not series(run.rows, "eval_loss"):
        said.append("Right answers: no evaluation was logged.")
    no_kl = why_no_kl(run)
    if no_kl is not None and run.settings.get("use_grpo", bool(series(run.rows, "reward"))):
        said.append(f"KL from the reference: {no_kl}.")
    return said


# ---- what each check needs ----


def _rate(run: RunRecord) -> str:
    """A rate that is too high shows in several numbers. Skipped steps are counted in every run."""
    numbers = [words for key, words in (("reward", "the reward"), ("kl", "the KL")) if _few(run, key) is None]
    by = [*numbers, "skipped steps"]
    return f"a learning rate that is too high (by {', '.join(by[:-1])}{' and ' if by[1:] else ''}{by[-1]})"


def _few(run: RunRecord, key: str, least: int = LEAST_LOGS) -> str | None:
    """Why the numbers under a key are not enough; None: they are."""
    logs = len(series(steps_of_training(run.rows), key))
    if logs >= least:
        return None
    if logs:
        return f"{key}: {logs} logs, and this takes {least}"
    return f"{key}: {_not_sampled(run) or 'not logged'}"


def _not_sampled(run: RunRecord) -> str | None:
    if run.settings.get("use_grpo", True):
        return None
    return f"not logged, since {run.method} samples no completions"


def _kl(run: RunRecord) -> str | None:
    no_kl = why_no_kl(run)
    return f"KL: {no_kl}" if no_kl is not None else _few(run, "kl", LEAST_KL_LOGS)


def _hacking(run: RunRecord) -> str | None:
    no_reward = _few(run, "reward")
    if no_reward is not None:
        return no_reward
    keys = held_out_keys(run.rows)
    if any(len(series(run.rows, key)) >= 2 for key in keys):
        return None
    if keys or any("eval_runtime" in row for row in run.rows):
        return "right answers to held-out questions: two evaluations are needed"
    if layout_and_right(keys_of(run.rows))[1] is None:
        return "right answers: there was no evaluation, and no reward function is called correctness or the like"
    return None


def _collapse(run: RunRecord) -> str | None:
    few = [_few(run, key) for key in ("entropy", "completions/mean_length")]
    return None if None in few else few[0]


def _repetition(run: RunRecord) -> str | None:
    if steps_of(run.completions):
        return None
    return f"completions: {(_not_sampled(run) or 'not kept').replace('logged', 'kept')}"


def _layout(run: RunRecord) -> str | None:
    if sampled := _not_sampled(run):
        return f"rewards: {sampled}"
    layout, right = layout_and_right(keys_of(run.rows))
    if layout is None or right is None:
        return "rewards: this takes two functions, one whose name has format in it, and one for right answers"
    return _few(run, layout, LEAST_LAYOUT_LOGS) or _few(run, right, LEAST_LAYOUT_LOGS)


# Each trouble with the function that says why it can't be looked for; None: it can.
_NEEDS: dict[str, Callable[[RunRecord], str | None]] = {
    "a KL that runs away": _kl,
    "a reward that pays for the wrong thing": _hacking,
    "a collapse": _collapse,
    "repetition": _repetition,
    "groups without a signal": lambda run: _few(run, "frac_reward_zero_std"),
    "completions that are cut off": lambda run: _few(run, "completions/clipped_ratio"),
    "a layout that is learned without the answers": _layout,
    "a reward that does not rise": lambda run: (
        _few(run, "reward", LEAST_FLAT_LOGS) or _few(run, "frac_reward_zero_std")
    ),
}
