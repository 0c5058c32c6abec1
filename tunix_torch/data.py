"""Rows of a data set -> prompts of fixed width.

A row is a dict. It needs a question (`prompt` or `question`) and an answer (`answer`, `answers` or
`expected_answers`, which are the same column); GSM8K's worked answers, "... #### 72", are split into reasoning and
answer. Supervised fine-tuning takes the row's `completion`, or builds it from reasoning and answer.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from . import device, tiny
from .config import DataConfig
from .model import end_of_turn_id

logger = logging.getLogger(__name__)

QUESTION_COLUMNS = ("prompt", "question")
ANSWER_COLUMNS = ("answer", "answers", "expected_answers")
NUM_GENERATED_ROWS = 4096

Row = dict[str, Any]


def load_rows(path: str, config_name: str | None = None, split: str = "train", setting: str = "data_path") -> list[Row]:
    """Rows of a .json file (a list, or one object a line), a .jsonl file, or a Hugging Face data set.

    Args:
        setting: the name that `path` has for the user.

    Raises:
        ValueError: no such file or data set, JSON that can't be read (with its line), or no rows.
    """
    if Path(path).suffix in (".json", ".jsonl") or Path(path).is_file():
        return _read_file(Path(path), setting)
    import datasets  # here because it takes seconds, and files don't need it

    try:
        rows = [dict(row) for row in datasets.load_dataset(path, config_name, split=split)]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{setting}={path!r}: neither a file nor a data set that could be loaded: {reason}") from error
    return rows


def _read_file(path: Path, setting: str) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"{setting}={str(path)!r}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting}={str(path)!r}: not UTF-8: {error}") from error
    try:
        whole = json.loads(text) if path.suffix == ".json" else None
    except json.JSONDecodeError as error:
        whole, whole_error = None, error
    else:
        whole_error = None
    if isinstance(whole, list):
        rows = whole
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also cuts at U+2028, within strings
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                problem = whole_error if whole_error is not None and number == 1 else None
                at = (problem.lineno, problem.msg) if problem else (number, error.msg)
                raise ValueError(f"{path}, line {at[0]}: not valid JSON: {at[1]}") from error
    if not rows:
        raise ValueError(f"{path}: no rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f'{path}, row {number}: expected an object such as {{"question": ..., "answer": ...}}')
    return rows


def normalize_row(row: Row, number: int, source: str) -> Row:
    """One row with `question`, `answer` (str) and, where the data has one, `completion`; other columns are kept.

    Raises:
        ValueError: no question or no answer, naming the row.
    """
    question = next((row[name] for name in QUESTION_COLUMNS if row.get(name)), None)
    answer = next((row[name] for name in ANSWER_COLUMNS if row.get(name) is not None), None)
    if question is None:
        raise ValueError(f"{source}, row {number}: no question; expected a column named prompt or question")
    if not isinstance(question, str):
        raise ValueError(f"{source}, row {number}: the question is a {type(question).__name__}, expected a text")
    if isinstance(answer, list):
        if len(answer) != 1:
            raise ValueError(f"{source}, row {number}: {len(answer)} answers; expected one")
        answer = answer[0]
    reasoning, mark, final = ("", "", "") if answer is None else str(answer).rpartition("####")
    if not final.strip():
        raise ValueError(f"{source}, row {number}: no answer; expected a column named {', '.join(ANSWER_COLUMNS)}")
    result = {name: value for name, value in row.items() if name not in QUESTION_COLUMNS + ANSWER_COLUMNS}
    result["question"], result["answer"] = question, final.strip()
    if "completion" not in result:
        reasoning = reasoning if mark else row.get("reasoning", "")
        result["completion"] = f"<reasoning>{str(reasoning).strip()}</reasoning>\n<answer>{final.strip()}</answer>"
    if not isinstance(result["completion"], str):
        kind = type(result["completion"]).__name__
        raise ValueError(f"{source}, row {number}: the completion is a {kind}, expected a text")
    return result


def load_data(config: DataConfig, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows. Without `data_path`: generated arithmetic, no problem in both.

    Raises:
        ValueError: see `load_rows` and `normalize_row`.
    """

    def load(path: str, split: str, setting: str) -> list[Row]:
        rows = load_rows(path, config.dataset_config, split, setting)
        return [normalize_row(row, number, path) for number, row in enumerate(rows, start=1)]

    if config.data_path is None:
        train = tiny.arithmetic_rows("train", config.num_train_rows or NUM_GENERATED_ROWS, seed)
    else:
        train = load(config.data_path, config.dataset_split, "data_path")[: config.num_train_rows]
    if config.val_data_path is not None:
        evaluation = load(config.val_data_path, config.val_dataset_split, "val_data_path")[: config.num_eval_rows]
    else:
        evaluation = [] if config.data_path else tiny.arithmetic_rows("test", config.num_eval_rows)
    return train, evaluation


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


def prepare_rows(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    max_completion_length: int | None = None,
    system_message: str = "",
) -> list[Row]:
    """Add `prompt` (the rendered text) and `prompt_ids`; and `completion_ids` for SFT (`max_completion_length` given).

    Rows that are too long are left out, never cut, and counted in a warning. Rows that have `prompt_ids` already are
    taken as they are.

    Raises:
        ValueError: a row without a question or an answer, or every row is too long.
    """
    rows = list(rows)
    if not rows or "prompt_ids" in rows[0]:
        return rows
    rows = [normalize_row(row, number, "data set") for number, row in enumerate(rows, 1)]
    prompts = [render_prompt(tokenizer, row["question"], system_message) for row in rows]
    ready = [
        {**row, "prompt": prompt, "prompt_ids": ids}
        for row, prompt, ids in zip(rows, prompts, encode_prompts(tokenizer, prompts), strict=True)
    ]
    ready = _leave_out_long(ready, "prompt_ids", "max_prompt_length", max_prompt_length)
    if max_completion_length is not None:
        end = end_of_turn_id(tokenizer)
        encoded = tokenizer([row["completion"] for row in ready], add_special_tokens=False)["input_ids"]
        ready = [{**row, "completion_ids": [*ids, end]} for row, ids in zip(ready, encoded, strict=True)]
        ready = _leave_out_long(ready, "completion_ids", "generation_max_length", max_completion_length)
    return ready


def _leave_out_long(rows: list[Row], column: str, setting: str, limit: int) -> list[Row]:
    short = [row for row in rows if len(row[column]) <= limit]
    if len(short) < len(rows):
        longest = max(len(row[column]) for row in rows)
        what = column.removesuffix("_ids")
        report = f"{len(rows) - len(short)} of {len(rows)} rows have a {what} longer than {setting}={limit} tokens"
        if not short:
            raise ValueError(f"{report}; the longest has {longest}: raise {setting}")
        logger.warning("%s and are left out; the longest has %d", report, longest)
    return short


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
