"""How good a model is on questions with known answers: sample them batch by batch, judge, keep, and sum up."""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from . import device
from .data import Collator, Row
from .estimators import maj_at_k, mean_at_k, pass_at_k, share_interval
from .sampler import Sampler, SamplingParams, draw_uniforms
from .scoring import RewardFunc, call_rewards
from .settings import require

RIGHT = 1.0  # an answer is right where the judging reward function's value is at least this
# Settings with which a file may be continued even so: a preset is its numbers, and batches change float ties at most.
NOT_COMPARED = ("preset", "batch_size")


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


@dataclass
class JudgedCompletion:
    """One completion and all that is known of it: a line of the file that evaluate.py writes."""

    row_number: int  # of the question in the data, from 1
    pass_number: int  # of the completion among those of its question, from 1
    question: str
    answer: str  # the expected one
    completion: str
    extracted_answer: str | None
    vote: str | None  # the extracted answer in a form that is equal for equal answers, for the majority vote
    right: bool
    partially_right: bool  # right, or a number near the expected one
    well_formed: bool  # has the whole format
    rewards: dict[str, float | None]  # None: the reward function does not apply
    length: int  # tokens, with the one that ends it


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
) -> Iterator[tuple[list[list[str]], list[list[int]]]]:
    """Sample `num_completions` completions for each of N rows, a batch at a time.

    Args:
        rows: N dicts with `prompt_ids`.
        batch_size: completions at a time; all batches have the same shape (the last is filled up by repeating a row).
            The completions of a question are drawn in several goes when there are more.
        start: leave out so many rows; a multiple of `rows_at_once`, so that the other batches are the same as without.

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
            starts = [(first + i) * num_completions + done for i in range(at_once)]
            numbers = [start + j for start in starts for j in range(copies)]
            uniforms = draw_uniforms((seed, 0), numbers, params.max_new_tokens)
            rollout = sampler.sample(prompt_ids, prompt_mask, copies, params, uniforms)
            count = len(part) * copies
            decoded = tokenizer.batch_decode(rollout.completion_ids[:count].tolist(), skip_special_tokens=True)
            counted = rollout.completion_mask[:count].sum(-1).tolist()
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
) -> tuple[list[list[str]], list[list[int]]]:
    """All of `sample_batches` at once; shows a progress bar when it takes many batches."""
    batches = sample_batches(sampler, tokenizer, rows, params, collator, batch_size, num_completions, seed)
    count = -(-len(rows) // rows_at_once(len(rows), batch_size, num_completions))
    texts, lengths = [], []
    for some_texts, some_lengths in tqdm(
        batches, desc="Sampling", total=count, unit="batch", leave=False, disable=count < 20
    ):
        texts += some_texts
        lengths += some_lengths
    return texts, lengths


def judge_answers(
    rows: Sequence[Row], completions: list[list[str]], lengths: list[list[int]], judge: RewardFunc
) -> Answers:
    """Judge k completions of each row: one is right when the reward function's value is at least 1."""
    copies = len(completions[0])
    (values,) = call_rewards([judge], rows, [text for texts in completions for text in texts])
    right = [value is not None and value >= RIGHT for value in values]
    return Answers(completions, [right[i : i + copies] for i in range(0, len(right), copies)], lengths)


def summarize(completions: Sequence[JudgedCompletion]) -> dict[str, float]:
    """Sum up K completions of each of N questions, in any order.

    Returns:
        correct, total: completions.
        accuracy, partial_accuracy, format_accuracy: shares of all completions.
        pass@k for K and every power of two below, mean@K, maj@K: see `estimators`; means over questions.
        NAME_low, NAME_high for each of these shares: the 95% confidence interval of `share_interval`.
        mean_length: tokens.

    Raises:
        ValueError: no completions, or not equally many for each question.

    >>> import json
    >>> lines = open("results.jsonl")  # doctest: +SKIP
    >>> summarize([JudgedCompletion(**json.loads(line)) for line in lines])["pass@4"]  # doctest: +SKIP
    """
    groups: dict[int, list[JudgedCompletion]] = {}
    for completion in completions:
        groups.setdefault(completion.row_number, []).append(completion)
    sizes = {len(group) for group in groups.values()}
    if len(sizes) != 1:
        sizes = " or ".join(map(str, sorted(sizes))) or "no"
        raise ValueError(f"completions: questions have {sizes} completions; expected equally many each, at least one")
    (size,) = sizes
    questions = list(groups.values())
    shares = {
        "accuracy": [mean_at_k([c.right for c in group]) for group in questions],
        "partial_accuracy": [mean_at_k([c.partially_right for c in group]) for group in questions],
        "format_accuracy": [mean_at_k([c.well_formed for c in group]) for group in questions],
    }
    for k in sorted({2**power for power in range(size.bit_length())} | {size}):
        shares[f"pass@{k}"] = [pass_at_k(size, sum(c.right for c in group), k) for group in questions]
    shares[f"mean@{size}"] = shares["accuracy"]
    shares[f"maj@{size}"] = [maj_at_k([c.vote for c in group], [c.right for c in group]) for group in questions]

    metrics: dict[str, float] = {"correct": sum(c.right for c in completions), "total": len(completions)}
    for name, values in shares.items():
        metrics[name] = sum(values) / len(values)
        metrics[f"{name}_low"], metrics[f"{name}_high"] = share_interval(values, size)
    metrics["mean_length"] = sum(c.length for c in completions) / len(completions)
    return metrics


class ResultsFile:
    """The completions of an evaluation, one JSON object a line; beside them NAME.summary.json: settings and metrics.

    Nothing is overwritten: a file that another evaluation wrote is refused, one of the same settings is continued.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self.summary = self.path.parent / (self.path.name.removesuffix(".jsonl") + ".summary.json")
        self.settings = json.loads(json.dumps(settings))  # as it will be read again

    def read(self, row_numbers: Sequence[int], at_once: int) -> list[JudgedCompletion]:
        """The completions that an earlier call of the same command left, up to a whole number of batches.

        Args:
            row_numbers: of all questions.
            at_once: questions in a batch. A batch cut short is sampled again as a whole: so it has the same shape as
                without the interruption, and its numbers are the same to the last bit.

        Raises:
            ValueError: it can't be written there, something else is there already, or it had other settings.
        """
        right = "expected a file, this is a folder" if self.path.is_dir() else "its folder does not exist"
        require(self.path.absolute().parent.is_dir() and not self.path.is_dir(), "output_file", str(self.path), right)
        if not self.summary.exists():
            right = f"exists already, without its {self.summary.name}; nothing is overwritten"
            require(not self.path.exists(), "output_file", str(self.path), right)
            return []
        self._compare_settings()
        if not self.path.exists():
            return []
        passes = self.settings["num_passes"]
        expected = [(row, copy) for row in row_numbers for copy in range(1, passes + 1)]
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last line end was cut short
        completions = []
        for number, line in enumerate(lines, start=1):
            try:
                completions.append(JudgedCompletion(**json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self.path}, line {number}: not a judged completion: {error}") from error
            place = (completions[-1].row_number, completions[-1].pass_number)
            if expected[number - 1 : number] != [place]:
                raise ValueError(f"{self.path}, line {number}: row {place[0]}, pass {place[1]} is out of order here")
        if len(completions) == len(expected):
            return completions
        num_kept = len(completions) // (passes * at_once) * passes * at_once
        os.truncate(self.path, sum(len(line) + 1 for line in lines[:num_kept]))
        return completions[:num_kept]

    def _compare_settings(self) -> None:
        try:
            earlier = json.loads(self.summary.read_text(encoding="utf-8"))["settings"]
        except (ValueError, TypeError, KeyError) as error:
            right = f"{self.summary} is no summary of an evaluation; nothing is overwritten"
            raise ValueError(f"output_file={str(self.path)!r}: {right}") from error
        for name, value in self.settings.items():
            right = f"{self.path} was written with {earlier.get(name)!r}; give the same, or another output_file"
            require(name in NOT_COMPARED or earlier.get(name) == value, name, value, right)

    def append(self, completions: Sequence[JudgedCompletion]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(dataclasses.asdict(completion)) + "\n" for completion in completions))

    def write_summary(self, num_done: int, metrics: dict[str, float] | None) -> None:
        """Replace the summary as a whole: a kill leaves the old one or the new one."""
        content = {"settings": self.settings, "num_questions_done": num_done, "metrics": metrics}
        unfinished = self.summary.with_name(self.summary.name + ".unfinished")
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.summary)
