"""Rows -> prompts of fixed width: rendered, tokenised once, and those that are too long left out; then batches.

`prepare_rows` takes a list of rows, a `datasets.Dataset`, which stays on disk, or a stream. Supervised fine-tuning
takes the row's `completion` too. `sources.py` says what a row is.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow.compute
import torch
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from . import device, tiny
from .model import end_of_turn_id
from .readers import Row
from .sources import normalize_row

logger = logging.getLogger(__name__)

CACHED_CHARACTERS = 1_000_000  # of texts; fewer are tokenised in less time than looking after a file is worth
CHUNK = 32  # rows of a stream that are tokenised at once


def render_prompt(tokenizer: PreTrainedTokenizerBase, question: str, system_message: str = "") -> str:
    """The question as the text that the model sees: the tokenizer's chat template, else the plain question.

    The instruction is put before the question, in the user's turn, as Gemma has no turn for it.
    """
    content = f"{system_message}\n\n{question}" if system_message else question
    if tokenizer.chat_template is None:
        return f"{content}\n"
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts; a chat template has put the BOS token in already, plain text gets it here."""
    return tokenizer(list(prompts), add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, mask: torch.Tensor, eos_token_ids: Sequence[int]
) -> list[str]:
    """The texts of completions without padding, BOS and the token that ended each of them.

    Other special tokens stay: `<answer>` may be one, and reward functions look for it.

    Args:
        ids, mask: (B, C) int64 and bool, on the host; the mask is True up to a completion's end.
    """
    left_out = (tokenizer.pad_token_id, tokenizer.bos_token_id)
    rows = [row[:length] for row, length in zip(ids.tolist(), mask.sum(dim=1).tolist(), strict=True)]
    rows = [row[:-1] if row and row[-1] in eos_token_ids else row for row in rows]
    return tokenizer.batch_decode([[token for token in row if token not in left_out] for row in rows])


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of many texts, from the cache folder where the same tokenizer has seen the same texts before."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": tokenizer(batch["text"], add_special_tokens=add_special_tokens)["input_ids"]}

    if sum(map(len, texts)) < CACHED_CHARACTERS:
        return encode({"text": texts})["ids"]
    key = Hasher.hash([texts, tokenizer, add_special_tokens])
    file = tiny.cache_folder() / "tokens" / f"{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict({"text": texts}).map(
        encode, batched=True, remove_columns="text", cache_file_name=str(file), new_fingerprint=key, desc="Tokenising"
    )
    return table["ids"][:]


def prepare_rows(
    rows: Sequence[Row] | datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    max_completion_length: int | None = None,
    system_message: str = "",
    overlong: str = "drop",
) -> "list[Row] | datasets.Dataset | PromptStream":
    """Add `prompt` (the rendered text) and `prompt_ids`; and `completion_ids` for SFT (`max_completion_length` given).

    Prompts that are too long are never cut: their rows are left out and counted in a warning, or with `overlong`
    "raise" are an error. Rows with completions that are too long are left out. Rows that have `prompt_ids` already
    are taken as they are. What comes back is of the kind that came in: a list, a `Dataset` (its tokens are in the
    cache of `datasets`), or for an `IterableDataset` a `PromptStream`.

    Raises:
        ValueError: a row without a question or an answer, every row is too long, or one with `overlong` "raise".
    """
    encoder = _Encoder(tokenizer, system_message, max_completion_length is not None)
    if isinstance(rows, datasets.IterableDataset):
        return PromptStream(rows, encoder, max_prompt_length, max_completion_length, overlong)
    if isinstance(rows, datasets.Dataset):
        if not len(rows) or "prompt_ids" in rows.column_names:
            return rows
        ready = rows.map(
            encoder.encode_columns,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            desc="Tokenising",
        )
    else:
        rows = list(rows)
        if not rows or "prompt_ids" in rows[0]:
            return rows
        ready = encoder.encode(rows, range(1, len(rows) + 1))
    ready = _leave_out_long(ready, "prompt_ids", "max_prompt_length", max_prompt_length, overlong)
    if max_completion_length is not None:
        ready = _leave_out_long(ready, "completion_ids", "generation_max_length", max_completion_length)
    return ready


@dataclass
class _Encoder:
    """Adds the tokens to rows."""

    tokenizer: PreTrainedTokenizerBase
    system_message: str
    with_completions: bool

    def encode(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[Row]:
        tokenizer = self.tokenizer
        rows = [normalize_row(row, number, "data set") for row, number in zip(rows, numbers, strict=True)]
        prompts = [render_prompt(tokenizer, row["question"], self.system_message) for row in rows]
        ids = _token_ids(tokenizer, prompts, add_special_tokens=tokenizer.chat_template is None)
        for i, row in enumerate(rows):
            row |= {"prompt": prompts[i], "prompt_ids": ids[i]}
        if self.with_completions:
            end = end_of_turn_id(tokenizer)
            ids = _token_ids(tokenizer, [row["completion"] for row in rows], add_special_tokens=False)
            for i, row in enumerate(rows):
                row["completion_ids"] = [*ids[i], end]
        return rows

    def encode_columns(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """For `datasets.Dataset.map`."""
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows = self.encode(rows, [index + 1 for index in indices])
        return {name: [row.get(name) for row in rows] for name in dict.fromkeys(itertools.chain(*rows))}


def _leave_out_long(
    rows: list[Row] | datasets.Dataset, column: str, setting: str, limit: int, overlong: str = "drop"
) -> list[Row] | datasets.Dataset:
    if isinstance(rows, datasets.Dataset):
        table = rows.select_columns(column).with_format("arrow")[:]
        lengths = pyarrow.compute.list_value_length(table.column(column)).to_pylist()
    else:
        lengths = [len(row[column]) for row in rows]
    short = [i for i, length in enumerate(lengths) if length <= limit]
    if len(short) == len(lengths):
        return rows
    what = column.removesuffix("_ids")
    report = f"{len(lengths) - len(short)} of {len(lengths)} rows have a {what} longer than {setting}={limit} tokens"
    if overlong == "raise":
        first = next(i for i, length in enumerate(lengths) if length > limit)
        raise ValueError(f"{report}; the first is row {first + 1} with {lengths[first]}: raise {setting}")
    if not short:
        raise ValueError(f"{report}; the longest has {max(lengths)}: raise {setting}")
    logger.warning("%s and are left out; the longest has %d", report, max(lengths))
    return rows.select(short) if isinstance(rows, datasets.Dataset) else [rows[i] for i in short]


class PromptStream(torch.utils.data.IterableDataset):
    """Prompts of a streamed data set, made as they are drawn.

    It has no end: after the last row it begins the next epoch, in that epoch's order. So a resumed run, which skips as
    many batches as were drawn, draws on as if it had never stopped, also past the end of the data set.

    Attributes:
        num_rows: rows read since the newest iteration began, and of these
        num_overlong: those left out because prompt or completion was too long.

    Raises:
        ValueError: when iterated over: a row without a question or an answer, an epoch in which no row fits, or an
            overlong prompt where `overlong` is "raise".
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        encoder: _Encoder,
        max_prompt_length: int,
        max_completion_length: int | None,
        overlong: str,
    ) -> None:
        self.rows, self.encoder, self.overlong = rows, encoder, overlong
        self.max_prompt_length, self.max_completion_length = max_prompt_length, max_completion_length
        self.num_rows = self.num_overlong = 0

    def __iter__(self) -> Iterator[Row]:
        self.num_rows = self.num_overlong = 0
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            source, num_before = iter(self.rows), self.num_rows - self.num_overlong
            while chunk := list(itertools.islice(source, CHUNK)):
                numbers = range(self.num_rows + 1, self.num_rows + 1 + len(chunk))
                for row in self.encoder.encode(chunk, numbers):
                    self.num_rows += 1
                    if self._fits(row):
                        yield row
            if self.num_rows - self.num_overlong == num_before:
                raise ValueError(
                    f"the stream of training rows has none that fits max_prompt_length={self.max_prompt_length}: "
                    f"{self.num_overlong} are longer"
                )

    def _fits(self, row: Row) -> bool:
        length, limit = len(row["prompt_ids"]), self.max_prompt_length
        what = f"a prompt of {length} tokens, longer than max_prompt_length={limit}"
        if length > limit and self.overlong == "raise":
            raise ValueError(f"row {self.num_rows} of the stream has {what}: raise max_prompt_length")
        if length <= limit and self.max_completion_length is not None:
            length, limit = len(row["completion_ids"]), self.max_completion_length
            what = f"a completion of {length} tokens, longer than generation_max_length={limit}"
        if length <= limit:
            return True
        if self.num_overlong == 0:
            logger.warning("Row %d of the stream has %s: it is left out, as all like it", self.num_rows, what)
        self.num_overlong += 1
        return False


@dataclass
class Collator:
    """Rows -> padded tensors. Widths are fixed on XLA, where a new shape is a compilation; else as short as can be.

    For SFT (`max_completion_length` given) completions are added with the token that ends a turn; `prepare_rows` has
    left out those that are too long.
    """

    pad_token_id: int
    max_prompt_length: int
    max_completion_length: int | None = None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        prompt_ids, prompt_mask = self._pad([row["prompt_ids"] for row in rows], self.max_prompt_length, left=True)
        batch = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "rows": [{k: v for k, v in row.items() if k not in ("prompt_ids", "completion_ids")} for row in rows],
        }
        if self.max_completion_length is not None:
            completions = [row["completion_ids"] for row in rows]
            ids, mask = self._pad(completions, self.max_completion_length, left=False)
            batch |= {"completion_ids": ids, "completion_mask": mask}
        return batch

    def _pad(self, sequences: list[list[int]], width: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if device.KIND != "xla":
            width = max(map(len, sequences))
        ids = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((len(sequences), width), dtype=torch.bool)
        for i, sequence in enumerate(sequences):
            span = slice(width - len(sequence), width) if left else slice(0, len(sequence))
            ids[i, span] = torch.tensor(sequence, dtype=torch.int64)
            mask[i, span] = True
        return ids, mask
