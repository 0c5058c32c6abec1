"""Answer questions whose answers are known: sample batch by batch, and judge."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from . import device, processes
from .data import Collator, decode_completions
from .rows import ANSWER_COLUMNS, Row, with_answer
from .sampler import Sampler, SamplingParams, draw_uniforms
from .scoring import RewardFunc, call_rewards, name_of

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
        batches, desc="Sampling", total=count, unit="batch", leave=False, disable=count < 20 or not processes.is_first()
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
    judge: RewardFunc,
    timeout: float | None = None,
) -> list[list[str | None]]:
    """What each of K completions of each of N questions votes for in `estimators.maj_at_k`: equal for equal answers.

    Answers are equal by what makes an answer right: with `math_equal` 1/2 and 0.5 are one answer, with `correctness`
    5 miles and 5 km are two. Classes are formed in the order in which completions appear. A completion joins the first
    class whose first member has the same text as its answer, or an answer such that the judge calls the completion
    right with that as the expected one.

    Args:
        extracted: the answer in each completion; None or blank: it has no vote.
        judge: takes the expected answer, see `takes_answer`. It is called for at most K * (K - 1) / 2 pairs of a
            question, and for many questions at once.
        timeout: seconds that each of these calls may take.

    Returns:
        N lists of K votes: each the text of its class's first member.

    Raises:
        ValueError: see `call_rewards`, or the judge can't take a completion's answer for the expected one.
    """
    texts = [[" ".join((text or "").split()) or None for text in row] for row in extracted]
    votes: list[dict[str, str]] = [{} for _ in rows]  # of each question: answer -> the first of its class
    waiting: list[dict[str, str]] = [{} for _ in rows]  # answers without a class -> the first completion that gives it
    for i, row in enumerate(texts):
        for text, completion in zip(row, completions[i], strict=True):
            if text is not None:
                waiting[i].setdefault(text, completion)
    while any(waiting):
        asked: list[Row] = []
        pairs: list[tuple[int, str]] = []  # (question, an answer that may belong to the class that begins there)
        for i, answers in enumerate(waiting):
            if answers:
                first = next(iter(answers))
                votes[i][first] = first
                del answers[first]
                asked += [with_answer(rows[i], first)] * len(answers)
                pairs += [(i, text) for text in answers]
        for (i, text), row, value in zip(pairs, asked, _values(judge, asked, pairs, waiting, timeout), strict=True):
            if is_right(value):
                votes[i][text] = row["answer"]
                del waiting[i][text]
    return [[None if text is None else votes[i][text] for text in row] for i, row in enumerate(texts)]


def _values(
    judge: RewardFunc,
    asked: Sequence[Row],
    pairs: Sequence[tuple[int, str]],
    waiting: Sequence[dict[str, str]],
    timeout: float | None,
) -> list[float | None]:
    """The judge's value for the completion of each pair, with the expected answer of its row."""
    if not pairs:
        return []
    try:
        return call_rewards([judge], asked, [waiting[i][text] for i, text in pairs], timeout)[0]
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
    part = processes.own_part(len(rows))
    mine, answers = rows[part], Answers([], [], [])
    if mine:
        size = max(batch_size, num_completions)
        texts, lengths = sample_texts(
            sampler, tokenizer, mine, params, collator, size, num_completions, seed, number=part.start
        )
        right = processes.of_first(lambda: judge_answers(mine, texts, lengths, judge, timeout).right)
        answers = Answers(texts, right, lengths)
    everyones = processes.gather(answers)
    return Answers(
        completions=[texts for theirs in everyones for texts in theirs.completions],
        right=[right for theirs in everyones for right in theirs.right],
        lengths=[lengths for theirs in everyones for lengths in theirs.lengths],
    )
