"""Chooses which of the completions that a run kept its report shows."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from .completions import Completion, steps_of

MOST_MOMENTS = 4  # at which the same question is shown
# Questions shown of each kind, which their first and their last answer decide.
QUESTIONS = (4, 2, 2, 1)
KINDS = ("learned", "lost", "not learned", "kept")
MOST_SHOWN = 3  # of the best, of the worst, and of those that changed most


@dataclass(frozen=True)
class Question:
    """A question with its answers at several moments, oldest first."""

    kind: str  # one of KINDS
    question: str
    answer: str | None
    moments: list[Completion]


def same_questions(answers: Sequence[Completion]) -> tuple[dict[str, int], list[Question]]:
    """How many questions were learned, lost and so on, and some of each kind with their answers at some moments."""
    steps = steps_of(answers)
    counts = dict.fromkeys(KINDS, 0)
    if not steps:
        return counts, []
    last = len(steps) - 1
    most = min(MOST_MOMENTS, len(steps))
    shown_steps = {steps[round(i * last / max(1, most - 1))] for i in range(most)} if most > 1 else set(steps)
    by_question: dict[int, list[Completion]] = {}
    for answer in answers:
        by_question.setdefault(answer.number, []).append(answer)
    chosen: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    room = dict(zip(KINDS, QUESTIONS, strict=True))
    for of_one in by_question.values():
        of_one.sort(key=lambda answer: answer.step)
        if of_one[0].right != of_one[-1].right:
            kind = KINDS[0] if of_one[-1].right else KINDS[1]
        else:
            kind = KINDS[3] if of_one[-1].right else KINDS[2]
        counts[kind] += 1
        if len(chosen[kind]) < room[kind]:
            moments = [answer for answer in of_one if answer.step in shown_steps]
            chosen[kind].append(Question(kind, of_one[0].prompt, of_one[0].answer, moments))
    return counts, [question for kind in KINDS for question in chosen[kind]]


def best_and_worst(completions: Sequence[Completion]) -> tuple[list[Completion], list[Completion]]:
    """The completions with the highest and with the lowest reward, of the newest quarter of the steps that were kept.

    Each is of another prompt. Completions that are in both lists, as all rewards are equal, are in the first only.
    """
    steps = steps_of(completions)
    newest = set(steps[-max(1, len(steps) // 4) :])
    rewarded = [c for c in completions if c.step in newest and c.reward is not None]
    best = _of_other_prompts(sorted(rewarded, key=lambda c: -c.reward))
    worst = _of_other_prompts(sorted(rewarded, key=lambda c: c.reward))
    return best, [c for c in worst if c not in best]


def _of_other_prompts(completions: Sequence[Completion]) -> list[Completion]:
    first = {c.prompt: c for c in reversed(completions)}  # of each prompt the first one stays
    return [c for c in completions if first[c.prompt] is c][:MOST_SHOWN]


def most_changed(answers: Sequence[Completion], shown: Sequence[Question] = ()) -> list[tuple[Completion, Completion]]:
    """Answers to the same question at the first and the last evaluation that differ most: in reward, then in text.

    Args:
        shown: questions that are shown already, and left out here.
    """
    steps = steps_of(answers)
    if len(steps) < 2:
        return []
    known = {question.moments[0].number for question in shown if question.moments}
    first = {c.number: c for c in answers if c.step == steps[0] and c.number not in known}
    pairs = [(first[c.number], c) for c in answers if c.step == steps[-1] and c.number in first]

    def change(pair: tuple[Completion, Completion]) -> tuple[float, float]:
        before, after = pair
        by_reward = abs((after.reward or 0.0) - (before.reward or 0.0))
        alike = difflib.SequenceMatcher(None, before.text[:300], after.text[:300]).quick_ratio()
        return by_reward, 1 - alike

    return sorted((pair for pair in pairs if pair[0].text != pair[1].text), key=change, reverse=True)[:MOST_SHOWN]
