"""What follows when a reward function fails: its row is found and named, or groups are dropped, up to a bound."""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..data.rows import prompt_of
from .calling import Batch, Outcome
from .values import RAISED_BY_REWARDS, CompletionError, WholeCallError, name_of

logger = logging.getLogger(__name__)

SEARCH_SECONDS = 30.0  # for how long a function that has failed is called again, to find the completion
WINDOW = 100  # groups, the newest ones, of which a share may fail
SHOWN = 200  # characters of a prompt or completion in a message

Again = Callable[[Batch], Outcome]  # calls the function that has failed for a part of the batch


def error_of(function: Callable[..., Any], batch: Batch, outcome: Outcome, again: Again | None) -> Exception:
    """The error of a function that has failed, with a note that names function, row, prompt and completion.

    Args:
        again: the function is called again, to find the completion; None: it is not.
    """
    error, number, doubt = outcome.error, None, ""
    if isinstance(error, CompletionError):
        number = error.number
        named = ValueError(f"{batch.place(number // batch.group_size)}: {error}")
        named.__cause__ = error
        error = named
    elif error is None:
        number = outcome.bad()[0]
        error = ValueError(_not_finite(function, batch, outcome, number))
    elif again is not None and not isinstance(error, WholeCallError):
        number, doubt = _find(batch, again)
    where = f" for {batch.what}" if number is None else f" for {_shown(batch, number)}"
    error.add_note(f"{RAISED_BY_REWARDS}reward function {name_of(function)!r} failed{where}{doubt}")
    return error


def _find(batch: Batch, again: Again) -> tuple[int | None, str]:
    """Call a function again for each group alone, and for each completion of the first group that fails.

    Returns:
        the number of a completion for which it fails, or None, and what a message adds to that.
    """
    until = time.monotonic() + SEARCH_SECONDS
    for group in range(len(batch.rows)):
        if again(batch.of([group])).failed:
            numbers = batch.rows_of([group])
            for number in numbers:
                if time.monotonic() < until and again(batch.single(number)).failed:
                    return number, ""
            return numbers[0], f", or for another of the {len(numbers)} completions of this prompt"
        if time.monotonic() > until:
            return None, f". Called for one prompt after the other, it did not fail again in {SEARCH_SECONDS:.0f} s"
    return None, ". Called for each prompt alone, it did not fail again"


def _not_finite(function: Callable[..., Any], batch: Batch, outcome: Outcome, number: int) -> str:
    returned = f"reward function {name_of(function)!r} returned {outcome.values[number]!r}"
    return f"{batch.place(number // batch.group_size)}: {returned} for {batch.completions[number]!r:.{SHOWN}}"


def _shown(batch: Batch, number: int) -> str:
    """A completion for a message: its row, prompt and text, shortened."""
    group = number // batch.group_size
    prompt, completion = prompt_of(batch.rows[group]), batch.completions[number]
    return f"{batch.place(group)}: prompt {prompt!r:.{SHOWN}}, completion {completion!r:.{SHOWN}}"


# ---- dropping groups ----


def drop_failed(
    function: Callable[..., Any], batch: Batch, outcome: Outcome, again: Again, most: float
) -> tuple[list[float | None], dict[int, str]]:
    """Find the groups for which a function fails, and keep the values of the others.

    A function that raises is called again for each group alone. One that says by a `CompletionError` which completion
    it can't judge is called again for all the others together.

    Args:
        most: with more failed groups than this the run stops, so no others are looked for.

    Returns:
        B values, None in groups that failed, and for each of these what went wrong.
    """
    values: list[float | None] = [None] * len(batch.completions)
    columns: dict[str, list[Any]] = {}
    failed: dict[int, str] = {}

    def keep(part: Batch, groups: list[int], outcome: Outcome) -> None:
        numbers = batch.rows_of(groups)
        part.context.check_extra(len(numbers))
        for i, number in enumerate(numbers):
            values[number] = outcome.values[i]
            for name, column in part.context.extra.items():
                columns.setdefault(name, [None] * len(values))[number] = column[i]
        batch.context.add(part.context.metrics, {})
        for i in outcome.bad():
            failed.setdefault(groups[i // batch.group_size], _not_finite(function, part, outcome, i))

    left, part = list(range(len(batch.rows))), batch
    if outcome.error is None:  # what it logged is in the batch's context already
        for i in outcome.bad():
            failed.setdefault(i // batch.group_size, _not_finite(function, batch, outcome, i))
        values = list(outcome.values)
    while isinstance(outcome.error, CompletionError) and len(failed) <= most:
        i = outcome.error.number
        failed[left.pop(i // batch.group_size)] = f"{part.place(i // batch.group_size)}: {outcome.error}"
        if not left:
            break
        part = batch.of(left)
        outcome = again(part)
        if outcome.error is None:
            keep(part, left, outcome)
    if outcome.error is not None and not isinstance(outcome.error, CompletionError):
        for group in left:
            if len(failed) > most:
                break
            part = batch.of([group])
            outcome = again(part)
            if outcome.error is None:
                keep(part, [group], outcome)
            else:
                failed[group] = _reason(function, part, outcome.error)
    for number in batch.rows_of(list(failed)):
        values[number] = None
    batch.context.add({}, columns)
    return values, failed


def _reason(function: Callable[..., Any], part: Batch, error: Exception) -> str:
    number = error.number if isinstance(error, CompletionError) else 0
    what = f"{type(error).__name__}: {error}"
    return f"reward function {name_of(function)!r} failed ({what:.{SHOWN}}) for {_shown(part, number)}"


class ErrorBudget:
    """Counts the groups that are dropped since their rewards failed, and says when these are too many.

    They are too many when they are more than a share of the newest `WINDOW` groups, or of the newest rollout where that
    has more groups, or when none of an optimizer step is left. The count is not in checkpoints: it begins anew in a run
    that is resumed.

    Args:
        share: of groups that may fail, from 0 to 1.
        rollouts_of_a_step: how many rollouts of a step, without any group that is left, are too many.
    """

    def __init__(self, share: float, rollouts_of_a_step: int) -> None:
        self.share, self.rollouts_of_a_step = share, rollouts_of_a_step
        self._newest: deque[tuple[int, int]] = deque()  # how many groups failed, and of how many, in each rollout
        self._step, self._lost, self._has_groups = 0, 0, False  # of this step: rollouts; whether a group is left

    def left(self, num_groups: int) -> float:
        """How many groups of a rollout of so many may fail."""
        failed, groups = (sum(column) for column in zip((0, num_groups), *self._within(num_groups), strict=True))
        return self.share * max(WINDOW, groups) - failed

    def count(self, num_failed: int, num_groups: int, step: int = 0) -> str | None:
        """Count those of one more rollout of a step. Returns why these are too many; None: they are not."""
        if step != self._step:
            self._step, self._lost, self._has_groups = step, 0, False
        left = self.left(num_groups)
        self._newest = deque([*self._within(num_groups), (num_failed, num_groups)])
        self._lost += 1
        self._has_groups |= num_failed < num_groups
        if self._lost >= self.rollouts_of_a_step and not self._has_groups:
            return "no group of a whole step has rewards, so there is nothing to learn from"
        if num_failed > left:
            failed, groups = (sum(column) for column in zip(*self._newest, strict=True))
            return f"{failed} of the last {groups} groups have none, more than max_reward_errors={self.share:g} allows"
        return None

    def _within(self, num_groups: int) -> list[tuple[int, int]]:
        """The newest rollouts that are still counted beside one of so many groups."""
        kept, total = [], num_groups
        for failed, groups in reversed(self._newest):
            total += groups
            if total > WINDOW:
                break
            kept.insert(0, (failed, groups))
        return kept
