"""Batches of tokenised rows: a stream that tokenises rows as they are drawn, and padding to tensors."""

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from ..batch import PromptBatch
from ..runtime import device
from .rows import COMPLETION_IDS, LEARNED, PROMPT_IDS, REJECTED_IDS, Row

logger = logging.getLogger(__name__)

_IDS = (PROMPT_IDS, COMPLETION_IDS, REJECTED_IDS)
CHUNK = 32  # so many rows of a stream are read and tokenised at once


class PromptStream(torch.utils.data.IterableDataset):
    """Prompts of a streamed data set, tokenised as they are drawn.

    The stream has no end: after the last row it begins the next epoch, in that epoch's order. So a resumed run, which
    skips as many batches as were drawn before, continues as if it had never stopped, past the end of the data set too.

    Args:
        rows: the data set.
        encode: adds prompts and tokens to rows, given the rows and their numbers.
        max_prompt_length, max_completion_length: in tokens; a row beyond one of them is left out. None: no completions.
        overlong: "raise": a prompt that is too long is an error.

    Attributes:
        num_rows: how many rows the newest iteration has read.
        num_overlong: how many of these were left out because the prompt or the completion was too long.

    Raises:
        ValueError: while it is iterated over: a row has no question, no row of an epoch fits, or a prompt is too long
            and `overlong` is "raise".
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        encode: Callable[[Sequence[Row], Sequence[int]], list[Row]],
        max_prompt_length: int,
        max_completion_length: int | None,
        overlong: str,
    ) -> None:
        self.rows, self.encode, self.overlong = rows, encode, overlong
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.num_rows = self.num_overlong = 0
        self._first: list[Row] | None = None  # the first rows of the first epoch, once somebody has asked for them
        self._rest: Iterator[Row] | None = None  # what follows them, until an iteration has taken it

    def first_rows(self) -> list[Row]:
        """The rows with which the stream begins, as they are in the data set. The next iteration has them too, without
        reading them again: a stream from a generator may give each row once only."""
        if self._first is None:
            self.rows.set_epoch(0)
            self._rest = iter(self.rows)
            self._first = list(itertools.islice(self._rest, CHUNK))
        return self._first

    def _epoch(self, epoch: int) -> Iterator[Row]:
        """The rows of an epoch, in its order."""
        if epoch == 0 and self._rest is not None:
            rest, self._rest = self._rest, None
            return itertools.chain(self._first, rest)
        self.rows.set_epoch(epoch)
        return iter(self.rows)

    def __iter__(self) -> Iterator[Row]:
        self.num_rows = self.num_overlong = 0
        for epoch in itertools.count():
            source, num_yielded_before = self._epoch(epoch), self.num_rows - self.num_overlong
            while chunk := list(itertools.islice(source, CHUNK)):
                numbers = range(self.num_rows + 1, self.num_rows + 1 + len(chunk))
                for row in self.encode(chunk, numbers):
                    self.num_rows += 1
                    if self._fits(row):
                        yield row
            if self.num_rows - self.num_overlong == num_yielded_before:
                raise ValueError(
                    f"the stream of training rows has none that fits max_prompt_length={self.max_prompt_length}: "
                    f"{self.num_overlong} are longer"
                )

    def _fits(self, row: Row) -> bool:
        """Whether the newest row is short enough. Counts it where it is not, and warns of the first one."""
        length, limit = len(row[PROMPT_IDS]), self.max_prompt_length
        what = f"a prompt of {length} tokens, longer than max_prompt_length={limit}"
        if length > limit and self.overlong == "raise":
            raise ValueError(f"row {self.num_rows} of the stream has {what}: raise max_prompt_length")
        if length <= limit and self.max_completion_length is not None:
            length = max(len(row[COMPLETION_IDS]), len(row.get(REJECTED_IDS, ())))
            limit = self.max_completion_length
            what = f"a completion of {length} tokens, longer than generation_max_length={limit}"
        if length <= limit:
            return True
        if self.num_overlong == 0:
            logger.warning("Row %d of the stream has %s: it is left out, as all like it", self.num_rows, what)
        self.num_overlong += 1
        return False


def join_prompts(batches: Sequence[PromptBatch], pad_token_id: int) -> PromptBatch:
    """One batch of the prompts of several batches, padded on the left to the width of the widest one."""
    width = max(batch.prompt_ids.shape[1] for batch in batches)

    def widen(tensor: torch.Tensor, value: int | bool) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (width - tensor.shape[1], 0), value=value)

    return PromptBatch(
        torch.cat([widen(batch.prompt_ids, pad_token_id) for batch in batches]),
        torch.cat([widen(batch.prompt_mask, False) for batch in batches]),
        [row for batch in batches for row in batch.rows],
    )


def without_tokens(rows: Sequence[Row]) -> list[Row]:
    """The rows without what a batch holds of them as tensors."""
    tokens = (PROMPT_IDS, COMPLETION_IDS, REJECTED_IDS, LEARNED)
    return [{k: v for k, v in row.items() if k not in tokens} for row in rows]


@dataclass
class Collator:
    """Makes padded tensors of tokenised rows.

    Where each new shape is a compilation (`device.static_shapes`), all batches have the full widths; elsewhere a batch
    is as wide as its longest row. For SFT, `max_completion_length` is given and the batch has the completions too; rows
    of preferences have two each, B = 2N, the chosen one before the rejected one.
    """

    pad_token_id: int
    max_prompt_length: int  # P
    max_completion_length: int | None = None  # C; None: the rows have no completions

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """A batch of N rows from `prepare_rows`.

        Returns:
            `prompt_ids` (N, P) int64 and `prompt_mask` (N, P) bool, padded on the left; with completions also
            `completion_ids` (B, C) int64, `completion_mask` (B, C) bool and `learned_mask` (B, C) bool, True for the
            tokens that are learned, padded on the right; and `rows`, the N rows without their tokens.
        """
        prompt_ids, prompt_mask = self._pad([row[PROMPT_IDS] for row in rows], self.max_prompt_length, left=True)
        batch = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "rows": without_tokens(rows),
        }
        if self.max_completion_length is not None:
            sides = [(row, name) for row in rows for name in (COMPLETION_IDS, REJECTED_IDS) if name in row]
            ids, mask = self._pad([row[name] for row, name in sides], self.max_completion_length, left=False)
            learned = mask.clone()
            for i, (row, name) in enumerate(sides):
                if name == COMPLETION_IDS:
                    learned[i, : len(row[LEARNED])] = torch.tensor(row[LEARNED], dtype=torch.bool)
            batch |= {"completion_ids": ids, "completion_mask": mask, "learned_mask": learned}
        return batch

    def _pad(self, sequences: list[list[int]], width: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if device.step_kind() == "eager":  # a compiled or recorded step is kept for one width only
            width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(sequences), width), dtype=torch.bool)
        for i, sequence in enumerate(sequences):
            span = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            ids[i, span] = torch.tensor(sequence, dtype=torch.int64)
            mask[i, span] = True
        return ids, mask
