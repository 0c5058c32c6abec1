"""Judged completions of an evaluation: the file that keeps them, and the metrics that sum them up."""

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.settings import require
from .estimators import maj_at_k, mean_at_k, pass_at_k, share_interval

# A command may continue a results file even if it differs in these settings: the numbers that a preset stands for are
# compared instead of its name, a batch size changes results at most where floats tie, and a time limit changes none.
NOT_COMPARED = ("preset", "batch_size", "reward_timeout")


@dataclass
class JudgedCompletion:
    """One completion with its verdicts: a line of the file that evaluate.py writes."""

    row_number: int  # the number of the question in the data, from 1
    pass_number: int  # the number of the completion among those of its question, from 1
    question: str
    answer: str  # the expected answer; "" where there is none
    completion: str
    extracted_answer: str | None
    vote: str | None  # its vote for the majority, equal for equal answers: see `votes_by_class`
    right: bool
    partially_right: bool  # it is right, or a number near the expected one
    well_formed: bool  # it has the whole format
    rewards: dict[str, float | None]  # None where the reward function does not apply
    length: int  # in tokens, with the one that ends it


def summarize(completions: Sequence[JudgedCompletion]) -> dict[str, float]:
    """Compute the metrics of K completions of each of N questions, which may stand in any order.

    Returns:
        correct, total: numbers of completions.
        accuracy, partial_accuracy, format_accuracy: shares of all completions.
        pass@k for K and every power of two below K, mean@K, maj@K: means over questions, see `estimators`.
        NAME_low, NAME_high for each of these shares: its 95% confidence interval, see `share_interval`.
        mean_length: in tokens.

    Raises:
        ValueError: there are no completions, or not equally many for each question.

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
    """The file with the completions of an evaluation, one JSON object a line, and its summary beside it.

    The summary, NAME.summary.json, has the settings and the metrics. Nothing is overwritten: a file with the same
    settings is continued, and any other file is refused.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        self.path = Path(path)
        self.summary = self.path.parent / (self.path.name.removesuffix(".jsonl") + ".summary.json")
        self.settings = json.loads(json.dumps(settings))  # with the types that reading the summary gives

    def read(self, row_numbers: Sequence[int], at_once: int) -> list[JudgedCompletion]:
        """Read the completions that an earlier, interrupted call of the same command has written.

        Only whole batches count; the file is cut after the last of them. The rest is sampled again in a batch of the
        same shape as without the interruption, so that its numbers are the same to the last bit.

        Args:
            row_numbers: the numbers of all questions.
            at_once: how many questions a batch has.

        Raises:
            ValueError: the file can't be written there, another file is there already, or its settings differ.
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
        lines = self.path.read_bytes().split(b"\n")[:-1]  # the last part is empty, or a line that was cut short
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
        """Raise ValueError where the existing summary is of an evaluation with other settings."""
        try:
            earlier = json.loads(self.summary.read_text(encoding="utf-8"))["settings"]
        except (ValueError, TypeError, KeyError) as error:
            hint = f"{self.summary} is no summary of an evaluation; nothing is overwritten"
            raise ValueError(f"output_file={str(self.path)!r}: {hint}") from error
        for name, value in self.settings.items():
            hint = f"{self.path} was written with {earlier.get(name)!r}; give the same, or another output_file"
            require(name in NOT_COMPARED or earlier.get(name) == value, name, value, hint)

    def append(self, completions: Sequence[JudgedCompletion]) -> None:
        """Write completions at the end of the file."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(dataclasses.asdict(completion)) + "\n" for completion in completions))

    def write_summary(self, num_done: int, metrics: dict[str, float] | None) -> None:
        """Replace the summary in one step, so that an interruption leaves the old one or the new one.

        Args:
            num_done: how many questions are answered.
            metrics: from `summarize`; None while questions are left.
        """
        content = {"settings": self.settings, "num_questions_done": num_done, "metrics": metrics}
        unfinished = self.summary.with_name(self.summary.name + ".unfinished")
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(unfinished, self.summary)
