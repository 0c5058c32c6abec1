"""Samples answers to evaluation questions, batch by batch, and judges which of them are right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerState

from ..data.batches import Collator
from ..data.prompts import decode_completions, token_lists
from ..data.rows import Row
from ..model.forward import base_model
from ..rewarding.context import RewardContext, means
from ..rewarding.scorer import call_on_all_hosts, raised_by_all
from ..rewarding.scoring import RewardFunc, call_rewards
from ..rollout.sampler import Sampler
from ..rollout.tokens import SamplingParams, draw_uniforms
from ..runtime import device, fsdp, phases, together

RIGHT = 1.0  # an answer is right where the judge, a reward function, gives at least this value


@dataclass
class Answers:
    """Sampled completions for N questions, k for each, and whether each of them is right."""

    completions: list[list[str]]  # N lists of k texts
    right: list[list[bool]]  # right[n][i] says whether completion i of question n is right
    lengths: list[list[int]]  # in tokens
    # rewards[n][i] holds the value of each of R reward functions for completion i of question n; empty: none were asked
    rewards: list[list[list[float | None]]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)  # numbers that judge and reward functions have logged
    names: list[str] = field(default_factory=list)  # of the R reward functions
    weights: list[float] = field(default_factory=list)  # and what each counts for in the total
    step: int = 0  # optimizer steps before they were sampled

    @property
    def accuracy(self) -> float:
        """The share of right completions: pass@1 where they are greedy, mean@k where k were sampled."""
        flat = [value for row in self.right for value in row]
        return sum(flat) / len(flat)

    @property
    def mean_length(self) -> float:
        """The mean length of all completions, in tokens."""
        flat = [value for row in self.lengths for value in row]
        return sum(flat) / len(flat)


def rows_at_once(num_rows: int, batch_size: int, num_completions: int) -> int:
    """The number of questions in one batch of `sample_batches`."""
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
) -> Iterator[tuple[list[list[str]], list[list[list[int]]]]]:
    """Sample `num_completions` completions for each of N rows, a batch at a time.

    Args:
        rows: N rows from `prepare_rows`.
        batch_size: how many completions are sampled at a time. All batches have the same shape; the last one is filled
            up by repeating a row. A question with more completions than this gets them in several calls of the sampler.
        start: how many rows to skip. It is a multiple of `rows_at_once`, so that the other batches stay the same.
        number: the number of the first row among all rows, where `rows` are only a part of them. The random numbers of
            a row depend on its number.

    Yields:
        for each row of a batch its completions as texts, without the special tokens that `decode_completions` drops,
        and their tokens, with the one that ended each.
    """
    at_once = rows_at_once(len(rows), batch_size, num_completions)
    copies = min(num_completions, batch_size)  # completions of each row in one call of the sampler
    target = device.torch_device()
    assert start % at_once == 0, (start, at_once)
    for first in range(start, len(rows), at_once):
        part = list(rows[first : first + at_once])
        batch = collator(part + [part[-1]] * (at_once - len(part)))
        prompt_ids, prompt_mask = batch["prompt_ids"].to(target), batch["prompt_mask"].to(target)
        texts, tokens = [[] for _ in part], [[] for _ in part]
        for done in range(0, num_completions, copies):
            # The random numbers of completion c of row r have the number r * num_completions + c.
            numbers = [(number + first + i) * num_completions + done + j for i in range(at_once) for j in range(copies)]
            uniforms = draw_uniforms((seed, 0), numbers, params.max_new_tokens)
            rollout = sampler.sample(prompt_ids, prompt_mask, copies, params, uniforms)
            count = len(part) * copies
            ids, mask = rollout.completion_ids[:count].cpu(), rollout.completion_mask[:count].cpu()
            decoded, listed = decode_completions(tokenizer, ids, mask, sampler.eos_token_ids), token_lists(ids, mask)
            for i in range(len(part)):
                texts[i] += decoded[i * copies : (i + 1) * copies]
                tokens[i] += listed[i * copies : (i + 1) * copies]
        yield [row[:num_completions] for row in texts], [row[:num_completions] for row in tokens]


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
) -> tuple[list[list[str]], list[list[list[int]]]]:
    """All completions and tokens that `sample_batches` gives. Whoever watches the run is told how far it is; where
    nobody does and there are many batches, a progress bar shows it."""
    batches = sample_batches(
        sampler, tokenizer, rows, params, collator, batch_size, num_completions, seed, number=number
    )
    count = -(-len(rows) // rows_at_once(len(rows), batch_size, num_completions))
    hidden = count < 20 or not together.is_first() or phases.is_watched()
    how = f"x {num_completions} sample{'s' * (num_completions != 1)}" if params.temperature else "greedy"
    phases.advance(phases.QUESTIONS, 0, len(rows), how)
    texts, tokens = [], []
    for some_texts, some_tokens in tqdm(
        batches, desc="Sampling", total=count, unit="batch", leave=False, disable=hidden or None
    ):
        texts += some_texts
        tokens += some_tokens
        phases.advance(phases.QUESTIONS, len(texts), len(rows), how)
    return texts, tokens


def lengths_of(tokens: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """How many tokens each completion of each row has."""
    return [[len(completion) for completion in row] for row in tokens]


def judge_answers(
    rows: Sequence[Row],
    completions: list[list[str]],
    tokens: list[list[list[int]]],
    judge: RewardFunc,
    timeout: float | None = None,
    state: TrainerState | None = None,
) -> Answers:
    """Judge k completions of each row. `is_right` says which values of the judge mean a right answer.

    Args:
        tokens: of each completion, with the one that ended it.
        state: of the trainer that evaluates, if one does.

    Raises:
        ValueError: see `call_rewards`.
    """
    copies = len(completions[0])
    context = RewardContext([ids for row in tokens for ids in row], state)
    texts = [text for row in completions for text in row]
    (values,) = call_rewards([judge], rows, texts, timeout, context=context)
    right = list(map(is_right, values))
    right = [right[i : i + copies] for i in range(0, len(right), copies)]
    return Answers(completions, right, lengths_of(tokens), metrics=context.metrics)


def is_right(value: float | None) -> bool:
    """Whether the judge's value for a completion means a right answer: at least RIGHT, and not None."""
    return value is not None and value >= RIGHT


def _scored(
    rows: Sequence[Row],
    texts: list[list[str]],
    tokens: list[list[list[int]]],
    judge: RewardFunc | None,
    reward_funcs: Sequence[RewardFunc],
    timeout: float | None,
    state: TrainerState | None,
) -> Answers:
    """This process's answers, with what the judge and the reward functions say of them. See `answer`."""
    copies = len(texts[0])
    functions = [*reward_funcs, *([] if judge is None or any(judge is f for f in reward_funcs) else [judge])]
    context = RewardContext([ids for row in tokens for ids in row], state)
    flat = [text for of_row in texts for text in of_row]
    columns, metrics, _ = call_on_all_hosts(functions, rows, flat, timeout, None, context)
    values = list(map(list, zip(*columns, strict=True)))  # B lists, with a value of each function
    by_row = [values[i : i + copies] for i in range(0, len(values), copies)]
    right: list[list[bool]] = []
    if judge is not None:
        decides = next(j for j, function in enumerate(functions) if function is judge)
        right = [[is_right(of_one[decides]) for of_one in of_row] for of_row in by_row]
    rewards = [[of_one[: len(reward_funcs)] for of_one in of_row] for of_row in by_row]
    return Answers(texts, right, lengths_of(tokens), rewards, metrics)


def answer(
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    params: SamplingParams,
    collator: Collator,
    batch_size: int,
    judge: RewardFunc | None,
    num_completions: int = 1,
    seed: int = 0,
    timeout: float | None = None,
    reward_funcs: Sequence[RewardFunc] = (),
    state: TrainerState | None = None,
) -> Answers:
    """Sample and judge answers to all rows. Each process answers a part of them, and all processes get all answers.

    Further arguments are those of `sample_batches` and `judge_answers`.

    Args:
        judge: None: what is right is not known.
        reward_funcs: functions and reward models whose values are asked for too. The judge is called once, even where
            it is one of them.

    Raises:
        ValueError: see `call_rewards`.
    """
    part = together.own_part(len(rows))
    mine, answers = rows[part], Answers([], [], [])
    sampled = list(mine)
    if fsdp.is_split(base_model(sampler.model)):  # then all processes must sample equally often
        sampled += [rows[-1]] * (part.stop - part.start - len(mine))
    if sampled:
        size, number = max(batch_size, num_completions), part.start
        asked = sampler, tokenizer, sampled, params, collator, size, num_completions, seed, number
        texts, tokens = (of_rows[: len(mine)] for of_rows in sample_texts(*asked))
    with raised_by_all():
        if mine:
            answers = _scored(mine, texts, tokens, judge, reward_funcs, timeout, state)
    everyones = together.gather(answers)
    # What a process's functions have logged counts once for each of its rows.
    logged = [
        {name: [mean] * len(theirs.completions) for name, mean in means([theirs.metrics]).items()}
        for theirs in everyones
    ]
    return Answers(
        completions=[texts for theirs in everyones for texts in theirs.completions],
        right=[right for theirs in everyones for right in theirs.right],
        lengths=[lengths for theirs in everyones for lengths in theirs.lengths],
        rewards=[rewards for theirs in everyones for rewards in theirs.rewards],
        metrics={name: [mean] for name, mean in means(logged).items()},
    )
