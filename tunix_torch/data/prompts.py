"""Turns rows into tokenised prompts, and completions back into texts.

`prepare_rows` renders and tokenises every row once, before training, and leaves out rows that are too long. For
supervised fine-tuning it tokenises the row's completion too. `shapes.py` finds the question, the answer and the
completion in a row; `batches.py` pads the tokens to batches.
"""

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.compute
import torch
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..model import tiny
from ..model.loading import end_of_turn_id
from .batches import PromptStream
from .chat import Chat, Piece, own_template_kwargs
from .preference import pair_of
from .rows import (
    ANSWER,
    COMPLETION_IDS,
    LEARN,
    LEARNED,
    NO_ANSWER,
    PREFIX,
    PROMPT,
    PROMPT_IDS,
    QUESTION,
    REASONING,
    REJECTED_IDS,
    TEXT,
    TURNS,
    WHERE,
    Row,
    prompt_of,
)
from .shapes import check_encodable, completion_of, normalize_row
from .values import features_to_convert, plain_row

logger = logging.getLogger(__name__)

# The columns that `prepare_rows` adds, with their types in a `datasets.Dataset`.
ADDED = dict.fromkeys((WHERE, QUESTION, TURNS, LEARN, ANSWER, NO_ANSWER, REASONING, PROMPT), datasets.Value("string"))
ADDED |= dict.fromkeys((PROMPT_IDS, COMPLETION_IDS, REJECTED_IDS), datasets.List(datasets.Value("int32")))
ADDED |= {LEARNED: datasets.List(datasets.Value("int8"))}

# Tokens are cached on disk for texts of at least so many characters; fewer are tokenised faster than a file is read.
CACHED_CHARACTERS = 1_000_000


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str | Sequence[Mapping[str, Any]],
    system_message: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    wrap_prompts: bool = True,
) -> str:
    """Render a question with the tokenizer's chat template, as the text that the model sees.

    A tokenizer without a chat template gives the plain question and a line end. The system message is put before the
    question, inside the user's turn, because Gemma has no turn for it.

    Args:
        question: a text, or a list of messages that `shapes.check_messages` accepts. The system message then goes into
            the first message of the user, unless the list has a system message of its own.
        chat_template_kwargs: names and values for the template.
        wrap_prompts: False: a text stays as it stands, after the system message.

    Raises:
        ValueError: the question is a list of messages and there is no chat template, or the template refuses it.
    """
    return Chat(tokenizer, system_message, chat_template_kwargs or {}, wrap_prompts).prompt(question)


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts. A chat template has written the BOS token already; plain text gets it here."""
    return tokenizer(list(prompts), add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def token_lists(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The tokens of completions as lists without padding, each with the token that ended it, if one did.

    Args:
        ids, mask: (B, C) int64 and bool, in main memory; the mask is True up to a completion's end.
    """
    return [row[:length] for row, length in zip(ids.tolist(), mask.sum(dim=1).tolist(), strict=True)]


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, mask: torch.Tensor, eos_token_ids: Sequence[int]
) -> list[str]:
    """Completions as texts, without padding, BOS, and the token that ended each completion.

    Other special tokens stay in the text: `<answer>` may be one of them, and reward functions look for it.

    Args:
        ids, mask: (B, C) int64 and bool, in main memory; the mask is True up to a completion's end.
    """
    dropped = (tokenizer.pad_token_id, tokenizer.bos_token_id)
    rows = [row[:-1] if row and row[-1] in eos_token_ids else row for row in token_lists(ids, mask)]
    return tokenizer.batch_decode([[token for token in row if token not in dropped] for row in rows])


def prepare_rows(
    rows: Sequence[Row] | datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    max_completion_length: int | None = None,
    system_message: str = "",
    overlong: str = "drop",
    num_embeddings: int | None = None,
    pairs: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    wrap_prompts: bool = True,
) -> "list[Row] | datasets.Dataset | PromptStream":
    """Add each row's prompt, as a text and as tokens, and for SFT the tokens of its completion.

    The added columns have the names in `ADDED`; the data's own columns stay unchanged. Prompts that are too long are
    never cut: their rows are left out and counted in a warning, or raise an error where `overlong` is "raise". Rows
    whose completions are too long are always left out. Rows that this function has returned before come back unchanged.

    Args:
        max_prompt_length: P, in tokens.
        max_completion_length: C, in tokens, for SFT; None: completions are not tokenised.
        num_embeddings: how many embeddings the model has, one for each token that it knows; None: not checked.
        pairs: the rows are preferences, and each has a chosen and a rejected completion; see `preference.py`.
        chat_template_kwargs: names and values for the chat template; a row's column of this name wins.
        wrap_prompts: False: a question that is a text is not put into the chat template.

    Returns:
        a list for a list, a `Dataset` for a `Dataset` (its tokens are in the cache of `datasets`), and for an
        `IterableDataset` a `PromptStream`, which tokenises rows as they are drawn.

    Raises:
        ValueError: a row has no question, has no completion for SFT, can't be rendered, or has a token without an
            embedding; every row is too long; or one row is too long and `overlong` is "raise".
    """
    kwargs = dict(chat_template_kwargs or {})
    if kwargs and tokenizer.chat_template is None:
        raise ValueError(f"chat_template_kwargs={kwargs!r}: this tokenizer has no chat template; leave them out")
    chat = Chat(tokenizer, system_message, kwargs, wrap_prompts)
    encoder = _Encoder(chat, max_completion_length is not None, num_embeddings, pairs)
    if isinstance(rows, datasets.IterableDataset):
        encoder.features = features_to_convert(rows.features or {})
        return PromptStream(rows.with_format(None), encoder.encode, max_prompt_length, max_completion_length, overlong)
    last_added = REJECTED_IDS if pairs else COMPLETION_IDS if max_completion_length is not None else PROMPT_IDS
    if isinstance(rows, datasets.Dataset):
        if not len(rows) or last_added in rows.column_names:
            return rows
        ready = _encode_dataset(rows.with_format(None), encoder)
    else:
        rows = list(rows)
        if not rows or last_added in rows[0]:
            return rows
        ready = encoder.encode(rows, range(1, len(rows) + 1))
    ready = _without_long_rows(ready, PROMPT_IDS, "max_prompt_length", max_prompt_length, overlong)
    if max_completion_length is not None:
        for column in (COMPLETION_IDS, REJECTED_IDS)[: 1 + pairs]:
            ready = _without_long_rows(ready, column, "generation_max_length", max_completion_length)
    return ready


@functools.cache
def _hash_of_code() -> str:
    """A hash of all files that decide which prompt and completion a row gets.

    The cache of tokenised rows depends on it, so that no row is found there that other code has made.
    """
    room = Path(__file__).parent
    others = ("rewards/answers.py", "model/loading.py", "config/checks.py")
    files = [*sorted(room.glob("*.py")), *(room.parent / name for name in others)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class _Written(NamedTuple):
    """A row as texts, before they are tokenised."""

    prompt: tuple[str, bool]  # a text, and whether the tokenizer adds special tokens to it
    pieces: list[Piece]  # what follows it
    end: int  # the token that ends the last of them


@dataclass
class _Encoder:
    """Renders and tokenises rows. `datasets` hashes all of its fields to find rows that it has cached."""

    chat: Chat
    with_completions: bool
    num_embeddings: int | None
    pairs: bool = False
    # The types of the columns whose values `plain_row` converts.
    features: dict[str, Any] = field(default_factory=dict)
    code: str = field(default_factory=_hash_of_code)

    def encode(self, rows: Sequence[Row], numbers: Sequence[int]) -> list[Row]:
        """Copies of the rows with the columns of `ADDED`; `numbers` are the rows' numbers for error messages."""
        rows = [self._normalized(row, number) for row, number in zip(rows, numbers, strict=True)]
        tokenizer, written = self.chat.tokenizer, []
        end_of_turn = end_of_turn_id(tokenizer) if self.with_completions else 0
        pairs = [pair_of(row) for row in rows] if self.pairs else []
        for i, row in enumerate(rows):
            question = prompt_of(row) if row[TURNS] else row[QUESTION]
            completion = completion_of(row) if self.with_completions and not pairs else ""
            if pairs:
                question, completion = pairs[i].prompt, pairs[i].chosen
            try:
                written.append(self._write(row, question, completion, end_of_turn))
            except ValueError as error:
                raise ValueError(f"{row[WHERE]}: {error}") from error
            check_encodable(written[-1].prompt[0], row[WHERE], "the prompt")  # with choices, and fields of messages
            for piece, _ in written[-1].pieces:
                check_encodable(piece, row[WHERE], "what follows the prompt")
        texts = [row.prompt for row in written]
        plain = _token_ids(tokenizer, [text for text, special in texts if special], add_special_tokens=True)
        ready = _token_ids(tokenizer, [text for text, special in texts if not special], add_special_tokens=False)
        plain, ready = iter(plain), iter(ready)
        for row, (text, special) in zip(rows, texts, strict=True):
            row[PROMPT], row[PROMPT_IDS] = text, next(plain if special else ready)
        if self.with_completions:
            pieces = [text for row in written for text, _ in row.pieces]
            ids = iter(_token_ids(tokenizer, pieces, add_special_tokens=False))
            for row, text in zip(rows, written, strict=True):
                self._add_completion(row, text, [next(ids) for _ in text.pieces])
        if self.pairs:
            ids = _token_ids(tokenizer, [pair.rejected for pair in pairs], add_special_tokens=False)
            for row, text, of_row in zip(rows, written, ids, strict=True):
                row[REJECTED_IDS] = of_row if of_row[-1:] == [text.end] else [*of_row, text.end]
        for row in rows:
            self._check_ids(row, row[PROMPT_IDS] + row.get(COMPLETION_IDS, []) + row.get(REJECTED_IDS, []))
        return rows

    def _write(
        self,
        row: Row,
        question: str | list[Mapping[str, Any]],
        completion: str | list[Mapping[str, Any]],
        end_of_turn: int,
    ) -> "_Written":
        """The prompt of a row as a text, and what follows it, as texts too.

        `completion` is from `completion_of`, or with pairs the chosen one.
        """
        chat, own_kwargs, eos = self.chat, own_template_kwargs(row), self.chat.tokenizer.eos_token_id
        if row[LEARN] == TEXT:
            return _Written((completion, True), [], eos)
        if isinstance(completion, str):
            by_template = chat.uses_template(question)
            text = chat.prompt(question, own_kwargs)
            return _Written((text, not by_template), [(completion, True)], end_of_turn if by_template else eos)
        messages = completion[len(question) :] if row[LEARN] else completion
        prompt, pieces = chat.pieces(question, messages, own_kwargs, end_of_turn)
        return _Written((prompt, False), pieces, end_of_turn)

    def _add_completion(self, row: Row, written: "_Written", ids: list[list[int]]) -> None:
        """Add the tokens that follow the prompt of a row, and which of them are learned.

        Of a plain text the prompt is the first token, which nothing predicts, and all others are learned.
        """
        if row[LEARN] == TEXT:
            row[PROMPT], row[PROMPT_IDS], ids = "", row[PROMPT_IDS][:1], [row[PROMPT_IDS][1:]]
        learned = [int(is_learned) for _, is_learned in written.pieces or [("", True)]]
        tokens = [token for part in ids for token in part]
        marks = [mark for part, mark in zip(ids, learned, strict=True) for _ in part]
        ends = bool(tokens) and tokens[-1] == written.end  # as the template, or the data, has written it
        row[COMPLETION_IDS], row[LEARNED] = (tokens, marks) if ends else ([*tokens, written.end], [*marks, 1])

    def encode_columns(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """The columns to add to a batch of rows that `datasets.Dataset.map` passes as columns."""
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        rows = self.encode(rows, [index + 1 for index in indices])
        return {name: [row[name] for row in rows] for name in ADDED if name in rows[0]}

    def _normalized(self, row: Row, number: int) -> Row:
        """A copy of the row with the values that `normalize_row` derives.

        They are derived from converted values, so that an expected answer is a class's name or a number as it was
        meant; the row's own columns keep the values that the data set has.
        """
        row_to_read = plain_row(row, self.features) if self.features else row
        normal = normalize_row(row_to_read, number, "data set", supervised=self.with_completions)
        return {**normal, **row}

    def _check_ids(self, row: Row, ids: list[int]) -> None:
        """Raise ValueError for a token without an embedding, which a tokenizer with added tokens may give."""
        largest = max(ids, default=0)
        if self.num_embeddings is not None and largest >= self.num_embeddings:
            token = self.chat.tokenizer.convert_ids_to_tokens(largest)
            raise ValueError(
                f"{row[WHERE]}: its token {largest}, {token!r}, has no embedding: the model has {self.num_embeddings}. "
                "Call model.resize_token_embeddings(len(tokenizer)) before, or give the model's own tokenizer"
            )


def _encode_dataset(rows: datasets.Dataset, encoder: _Encoder) -> datasets.Dataset:
    encoder.features = features_to_convert(rows.features)
    left_out = (() if encoder.with_completions else (COMPLETION_IDS, LEARNED)) + (
        () if encoder.pairs else (REJECTED_IDS,)
    )
    added = {name: kind for name, kind in ADDED.items() if name not in left_out}
    return rows.map(
        encoder.encode_columns,
        batched=True,
        with_indices=True,
        features=datasets.Features({**rows.features, **added}),
        desc="Tokenising",
    )


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Token ids of texts. Those of many texts are kept in the cache folder, for the next run with the same texts."""

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": tokenizer(batch["text"], add_special_tokens=add_special_tokens)["input_ids"]}

    if not texts:
        return []
    if sum(map(len, texts)) < CACHED_CHARACTERS:
        return encode({"text": texts})["ids"]
    key = Hasher.hash([texts, tokenizer, add_special_tokens])
    file = tiny.folder_in_cache("tokens") / f"{key}.arrow"
    how = {"cache_file_name": str(file), "new_fingerprint": key, "desc": "Tokenising"}
    try:
        return datasets.Dataset.from_dict({"text": texts}).map(encode, batched=True, remove_columns="text", **how)[
            "ids"
        ][:]
    except (pyarrow.ArrowException, OSError) as error:
        hint = (
            "if it is there, it is damaged: delete it; else the disk may be full, or may not be written (TUNIX_CACHE)"
        )
        raise ValueError(f"{file}: the cache of tokens can't be used: {error}; {hint}") from error


def token_counts(rows: list[Row] | datasets.Dataset, column: str = PROMPT_IDS) -> list[int]:
    """How many tokens each row has in a column that `prepare_rows` has added."""
    if isinstance(rows, datasets.Dataset):
        table = rows.select_columns(column).with_format("arrow")[:]
        return pyarrow.compute.list_value_length(table.column(column)).to_pylist()
    return [len(row[column]) for row in rows]


def _without_long_rows(
    rows: list[Row] | datasets.Dataset, column: str, setting: str, limit: int, overlong: str = "drop"
) -> list[Row] | datasets.Dataset:
    """The rows that have at most `limit` tokens in a column; see `prepare_rows` for the others."""
    lengths = token_counts(rows, column)
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    if len(kept) == len(lengths):
        return rows
    what = column.removeprefix(PREFIX).removesuffix("_ids")
    report = f"{len(lengths) - len(kept)} of {len(lengths)} rows have a {what} longer than {setting}={limit} tokens"
    if overlong == "raise":
        first = next(i for i, length in enumerate(lengths) if length > limit)
        raise ValueError(f"{report}; the first is row {first + 1} with {lengths[first]}: raise {setting}")
    if not kept:
        raise ValueError(f"{report}; the longest has {max(lengths)}: raise {setting}")
    logger.warning("%s and are left out; the longest has %d", report, max(lengths))
    return rows.select(kept) if isinstance(rows, datasets.Dataset) else [rows[i] for i in kept]
