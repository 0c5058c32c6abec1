"""Judged completions: how they are kept in a file, and what they sum up to."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.settings import require
from .estimators import maj_at_k, mean_at_k, pass_at_k, share_interval

# Settings with which a file may be continued even so: a preset is its numbers, batches change float ties at most,
# and time changes nothing.
NOT_COMPARED = ("preset", "batch_size", "reward_timeout")


@dataclass
class JudgedCompletion:
    """One completion and all that is known of it: a line of the file that evaluate.py writes."""

    row_number: int  # of the question in the data, from 1
    pass_number: int  # of the completion among those of its question, from 1
    question: str
    answer: str  # the expected one; "" where there is none
    completion: str
    extracted_answer: str | None
    vote: str | None  # what it votes for in the majority vote, equal for equal answers: see `votes_by_class`
    right: bool
    partially_right: bool  # right, or a number near the expected one
    well_formed: bool  # has the whole format
    rewards: dict[str, float | None]  # None: the reward function does not apply
    length: int  # tokens, with the one that ends it


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
        hint = "expected a file, this is a folder" if self.path.is_dir() else "its folder does not exist"
        require(self.path.absolute().parent.is_dir() and not self.path.is_dir(), "output_file", str(self.path), hint)
        if not self.summary.exists():
            hint = f"exists already, without its {self.summary.name}; nothing is overwritten"
            require(not self.path.exists(), "output_file", str(self.path), hint)
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
            hint = f"{self.summary} is no summary of an evaluation; nothing is overwritten"
            raise ValueError(f"output_file={str(self.path)!r}: {hint}") from error
        for name, value in self.settings.items():
            hint = f"{self.path} was written with {earlier.get(name)!r}; give the same, or another output_file"
            require(name in NOT_COMPARED or earlier.get(name) == value, name, value, hint)

    def append(self, completions: Sequence[JudgedCompletion]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(dataclasses.asdict(completion)) + "\n" for completion in completions))

    def write_summary(self, num_done: int, metrics: dict[str, float] | None) -> None:
        """Replace the summary as a whole: a kill leaves the old one or the new one."""
        content = {"settings": self.settings, "num_questions_done": num_done, "metrics": metrics}
        unfinished = self.summary.with_name(self.summary.name + ".unfinished")
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.summary)
