"""Groups the answers to one question into classes of equal answers, for the majority vote maj@k."""

import inspect
import time
from collections.abc import Iterator, Sequence

from ..data.rows import ANSWER_COLUMNS, Row, with_answer
from ..rewarding.scoring import RewardFunc, call_rewards, name_of
from .answers import is_right

_Answer = tuple[str, bool]  # the text of an answer, and whether the completions that give it are right


def takes_answer(judge: RewardFunc) -> bool:
    """Whether a reward function has a parameter for the expected answer. Uses of `**columns` can't be seen."""
    return not set(ANSWER_COLUMNS).isdisjoint(inspect.signature(judge).parameters)


def votes_by_class(
    rows: Sequence[Row],
    completions: Sequence[Sequence[str]],
    extracted: Sequence[Sequence[str | None]],
    right: Sequence[Sequence[bool]],
    judge: RewardFunc,
    timeout: float | None = None,
    started: float | None = None,
) -> list[list[str | None]]:
    """The vote of each of K completions of each of N questions, equal for equal answers, for `estimators.maj_at_k`.

    Answers are equal by the judge that decides what is right: with `math_equal`, 1/2 and 0.5 are one answer; with
    `correctness`, 5 miles and 5 km are two. Classes are formed in the order in which completions appear. A completion
    joins the first class that fits: its members are right if the completion is right, and wrong if it is wrong; and its
    first member has the same answer text, or the judge calls the completion right with that text as the expected
    answer. The judge alone does not keep right and wrong answers apart, because its equality need not be symmetric:
    `math_equal` takes 85 where 47 + 38 is expected, but not the other way round.

    Args:
        extracted: the answer in each completion; a completion with None or a blank text has no vote.
        right: whether each completion is right, by the question's own expected answer.
        judge: a reward function that takes the expected answer, see `takes_answer`. It judges at most K * (K - 1) / 2
            completions of a question, and many questions in one call.
        timeout, started: the time limit of all of these calls together, see `call_rewards`.

    Returns:
        N lists of K votes; a vote is the answer text of the first member of its class.

    Raises:
        ValueError: the judge can't take a completion's answer for the expected one; see also `call_rewards`.
    """
    started = time.monotonic() if started is None else started
    answers: list[list[_Answer | None]] = []
    votes: list[dict[_Answer, str]] = [{} for _ in rows]  # for each question: answer -> text of the first of its class
    unclassed: list[dict[_Answer, str]] = [{} for _ in rows]  # answers without a class -> a completion that gives it
    for i, row in enumerate(extracted):
        texts = [" ".join((text or "").split()) for text in row]
        answers.append([(text, verdict) if text else None for text, verdict in zip(texts, right[i], strict=True)])
        for answer, completion in zip(answers[i], completions[i], strict=True):
            if answer is not None:
                unclassed[i].setdefault(answer, completion)
    while any(unclassed):
        # Each round begins a new class for every question, and asks which other answers belong to it.
        candidates = list(_begin_classes(votes, unclassed))
        asked = [with_answer(rows[i], first) for i, first, _ in candidates]
        texts = [unclassed[i][answer] for i, _, answer in candidates]
        values = _judge(judge, asked, texts, timeout, started)
        for (i, first, answer), value in zip(candidates, values, strict=True):
            if is_right(value):
                votes[i][answer] = first
                del unclassed[i][answer]
    return [[None if answer is None else votes[i][answer] for answer in row] for i, row in enumerate(answers)]


def _begin_classes(
    votes: list[dict[_Answer, str]], unclassed: list[dict[_Answer, str]]
) -> Iterator[tuple[int, str, _Answer]]:
    """Make the first answer without a class the first of a new one, in each question that has such an answer.

    Yields:
        (question, text of the first answer, another answer that may belong to the class), for all other answers
        without a class that are right if the first is right, and wrong if it is wrong.
    """
    for i, without_class in enumerate(unclassed):
        if not without_class:
            continue
        first = next(iter(without_class))
        votes[i][first] = first[0]
        del without_class[first]
        yield from [(i, first[0], answer) for answer in without_class if answer[1] == first[1]]


def _judge(
    judge: RewardFunc, rows: Sequence[Row], completions: Sequence[str], timeout: float | None, started: float
) -> list[float | None]:
    """The judge's value for each completion, by the expected answer of its row."""
    if not rows:
        return []
    try:
        return call_rewards([judge], rows, completions, timeout, started=started)[0]
    except Exception as error:  # the judge may see here for the first time an expected answer that it can't read
        shown = f"{name_of(judge)!r}, asked for maj@K whether a completion equals another one, whose answer is expected"
        raise ValueError(f"judge {shown}, raised {type(error).__name__}: {error}") from error
