"""Remembers the completions that a step learns from, and turns them, or an evaluation's answers, into columns."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config.grpo import GRPOConfig
from ..data.rows import PROMPT, QUESTION, Row, answer_text
from ..evals.answers import Answers
from ..rewarding.scored import ScoredRollout
from ..runtime import together

NUM_QUESTIONS = 64  # of an evaluation: the answers to its first questions are kept, the same ones each time

# A table: equally long lists by the names of its columns.
Columns = dict[str, list[Any]]


@dataclass
class _Part:
    """The B completions of one rollout. Tensors lie in main memory."""

    rows: list[Row]  # N
    texts: list[str]  # B
    ids: Tensor  # (B, C) int64
    mask: Tensor  # (B, C) bool
    rewards: Tensor  # (B, R) float64, NaN where a function did not apply
    totals: Tensor  # (B,) float64
    advantages: Tensor  # (B,) float32, NaN until they are known


@dataclass
class StepRows:
    """Remembers what was sampled last, until the steps that learn from it are over.

    A step learns from one rollout, or from several where batches are accumulated; or several steps share one rollout.
    Then the advantages are computed anew when all of it has been sampled.

    Args:
        args: the settings of the run.
        eos_ids: any of these tokens ends a completion.
    """

    args: GRPOConfig
    eos_ids: Sequence[int]
    _parts: deque[_Part] = field(init=False)
    _first: int = -1  # the trainer's step while this was sampled
    _given: tuple[int, Columns] | None = None  # the columns of a rollout that a checkpoint held, and its first step

    def __post_init__(self) -> None:
        shared = self.args.steps_per_generation > 1
        self._parts = deque(maxlen=1 if shared else self.args.gradient_accumulation_steps)

    def sampled(self, scored: ScoredRollout, step: int) -> None:
        """Remember a rollout; `step` counts the optimizer steps before it. Rollouts of earlier steps are forgotten."""
        if step != self._first:
            self._parts.clear()
        self._first, self._given = step, None
        unknown = torch.full_like(scored.totals, math.nan)
        of_rows = scored.texts, scored.ids, scored.mask, scored.rewards, scored.totals
        self._parts.append(_Part(scored.prompts.rows, *of_rows, unknown))

    def weighed(self, advantages: Tensor) -> None:
        """Remember advantages, (rows,) in main memory: those of the newest rollout, or of several that end with it."""
        for part in reversed(self._parts):
            count = len(part.totals)
            if count > len(advantages):
                return
            part.advantages, advantages = advantages[-count:], advantages[: len(advantages) - count]

    def of_step(self, step: int, names: Sequence[str]) -> Columns:
        """The completions that an optimizer step, counted from 1, has learned from, over all processes.

        All processes must call this.

        Args:
            names: those of the R reward functions.

        Returns:
            columns `step`, `prompt_index`, `prompt`, `answer`, `completion`, `rewards/NAME` for each function,
            `reward`, `advantage`, `length` (tokens) and `clipped` (it has no end). None stands for what is not known.
            There are no rows where nothing was sampled, as in supervised fine-tuning.
        """
        first, whole = self._given or (self._first, None)
        if whole is None:
            whole = self._columns(names)
        size = self.args.rows_per_step * self.args.gradient_accumulation_steps
        start = (step - 1 - first) * size if self.args.steps_per_generation > 1 else 0
        own = {name: values[start : start + size] for name, values in whole.items()}
        everyone = together.gather(own)
        columns = {name: [value for theirs in everyone for value in theirs[name]] for name in own}
        count, group = len(columns["prompt"]), self.args.num_completions_per_prompt
        return {"step": [step] * count, "prompt_index": [row // group for row in range(count)], **columns}

    def _columns(self, names: Sequence[str]) -> Columns:
        columns: Columns = {"prompt": [], "answer": [], "completion": []}
        columns |= {f"rewards/{name}": [] for name in names}
        columns |= {"reward": [], "advantage": [], "length": [], "clipped": []}
        for part in self._parts:
            group = len(part.texts) // len(part.rows)
            columns["prompt"] += [_prompt(row) for row in part.rows for _ in range(group)]
            columns["answer"] += [_answer(row) for row in part.rows for _ in range(group)]
            columns["completion"] += part.texts
            for j, name in enumerate(names):
                columns[f"rewards/{name}"] += _known(part.rewards[:, j])
            columns["reward"] += _known(part.totals)
            columns["advantage"] += _known(part.advantages)
            columns["length"] += part.mask.sum(dim=1).tolist()
            ended = (torch.isin(part.ids, torch.tensor(self.eos_ids)) & part.mask).any(dim=1)
            columns["clipped"] += (~ended).tolist()
        return columns

    def state(self, names: Sequence[str]) -> dict[str, Any]:
        """What a checkpoint keeps, so that the steps that are left of a shared rollout find their completions."""
        first, columns = self._given or (self._first, self._columns(names))
        return {"first": first, "columns": columns}

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on with what `state` gave; None: it is not known."""
        self._parts.clear()
        self._given = None if state is None else (state["first"], dict(state["columns"]))


def columns_of_answers(step: int, rows: Sequence[Row], answers: Answers, limit: int = NUM_QUESTIONS) -> Columns:
    """The greedy answers to the first questions of an evaluation, N of them at most `limit`.

    Returns:
        columns `step`, `question_index`, `question`, `answer`, `completion`, `right` (None: nobody judges), `reward`
        and `rewards/NAME` where reward functions were asked, and `length` in tokens.
    """
    count = min(limit, len(rows))
    rows, rewards = rows[:count], [of_row[0] for of_row in answers.rewards[:count]]
    columns: Columns = {"step": [step] * count, "question_index": list(range(count))}
    columns |= {"question": [_prompt(row) for row in rows], "answer": [_answer(row) for row in rows]}
    columns["completion"] = [texts[0] for texts in answers.completions[:count]]
    columns["right"] = [right[0] for right in answers.right[:count]] or [None] * count
    columns["reward"] = [_total(values, answers.weights) for values in rewards] or [None] * count
    for j, name in enumerate(answers.names):
        columns[f"rewards/{name}"] = [values[j] for values in rewards]
    columns["length"] = [lengths[0] for lengths in answers.lengths[:count]]
    return columns


def _total(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """The weighted sum of the rewards that are known; None: none is."""
    known = [value * weight for value, weight in zip(values, weights, strict=True) if value is not None]
    return sum(known) if known else None


def _prompt(row: Row) -> str:
    """The question, or where there is none the text that the model saw."""
    return str(row[QUESTION] if QUESTION in row else row.get("question", row.get(PROMPT, "")))


def _answer(row: Row) -> str | None:
    return answer_text(row) or None


def _known(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
