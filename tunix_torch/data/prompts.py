"""Rows -> prompts of fixed width: rendered, tokenised once, and those that are too long left out; then batches.

`prepare_rows` takes a list of rows, a `datasets.Dataset`, which stays on disk, or a stream. Supervised fine-tuning
takes the row's `completion` too. `shapes.py` says what a row may look like, `rows.py` what is added to it.
"""

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute
import torch
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..model import tiny
from ..model.loading import end_of_turn_id
from ..runtime import device
from .readers import features_that_change, plain_row
from .rows import (
    ANSWER,
    COMPLETION_IDS,
    NO_ANSWER,
    PREFIX,
    PROMPT,
    PROMPT_IDS,
    QUESTION,
    REASONING,
    TURNS,
    WHERE,
    Row,
    prompt_of,
)
from .shapes import completion_of, normalize_row

logger = logging.getLogger(__name__)

ADDED = dict.fromkeys((WHERE, QUESTION, TURNS, ANSWER, NO_ANSWER, REASONING, PROMPT), datasets.Value("string"))
ADDED |= dict.fromkeys((PROMPT_IDS, COMPLETION_IDS), datasets.List(datasets.Value("int32")))

CACHED_CHARACTERS = 1_000_000  # of texts; fewer are tokenised in less time than looking after a file is worth
CHUNK = 32  # rows of a stream that are tokenised at once


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str | Sequence[Mapping[str, Any]], system_message: str = ""
) -> str:
    """The question as the text that the model sees: the tokenizer's chat template, else the plain question.

    The instruction is put before the question, in the user's turn, as Gemma has no turn for it. A question may also be
    messages (see `shapes.check_messages`); the instruction is for the first of the user, unless they have their own.

    Raises:
        ValueError: messages without a chat template, or that it refuses.
    """
    if not isinstance(question, str) and tokenizer.chat_template is None:
        raise ValueError("the question is a list of messages, and this tokenizer has no chat template to render them")
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(map(dict, question))
    messages = [{name: part for name, part in message.items() if part is not None} for message in messages]
    if system_message and all(message["role"] != "system" for message in messages):
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = f"{system_message}\n\n{first['content']}"
    if tokenizer.chat_template is None:
        return f"{messages[0]['content']}\n"
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, and says in its own way what it refuses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the tokenizer's chat template refuses the question: {reason}") from error


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
    num_embeddings: int | None = None,
) -> "list[Row] | datasets.Dataset | PromptStream":
    """Add the prompt, as text and tokens, and for SFT (`max_completion_length` given) the completion's tokens.

    They are under names of their own (see `rows.py`): the data's columns stay as they are. Prompts that are too long
    are never cut: their rows are left out and counted in a warning, or with `overlong` "raise" are an error. Rows with
    completions that are too long are left out. Rows that this function has returned before are taken as they are. What
    comes back is of the kind that came in: a list, a `Dataset` (its tokens are in the cache of `datasets`), or for an
    `IterableDataset` a `PromptStream`.

    Args:
        num_embeddings: of the model, which must have one for each token; None: not looked at.

    Raises:
        ValueError: a row without a question, or for SFT without a completion; one that can't be rendered, or has a
            token without an embedding; every row is too long, or one with `overlong` "raise".
    """
    with_completions = max_completion_length is not None
    encoder = _Encoder(tokenizer, system_message, with_completions, num_embeddings)
    last = COMPLETION_IDS if with_completions else PROMPT_IDS  # of what is added
    if isinstance(rows, datasets.IterableDataset):
        encoder.features = features_that_change(rows.features or {})
        return PromptStream(rows.with_format(None), encoder, max_prompt_length, max_completion_length, overlong)
    if isinstance(rows, datasets.Dataset):
        if not len(rows) or last in rows.column_names:
            return rows
        rows = rows.with_format(None)
        encoder.features = features_that_change(rows.features)
        added = {name: kind for name, kind in ADDED.items() if with_completions or name != COMPLETION_IDS}
        ready = rows.map(
            encoder.encode_columns,
            batched=True,
            with_indices=True,
            features=datasets.Features({**rows.features, **added}),
            desc="Tokenising",
        )
    else:
        rows = list(rows)
        if not rows or last in rows[0]:
            return rows
        ready = encoder.encode(rows, range(1, len(rows) + 1))
    ready = _leave_out_long(ready, PROMPT_IDS, "max_prompt_length", max_prompt_length, overlong)
    if max_completion_length is not None:
        ready = _leave_out_long(ready, COMPLETION_IDS, "generation_max_length", max_completion_length)
    return ready


@functools.cache
def _recipe() -> str:
    """Changes with the files that make prompts of rows, so that nothing made by others is found in a cache."""
    files = [Path(__file__).with_name(name) for name in ("prompts.py", "shapes.py", "rows.py", "readers.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@dataclass
class _Encoder:
    """Adds the tokens to rows."""

    tokenizer: PreTrainedTokenizerBase
    system_message: str
    with_completions: bool
    num_embeddings: int | None
    features: dict[str, Any] = field(default_factory=dict)  # of the data: see `readers.plain_row`
    recipe: str = field(default_factory=_recipe)  # part of what `datasets` finds its cache by

    def encode(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[Row]:
        tokenizer = self.tokenizer
        rows = [self._normalized(row, number) for row, number in zip(rows, numbers, strict=True)]
        for row in rows:
            question = prompt_of(row) if row[TURNS] else row[QUESTION]
            try:
                row[PROMPT] = render_prompt(tokenizer, question, self.system_message)
            except ValueError as error:
                raise ValueError(f"{row[WHERE]}: {error}") from error
        prompts = [row[PROMPT] for row in rows]
        ids = _token_ids(tokenizer, prompts, add_special_tokens=tokenizer.chat_template is None)
        for i, row in enumerate(rows):
            row[PROMPT_IDS] = ids[i]
        if self.with_completions:
            end = end_of_turn_id(tokenizer)
            ids = _token_ids(tokenizer, [completion_of(row) for row in rows], add_special_tokens=False)
            for i, row in enumerate(rows):
                row[COMPLETION_IDS] = [*ids[i], end]
        for row in rows:
            self._check_ids(row, row[PROMPT_IDS] + row.get(COMPLETION_IDS, []))
        return rows

    def _check_ids(self, row: Row, ids: list[int]) -> None:
        """A tokenizer to which tokens were added may know some that the model has no embedding for."""
        largest = max(ids, default=0)
        if self.num_embeddings is not None and largest >= self.num_embeddings:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{row[WHERE]}: its token {largest}, {token!r}, has no embedding: the model has {self.num_embeddings}. "
                "Call model.resize_token_embeddings(len(tokenizer)) before, or give the model's own tokenizer"
            )

    def _normalized(self, row: Row, number: int) -> Row:
        """A copy. Of answers that are classes or float32, the expected answer is the name, or the number as meant."""
        normal = normalize_row(plain_row(row, self.features) if self.features else row, number, "data set")
        return {**normal, **row}

    def encode_columns(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """For `datasets.Dataset.map`: the columns to add."""
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows = self.encode(rows, [index + 1 for index in indices])
        return {name: [row[name] for row in rows] for name in ADDED if name in rows[0]}


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
    what = column.removeprefix(PREFIX).removesuffix("_ids")
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
        ValueError: when iterated over: a row without a question, an epoch in which no row fits, or an
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
        length, limit = len(row[PROMPT_IDS]), self.max_prompt_length
        what = f"a prompt of {length} tokens, longer than max_prompt_length={limit}"
        if length > limit and self.overlong == "raise":
            raise ValueError(f"row {self.num_rows} of the stream has {what}: raise max_prompt_length")
        if length <= limit and self.max_completion_length is not None:
            length, limit = len(row[COMPLETION_IDS]), self.max_completion_length
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
        prompt_ids, prompt_mask = self._pad([row[PROMPT_IDS] for row in rows], self.max_prompt_length, left=True)
        batch = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "rows": [{k: v for k, v in row.items() if k not in (PROMPT_IDS, COMPLETION_IDS)} for row in rows],
        }
        if self.max_completion_length is not None:
            completions = [row[COMPLETION_IDS] for row in rows]
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
