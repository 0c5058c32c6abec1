"""Finds the question, the expected answer and the completion in the columns of a row.

A row has a question in `prompt` or `question`: a text, or a list of messages. It may have an answer in `answer`,
`answers` or `expected_answers`. Rows of known data sets are understood by their columns: GSM8K ("... #### 72"), MATH
(`problem`, and `solution` with a \\boxed{...}), ARC and MMLU (`question`, `choices` or the columns `A`, `B`, ..., and
`answerKey` or `answer`). Where a row of preferences has no prompt, `preference.py` finds it.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..rewards.answers import split_marked_answer
from .choices import answer_is_letter, choices_of, label_of, names_choice, readable_choices, shows_choices
from .expected import answer_in, json_value
from .preference import lacks_prompt, prompt_in_sides
from .rows import ANSWER, ANSWER_COLUMNS, NO_ANSWER, QUESTION, REASONING, TURNS, WHERE, Row, answer_text

# The columns that a row of each data set must have; the data sets are those that `--dataset` knows by name.
COLUMNS = {
    "gsm8k": ("question", "answer"),
    "math": ("problem", "solution"),
    "arc": ("question", "choices", "answerKey"),
}
QUESTION_COLUMNS = ("prompt", "question")
ROLES = ("system", "user", "assistant")


def normalize_row(
    row: Row,
    number: int,
    source: str,
    dataset: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
) -> Row:
    """Add to a row the values that are derived from its columns (`rows.py` names them); the columns stay unchanged.

    A row that has the derived values already comes back unchanged. A row without an answer is accepted here; whatever
    needs the answer later says that it is missing.

    Args:
        number: the row's number in its source, from 1, for error messages.
        source: the file or data set that the row comes from, for error messages.
        dataset: gsm8k, math or arc: the row must have the columns of that data set.
        question_column, answer_column: columns that the user names, instead of the standard ones.

    Raises:
        ValueError: the row has no question, or is no row of `dataset`; the message names the row.
    """
    if QUESTION in row:
        return row
    where = f"{source}, row {number}"
    seen = _with_standard_names(row, where, question_column, answer_column)
    if dataset is not None:
        _check_dataset(seen, where, dataset)
    in_sides = lacks_prompt(seen, (*QUESTION_COLUMNS, "problem"))
    if in_sides:
        seen = seen | {"prompt": prompt_in_sides(seen, where)}
    column = _question_column(seen, where)
    question, turns = seen[column], ""
    if isinstance(question, str):
        _check_encodable(question, where, "the question")
    else:
        question = check_messages(question, where)[-1]["content"]
        turns = "" if in_sides else question_column or column
    # A prompt, unlike a question, may show the choices itself. Then the row's choices matter only to read the answer.
    is_prompt = turns or in_sides or (column != "question" and question_column is None)
    choices: list[tuple[str, str]] = []
    if not is_prompt or answer_is_letter(seen) or names_choice(seen, readable_choices(seen)):
        choices = choices_of(seen, where)
    are_missing = bool(choices) and not shows_choices(question, choices)
    if are_missing and not turns:
        question = "\n".join([question, *(f"{label}. {text}" for label, text in choices)])
    derived = {WHERE: where, QUESTION: question, TURNS: turns, ANSWER: None, NO_ANSWER: "", REASONING: ""}
    try:
        if are_missing and turns:
            raise ValueError(f"the answer is one of the choices, and the messages don't show '{choices[0][0]}. ...'")
        answer, derived[REASONING] = _expected_answer(seen, choices)
        if answer is not row.get("answer") or type(answer) in (str, int, float, bool):
            derived[ANSWER] = json.dumps(answer, default=json_value)
    except ValueError as error:
        derived[NO_ANSWER] = str(error)
    return row | derived


def _with_standard_names(row: Row, where: str, question_column: str | None, answer_column: str | None) -> Row:
    """The row as it would be if the columns that the user names were called `question` and `answer`."""
    renamed = row
    for setting, column, names in (
        ("question_column", question_column, QUESTION_COLUMNS),
        ("answer_column", answer_column, (*ANSWER_COLUMNS, "answerKey")),
    ):
        if column is not None and column not in row:
            raise ValueError(f"{setting}={column!r}: not in {where}, which has {', '.join(row)}")
        if column is not None:
            renamed = {**renamed, **dict.fromkeys(names), setting.removesuffix("_column"): row[column]}
    return renamed


def _check_dataset(row: Row, where: str, dataset: str) -> None:
    """Raise ValueError for a row that is no row of this data set."""
    missing = [name for name in COLUMNS[dataset] if row.get(name) is None]
    if missing:
        names = ", ".join(name for name, value in row.items() if value is not None)
        raise ValueError(f"{where}: no row of dataset={dataset!r}: no column {missing[0]!r}; it has {names}")
    if dataset == "gsm8k" and "####" not in str(row["answer"]):
        raise ValueError(f"{where}: no row of dataset='gsm8k': no '####' before the final answer")


def _check_encodable(text: str, where: str, what: str) -> None:
    """Raise ValueError for a text that UTF-8, and so a tokenizer, can't encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {what} has {text[error.start]!r} at character {error.start + 1}, half of a pair of "
            "surrogates, which is no character; mend or leave out the row"
        ) from None


# ---- the question ----


def _question_column(row: Row, where: str) -> str:
    """The first column that may hold the question and isn't blank. Raises ValueError where there is none."""
    names = [*QUESTION_COLUMNS, *(["problem"] if all(row.get(name) is not None for name in COLUMNS["math"]) else [])]
    there = [name for name in names if row.get(name) is not None]
    if not there:
        own = ", ".join(name for name, value in row.items() if value is not None) or "nothing"
        hint = ""
        if row.get("messages") is not None:
            hint = ": put the messages before the answer into prompt, and the answer into completion or answer"
        raise ValueError(f"{where}: no question; expected a column named prompt or question; it has {own}{hint}")
    written = [name for name in there if not isinstance(row[name], str) or row[name].strip()]
    if not written:
        raise ValueError(f"{where}: the question is blank")
    return written[0]


def check_messages(question: Any, where: str) -> list[Mapping[str, Any]]:
    """Check the messages of a question, such as `[{"role": "user", "content": "6 x 12?"}]`.

    Raises:
        ValueError: the question is no such list, or its last message is not the user's; the message names the row.
    """
    if not isinstance(question, list | tuple | np.ndarray):
        kind = type(question).__name__
        raise ValueError(f"{where}: the question is a {kind}, expected a text or a list of messages")
    if not len(question):
        raise ValueError(f"{where}: the question is an empty list; expected a text or a list of messages")
    for number, message in enumerate(question, start=1):
        at = f"{where}: message {number} of the question"
        if not isinstance(message, Mapping):
            raise ValueError(f'{at} is a {type(message).__name__}, expected {{"role": "user", "content": "..."}}')
        if message.get("role") not in ROLES:
            raise ValueError(f"{at} has the role {message.get('role')!r}; known are {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str):
            raise ValueError(f"{at} has no text: its content is a {type(content).__name__}")
        if message["role"] == "user" and not content.strip():
            raise ValueError(f"{at} is blank")
        _check_encodable(content, where, f"message {number} of the question")
    if question[-1]["role"] != "user":
        raise ValueError(f"{where}: the last message of the question is the {question[-1]['role']}'s, not the user's")
    return list(question)


# ---- the answer ----


def _expected_answer(row: Row, choices: list[tuple[str, str]]) -> tuple[Any, str]:
    """The expected answer of a row, and the reasoning that stands before it in the same column.

    Raises:
        ValueError: there is no answer, or none that a completion could be compared with.
    """
    answer, name = answer_in(row, choices)
    reasoning = ""
    if choices and answer is not None:
        answer = label_of(answer, choices, name)
    elif isinstance(answer, str):
        _check_encodable(answer, "no answer", "the text")
        reasoning, answer = split_marked_answer(answer)
    if answer is None or (isinstance(answer, str) and (not answer.strip() or answer.rstrip().endswith("####"))):
        boxed = ", or \\boxed{...} in the solution" if "solution" in row else ""
        raise ValueError(f"no answer; expected a column named {', '.join(ANSWER_COLUMNS)}{boxed}")
    return answer, reasoning


# ---- the completion, for supervised fine-tuning ----


def completion_of(row: Row) -> str:
    """The text that supervised fine-tuning learns: the row's `completion`, or else its reasoning and answer in tags.

    Args:
        row: from `normalize_row`.

    Raises:
        ValueError: there is no such text, or `completion` is neither a text nor a list with one message of the
            assistant; the message names the row.
    """
    completion, where = row.get("completion"), row[WHERE]
    if completion is None and "completion" not in row and not row[NO_ANSWER]:
        reasoning = row[REASONING] or row.get("reasoning") or row.get("solution") or ""
        completion = f"<reasoning>{str(reasoning).strip()}</reasoning>\n<answer>{answer_text(row)}</answer>"
    elif isinstance(completion, list | tuple | np.ndarray):
        (message,) = completion if len(completion) == 1 else [None]
        is_assistants = isinstance(message, Mapping) and message.get("role") == "assistant"
        if not is_assistants or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: the completion is a list, expected a text or one message of the assistant")
        completion = message["content"]
    elif completion is None and "completion" not in row:
        raise ValueError(f"{where}: no completion to learn from, and none can be made: {row[NO_ANSWER]}")
    if not isinstance(completion, str):
        raise ValueError(f"{where}: the completion is a {type(completion).__name__}, expected a text")
    _check_encodable(completion, where, "the completion")
    return completion
