"""Finds the question, the expected answer and the completion in the columns of a row.

A row has a question in `prompt` or `question`: a text, or a list of messages. It may have an answer in `answer`,
`answers` or `expected_answers`. Rows of known data sets are understood by their columns: GSM8K ("... #### 72"), MATH
(`problem`, and `solution` with a \\boxed{...}), ARC and MMLU (`question`, `choices` or the columns `A`, `B`, ..., and
`answerKey` or `answer`). For supervised fine-tuning a row may also be a conversation in `messages`, or a plain text in
`text`. Where a row of preferences has no prompt, `preference.py` finds it.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..rewards.answers import split_marked_answer
from .choices import answer_is_letter, choices_of, label_of, names_choice, readable_choices, shows_choices
from .expected import answer_in, json_value
from .preference import SIDES, lacks_prompt, prompt_in_sides
from .rows import (
    ANSWER,
    ANSWER_COLUMNS,
    LEARN,
    MESSAGES,
    NO_ANSWER,
    QUESTION,
    REASONING,
    TEXT,
    TURNS,
    WHERE,
    Row,
    answer_text,
    first_answer,
)

# The columns that a row of each data set must have; the data sets are those that `--dataset` knows by name.
COLUMNS = {
    "gsm8k": ("question", "answer"),
    "math": ("problem", "solution"),
    "arc": ("question", "choices", "answerKey"),
}
QUESTION_COLUMNS = ("prompt", "question")
ROLES = ("system", "user", "assistant", "tool")


def normalize_row(
    row: Row,
    number: int,
    source: str,
    dataset: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    supervised: bool = False,
) -> Row:
    """Add to a row the values that are derived from its columns (`rows.py` names them); the columns stay unchanged.

    A row that has the derived values already comes back unchanged. A row without an answer is accepted here; whatever
    needs the answer later says that it is missing.

    Args:
        number: the row's number in its source, from 1, for error messages.
        source: the file or data set that the row comes from, for error messages.
        dataset: gsm8k, math or arc: the row must have the columns of that data set.
        question_column, answer_column: columns that the user names, instead of the standard ones.
        supervised: the row is for supervised fine-tuning, so it may have `messages` or `text` instead of a question.

    Raises:
        ValueError: the row has no question, or both a prompt and messages, or is no row of `dataset`; the message names
            the row.
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
    if all(seen.get(side) is not None for side in SIDES):  # data sets of preferences may repeat one side as `messages`
        seen = {name: value for name, value in seen.items() if name != MESSAGES}
    column = _question_column(seen, where, supervised)
    question, turns, learn = seen[column], "", column if column in (MESSAGES, TEXT) else ""
    if learn == MESSAGES:
        question, turns = _check_conversation(question, where), MESSAGES
    elif learn == TEXT and not isinstance(question, str):
        raise ValueError(
            f"{where}: the column {TEXT} is a {type(question).__name__}, expected a text; for messages there "
            f"is {MESSAGES}"
        )
    elif isinstance(question, str):
        check_encodable(question, where, "the text" if learn else "the question")
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
    derived = {WHERE: where, QUESTION: question, TURNS: turns, LEARN: learn, ANSWER: None, NO_ANSWER: "", REASONING: ""}
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


def check_encodable(text: str, where: str, what: str) -> None:
    """Raise ValueError for a text that UTF-8, and so a tokenizer, can't encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {what} has {text[error.start]!r} at character {error.start + 1}, half of a pair of "
            "surrogates, which is no character; mend or leave out the row"
        ) from None


# ---- the question ----


def _question_column(row: Row, where: str, supervised: bool) -> str:
    """The first column that may hold the question and isn't blank. Raises ValueError where there is none."""
    names = [*QUESTION_COLUMNS, *(["problem"] if all(row.get(name) is not None for name in COLUMNS["math"]) else [])]
    there = [name for name in names if row.get(name) is not None]
    if row.get("prompt") is not None and row.get(MESSAGES) is not None:
        hint = "leave one of them out, or name the one that holds the question (question_column)"
        raise ValueError(f"{where}: there is both a prompt and messages; {hint}")
    if supervised:
        there = there or [name for name in (MESSAGES, TEXT) if row.get(name) is not None][:1]
    if not there:
        own = ", ".join(name for name, value in row.items() if value is not None) or "nothing"
        hint = "; rename the one that holds it, or name it by --question_column"
        if row.get(MESSAGES) is not None:
            hint = ": put the messages before the answer into prompt, and the answer into completion or answer"
        expected = "prompt, question, messages or text" if supervised else "prompt or question"
        raise ValueError(f"{where}: no question; expected a column named {expected}; it has {own}{hint}")
    written = [name for name in there if not isinstance(row[name], str) or row[name].strip()]
    if not written:
        raise ValueError(f"{where}: the {'text' if there == [TEXT] else 'question'} is blank")
    return written[0]


def check_messages(question: Any, where: str, what: str = "the question") -> list[Mapping[str, Any]]:
    """Check the messages of a question, such as `[{"role": "user", "content": "6 x 12?"}]`.

    Args:
        what: what the messages are, for error messages.

    Raises:
        ValueError: the question is no such list, or its last message is not the user's or a tool's; the message names
            the row.
    """
    messages = _check_each_message(question, where, what)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"{where}: the last message of {what} is the {messages[-1]['role']}'s, not the user's")
    return messages


def _check_conversation(messages: Any, where: str) -> str:
    """Check the messages of a conversation to learn from. Returns what the last of them before an answer says."""
    messages = _check_each_message(messages, where, "the conversation")
    number = first_answer(messages)
    if number == len(messages):
        raise ValueError(f"{where}: the conversation has no message of the assistant, so there is nothing to learn")
    if number == 0:
        raise ValueError(f"{where}: the conversation begins with the assistant; expected a message of the user first")
    return messages[number - 1]["content"]


def _check_each_message(messages: Any, where: str, what: str) -> list[Mapping[str, Any]]:
    if not isinstance(messages, list | tuple | np.ndarray):
        kind = type(messages).__name__
        expected = "a text or a list of messages" if what == "the question" else "a list of messages"
        raise ValueError(f"{where}: {what} is a {kind}, expected {expected}")
    if not len(messages):
        raise ValueError(f"{where}: {what} is an empty list; expected a text or a list of messages")
    for number, message in enumerate(messages, start=1):
        at = f"{where}: message {number} of {what}"
        if not isinstance(message, Mapping):
            raise ValueError(f'{at} is a {type(message).__name__}, expected {{"role": "user", "content": "..."}}')
        if message.get("role") not in ROLES:
            raise ValueError(f"{at} has the role {message.get('role')!r}; known are {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and message["role"] == "assistant" and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise ValueError(f"{at} has no text: its content is a {type(content).__name__}")
        if message["role"] == "user" and not content.strip():
            raise ValueError(f"{at} is blank")
        check_encodable(content, where, f"message {number} of {what}")
    return list(messages)


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
        check_encodable(answer, "no answer", "the text")
        reasoning, answer = split_marked_answer(answer)
    if answer is None or (isinstance(answer, str) and (not answer.strip() or answer.rstrip().endswith("####"))):
        boxed = ", or \\boxed{...} in the solution" if "solution" in row else ""
        expected = f"a column named {', '.join(ANSWER_COLUMNS)}{boxed}"
        hint = "rename the one that holds it, or name it by --answer_column"
        raise ValueError(f"no answer; expected {expected}; {hint}")
    return answer, reasoning


# ---- what supervised fine-tuning learns ----


def completion_of(row: Row) -> str | list[Mapping[str, Any]]:
    """What supervised fine-tuning learns of a row: the row's `completion`, or else its reasoning and answer in tags.

    Args:
        row: from `normalize_row`.

    Returns:
        a text; or messages that follow the prompt, where both are messages, and the whole conversation or text of a row
        that has one instead of a prompt.

    Raises:
        ValueError: there is no such text, or `completion` is neither a text nor messages with one of the assistant, or
            is several messages after a prompt that is a text; the message names the row.
    """
    if row[LEARN]:
        return row[row[LEARN]] if row[LEARN] == TEXT else list(row[MESSAGES])
    completion, where = row.get("completion"), row[WHERE]
    if completion is None and "completion" not in row and not row[NO_ANSWER]:
        reasoning = row[REASONING] or row.get("reasoning") or row.get("solution") or ""
        completion = f"<reasoning>{str(reasoning).strip()}</reasoning>\n<answer>{answer_text(row)}</answer>"
    elif isinstance(completion, list | tuple | np.ndarray):
        completion = _completion_in_messages(row, completion, where)
    elif completion is None and "completion" not in row:
        if row.get("chosen") is not None and row.get("rejected") is not None:
            raise ValueError(
                f"{where}: a pair, chosen and rejected: set preference_loss, such as dpo, to learn from pairs"
            )
        raise ValueError(f"{where}: no completion to learn from, and none can be made: {row[NO_ANSWER]}")
    if isinstance(completion, list):
        return completion
    if not isinstance(completion, str):
        raise ValueError(f"{where}: the completion is a {type(completion).__name__}, expected a text")
    if not completion.strip():
        raise ValueError(f"{where}: the completion is blank, so there is nothing to learn; leave out the row")
    check_encodable(completion, where, "the completion")
    return completion


def _completion_in_messages(row: Row, completion: Any, where: str) -> str | list[Mapping[str, Any]]:
    """A completion that is a list of messages; after a prompt that is a text, what its one message says."""
    one_text = "expected a text or one message of the assistant"
    if not len(completion):
        raise ValueError(f"{where}: the completion is a list, {one_text}, and it is empty")
    messages = _check_each_message(completion, where, "the completion")
    if first_answer(messages) == len(messages):
        raise ValueError(f"{where}: the completion is a list, {one_text}, and none of its messages is the assistant's")
    if row[TURNS]:
        return messages
    if len(messages) > 1 or not isinstance(messages[0].get("content"), str):
        raise ValueError(f"{where}: the completion is a list, {one_text}, since the prompt is a text")
    return messages[0]["content"]
