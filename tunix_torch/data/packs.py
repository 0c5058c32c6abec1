"""Packs rows of supervised fine-tuning: several of them share one row of fixed width, which then has little padding.

A pack is decided once, from the lengths of the rows, and stays the same in every epoch; the order of packs is shuffled
as that of rows would be. Rows of a pack do not see each other, so packing changes what is computed together, not what
is learned from a row.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from ..runtime import device
from .batches import PromptStream, without_tokens
from .rows import COMPLETION_IDS, LEARNED, PROMPT_IDS, Row

WINDOW = 256  # so many rows of a stream are packed at once


def best_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put rows into packs of at most `width` tokens: the longest first, each into the fullest pack that has room.

    Args:
        lengths: tokens of each row, at most `width`.

    Returns:
        the numbers of the rows of each pack. Rows of a pack, and packs, are in the order of the rows.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # packs by how many tokens still fit into them
    rooms: list[int] = []  # the keys of `with_room`, sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = bisect.bisect_left(rooms, lengths[row])
        if place == len(rooms):
            pack, room = len(packs), width
            packs.append([])
        else:
            room = rooms[place]
            pack = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        packs[pack].append(row)
        left = room - lengths[row]
        if left not in with_room:
            with_room[left] = []
            bisect.insort(rooms, left)
        with_room[left].append(pack)
    return sorted(map(sorted, packs))


class PackedRows(torch.utils.data.Dataset):
    """The packs of rows from `prepare_rows`, with completions; each item is the list of a pack's rows."""

    def __init__(self, rows: Sequence[Row] | datasets.Dataset, width: int) -> None:
        self.rows = rows
        self.packs = best_fit(_lengths(rows), width)

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, number: int) -> list[Row]:
        return [self.rows[row] for row in self.packs[number]]


class PackedStream(torch.utils.data.IterableDataset):
    """The packs of a stream, of `WINDOW` rows at a time, in their order. It has no end, as its stream has none."""

    def __init__(self, rows: PromptStream, width: int) -> None:
        self.rows, self.width = rows, width

    def __iter__(self) -> Iterator[list[Row]]:
        source = iter(self.rows)
        while window := list(itertools.islice(source, WINDOW)):
            for pack in best_fit(_lengths(window), self.width):
                yield [window[row] for row in pack]


def packed(rows: "Sequence[Row] | datasets.Dataset | PromptStream", width: int) -> PackedRows | PackedStream:
    """The packs of rows from `prepare_rows`, each of at most `width` tokens."""
    return PackedStream(rows, width) if isinstance(rows, PromptStream) else PackedRows(rows, width)


def _lengths(rows: Sequence[Row] | datasets.Dataset) -> list[int]:
    """Tokens of each row, prompt and completion together."""
    prompts, completions = ([row[name] for row in rows] for name in (PROMPT_IDS, COMPLETION_IDS))
    return [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]


@dataclass
class PackCollator:
    """Makes tensors of packs. Where steps are compiled or recorded, all batches have the full width."""

    pad_token_id: int
    width: int  # W

    def __call__(self, packs: Sequence[list[Row]]) -> dict[str, Any]:
        """A batch of N packs.

        Returns:
            `completion_ids` (N, W) int64, all tokens of a pack's rows one after the other, prompts included;
            `completion_mask` and `learned_mask` (N, W) bool, the tokens that are there and those to learn; `segments`
            (N, W) int64, the number of each token's row in its pack, -1 at padding; `offsets` (N, W) int64, its place
            in its row; and `rows`, the rows of all packs without their tokens. `prompt_ids` (N, 1) int64 are the first
            tokens, by which hosts see that their batches are alike; `prompt_mask` (N, 1) is False, since nothing
            stands before a pack.
        """
        filled = [sum(len(row[PROMPT_IDS]) + len(row[COMPLETION_IDS]) for row in pack) for pack in packs]
        width = max(filled) if device.step_kind() == "eager" else self.width
        ids = torch.full((len(packs), width), self.pad_token_id, dtype=torch.int64)
        segments, offsets = torch.full_like(ids, -1), torch.zeros_like(ids)
        learned = torch.zeros(ids.shape, dtype=torch.bool)
        for i, pack in enumerate(packs):
            start = 0
            for number, row in enumerate(pack):
                tokens = row[PROMPT_IDS] + row[COMPLETION_IDS]
                place = slice(start, start + len(tokens))
                ids[i, place] = torch.tensor(tokens, dtype=torch.int64)
                segments[i, place] = number
                offsets[i, place] = torch.arange(len(tokens))
                marks = [0] * len(row[PROMPT_IDS]) + row[LEARNED]
                learned[i, place] = torch.tensor(marks, dtype=torch.bool)
                start += len(tokens)
        return {
            "prompt_ids": ids[:, :1].clone(),
            "prompt_mask": torch.zeros(len(packs), 1, dtype=torch.bool),
            "completion_ids": ids,
            "completion_mask": segments >= 0,
            "learned_mask": learned,
            "segments": segments,
            "offsets": offsets,
            "rows": [row for pack in packs for row in without_tokens(pack)],
        }
