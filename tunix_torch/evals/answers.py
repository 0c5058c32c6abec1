"""Answer questions whose answers are known: sample batch by batch, and judge."""

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.prompts import Collator, decode_completions
from ..data.rows import ANSWER_COLUMNS, Row, with_answer
from ..rewarding.scoring import RewardFunc, call_rewards, name_of
from ..rollout.sampler import Sampler, SamplingParams, draw_uniforms
from ..runtime import device, together

RIGHT = 1.0  # an answer is right where the judging reward function's value is at least this


@dataclass
class Answers:
    """Sampled answers to N questions, k each; `right[n][i]` says whether completion i of question n is right."""

    completions: list[list[str]]
    right: list[list[bool]]
    lengths: list[list[int]]  # tokens

    @property
    def accuracy(self) -> float:
        """Share of right completions: pass@1 when greedy, mean@k when k were sampled."""
        flat = [value for row in self.right for value in row]
        return sum(flat) / len(flat)

    @property
    def mean_length(self) -> float:
        flat = [value for row in self.lengths for value in row]
        return sum(flat) / len(flat)


def rows_at_once(num_rows: int, batch_size: int, num_completions: int) -> int:
    """How many questions one batch of `sample_batches` holds."""
    return min(num_rows, max(1, batch_size // num_completions))


def sample_batches(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    params: SamplingParams,
    collator: Collator,
    batch_size: int,
    num_completions: int = 1,
    seed: int = 0,
    start: int = 0,
    number: int = 0,
) -> Iterator[tuple[list[list[str]], list[list[int]]]]:
    """Sample `num_completions` completions for each of N rows, a batch at a time.

    Args:
        rows: N dicts from `prepare_rows`, of which the tokens are needed.
        batch_size: completions at a time; all batches have the same shape (the last is filled up by repeating a row).
            The completions of a question are drawn in several goes when there are more.
        start: leave out so many rows; a multiple of `rows_at_once`, so that the other batches are the same as without.
        number: of the first row, where `rows` are a part of more: a row's random numbers depend on its number.

    Yields:
        for each row of a batch its completions as texts, without special tokens, and their lengths in tokens.
    """
    at_once = rows_at_once(len(rows), batch_size, num_completions)
    copies = min(num_completions, batch_size)  # of each row, in one go
    target = device.torch_device()
    assert start % at_once == 0, (start, at_once)
    for first in range(start, len(rows), at_once):
        part = list(rows[first : first + at_once])
        batch = collator(part + [part[-1]] * (at_once - len(part)))
        prompt_ids, prompt_mask = batch["prompt_ids"].to(target), batch["prompt_mask"].to(target)
        texts, lengths = [[] for _ in part], [[] for _ in part]
        for done in range(0, num_completions, copies):
            starts = [(number + first + i) * num_completions + done for i in range(at_once)]
            numbers = [start + j for start in starts for j in range(copies)]
            uniforms = draw_uniforms((seed, 0), numbers, params.max_new_tokens)
            rollout = sampler.sample(prompt_ids, prompt_mask, copies, params, uniforms)
            count = len(part) * copies
            ids, mask = rollout.completion_ids[:count].cpu(), rollout.completion_mask[:count].cpu()
            decoded, counted = decode_completions(tokenizer, ids, mask, sampler.eos_token_ids), mask.sum(-1).tolist()
            for i in range(len(part)):
                texts[i] += decoded[i * copies : (i + 1) * copies]
                lengths[i] += counted[i * copies : (i + 1) * copies]
        yield [row[:num_completions] for row in texts], [row[:num_completions] for row in lengths]


def sample_texts(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    params: SamplingParams,
    collator: Collator,
    batch_size: int,
    num_completions: int = 1,
    seed: int = 0,
    number: int = 0,
) -> tuple[list[list[str]], list[list[int]]]:
    """All of `sample_batches` at once; shows a progress bar when it takes many batches."""
    batches = sample_batches(
        sampler, tokenizer, rows, params, collator, batch_size, num_completions, seed, number=number
    )
    count = -(-len(rows) // rows_at_once(len(rows), batch_size, num_completions))
    texts, lengths = [], []
    for some_texts, some_lengths in tqdm(
        batches, desc="Sampling", total=count, unit="batch", leave=False, disable=count < 20 or not together.is_first()
    ):
        texts += some_texts
        lengths += some_lengths
    return texts, lengths


def judge_answers(
    rows: Sequence[Row],
    completions: list[list[str]],
    lengths: list[list[int]],
    judge: RewardFunc,
    timeout: float | None = None,
) -> Answers:
    """Judge k completions of each row: one is right when the reward function's value is at least 1, not when None.

    Raises:
        ValueError: see `call_rewards`.
    """
    copies = len(completions[0])
    (values,) = call_rewards([judge], rows, [text for texts in completions for text in texts], timeout)
    right = list(map(is_right, values))
    return Answers(completions, [right[i : i + copies] for i in range(0, len(right), copies)], lengths)


def takes_answer(judge: RewardFunc) -> bool:
    """Whether a reward function has a parameter for the expected answer; what it finds in `**columns` is not seen."""
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
    """What each of K completions of each of N questions votes for in `estimators.maj_at_k`: equal for equal answers.

    Answers are equal by what makes an answer right: with `math_equal` 1/2 and 0.5 are one answer, with `correctness`
    5 miles and 5 km are two. Classes are formed in the order in which completions appear. A completion joins the first
    class whose members are right if it is right, and wrong if it is wrong, and whose first member has the same text as
    its answer, or an answer such that the judge calls the completion right with that as the expected one. The judge
    alone does not keep right and wrong answers apart, as its equality need not be symmetric: `math_equal` takes 85
    where 47 + 38 is expected, but not the other way round.

    Args:
        extracted: the answer in each completion; None or blank: it has no vote.
        right: whether each completion is right, by the question's own expected answer.
        judge: takes the expected answer, see `takes_answer`. It is called for at most K * (K - 1) / 2 pairs of a
            question, and for many questions at once.
        timeout, started: for all of these calls together, see `call_rewards`.

    Returns:
        N lists of K votes: each the text of its class's first member.

    Raises:
        ValueError: see `call_rewards`, or the judge can't take a completion's answer for the expected one.
    """
    started = time.monotonic() if started is None else started
    answers: list[list[_Answer | None]] = []
    votes: list[dict[_Answer, str]] = [{} for _ in rows]  # of each question: answer -> the first of its class
    waiting: list[dict[_Answer, str]] = [{} for _ in rows]  # answers without a class -> a completion that gives it
    for i, row in enumerate(extracted):
        texts = [" ".join((text or "").split()) for text in row]
        answers.append([(text, verdict) if text else None for text, verdict in zip(texts, right[i], strict=True)])
        for answer, completion in zip(answers[i], completions[i], strict=True):
            if answer is not None:
                waiting[i].setdefault(answer, completion)
    while any(waiting):
        asked: list[Row] = []
        pairs: list[tuple[int, _Answer]] = []  # (question, an answer that may belong to the class that begins there)
        for i, without_class in enumerate(waiting):
            if without_class:
                first = next(iter(without_class))
                votes[i][first] = first[0]
                del without_class[first]
                same_verdict = [answer for answer in without_class if answer[1] == first[1]]
                asked += [with_answer(rows[i], first[0])] * len(same_verdict)
                pairs += [(i, answer) for answer in same_verdict]
        texts = [waiting[i][answer] for i, answer in pairs]
        for (i, answer), row, value in zip(pairs, asked, _values(judge, asked, texts, timeout, started), strict=True):
            if is_right(value):
                votes[i][answer] = row["answer"]
                del waiting[i][answer]
    return [[None if answer is None else votes[i][answer] for answer in row] for i, row in enumerate(answers)]


_Answer = tuple[str, bool]  # the text of an answer, and whether the completions that give it are right


def _values(
    judge: RewardFunc, asked: Sequence[Row], completions: Sequence[str], timeout: float | None, started: float
) -> list[float | None]:
    """The judge's value for each completion, with the expected answer of its row."""
    if not asked:
        return []
    try:
        return call_rewards([judge], asked, completions, timeout, started=started)[0]
    except Exception as error:  # it may be the first time that it sees an expected answer that is no good one
        shown = f"{name_of(judge)!r}, asked for maj@K whether a completion equals another one, whose answer is expected"
        raise ValueError(f"judge {shown}, raised {type(error).__name__}: {error}") from error


def is_right(value: float | None) -> bool:
    """What a judge's value means."""
    return value is not None and value >= RIGHT


def answer(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    params: SamplingParams,
    collator: Collator,
    batch_size: int,
    judge: RewardFunc,
    num_completions: int = 1,
    seed: int = 0,
    timeout: float | None = None,
) -> Answers:
    """Sample and judge: each process answers a part of the rows; the answers to all of them are the same on each.

    Raises:
        ValueError: see `call_rewards`.
    """
    part = together.own_part(len(rows))
    mine, answers = rows[part], Answers([], [], [])
    if mine:
        size = max(batch_size, num_completions)
        texts, lengths = sample_texts(
            sampler, tokenizer, mine, params, collator, size, num_completions, seed, number=part.start
        )
        right = together.decided_by_first(lambda: judge_answers(mine, texts, lengths, judge, timeout).right)
        answers = Answers(texts, right, lengths)
    everyones = together.gather(answers)
    return Answers(
        completions=[texts for theirs in everyones for texts in theirs.completions],
        right=[right for theirs in everyones for right in theirs.right],
        lengths=[lengths for theirs in everyones for lengths in theirs.lengths],
    )
