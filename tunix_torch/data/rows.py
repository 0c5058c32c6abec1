"""A row of a data set: its own columns, and the values that the library derives from them.

Derived values have keys that begin with "tunix/", and the data's own columns are never changed. So a data set may have
columns of any name, `prompt_ids` or `answer` included, and no derived value overwrites them. `shapes.py` and
`prompts.py` add the derived values; the functions here read them, and fall back to the data's own columns where a row
has no derived values.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

PREFIX = "tunix/"
WHERE = PREFIX + "row"  # where the row comes from, for error messages: "rows.jsonl, row 7"
QUESTION = PREFIX + "question"  # the question as a text; where it is a list of messages, the text of the last message
TURNS = PREFIX + "turns"  # the name of the column that holds the question as messages; "" where the question is a text
# The column that supervised fine-tuning learns a whole row from, MESSAGES or TEXT; "" where there is a prompt.
LEARN = PREFIX + "learn"
# The expected answer as JSON, because a column of an Arrow table has one type and answers may have several. None means
# that the data's own column `answer` holds the expected answer unchanged.
ANSWER = PREFIX + "answer"
NO_ANSWER = PREFIX + "no_answer"  # the reason why there is no expected answer; "" where there is one
REASONING = PREFIX + "reasoning"  # the text before the final answer, where one column holds both
PROMPT = PREFIX + "prompt"  # the text that the model sees
PROMPT_IDS = PREFIX + "prompt_ids"  # the tokens of that text
COMPLETION_IDS = PREFIX + "completion_ids"  # what follows the prompt in SFT, with the token that ends the turn
# For each of these tokens 1 where it is learned, 0 where others than the assistant wrote it.
LEARNED = PREFIX + "learned"
REJECTED_IDS = PREFIX + "rejected_ids"  # with pairs: the rejected completion, where COMPLETION_IDS is the chosen one

MESSAGES, TEXT = "messages", "text"  # columns that hold a whole conversation, or a whole text, to learn from

# Columns of the data, and parameters of reward functions, that hold the expected answer.
ANSWER_COLUMNS = ("answer", "answers", "expected_answers")


def question_of(row: Row) -> str:
    """The question as a text, for logs and results."""
    return row[QUESTION] if QUESTION in row else row["question"]


def prompt_of(row: Row) -> str | list[dict[str, str]]:
    """The prompt that reward functions get: the text that the model saw, or the data's own list of messages."""
    if row.get(TURNS):
        messages = list(row[row[TURNS]])
        return messages[: first_answer(messages)] if row.get(LEARN) == MESSAGES else messages
    return row[PROMPT] if PROMPT in row else row["prompt"]


def first_answer(messages: Sequence[Mapping[str, Any]]) -> int:
    """The number, from 0, of the assistant's first message; the number of all messages where there is none."""
    return next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))


def answer_of(row: Row) -> Any:
    """The expected answer, with the value and the type that it has in the data, or None where there is none."""
    derived = row.get(ANSWER)
    return row.get("answer") if derived is None else json.loads(derived)


def with_answer(row: Row, answer: Any) -> Row:
    """A copy of the row with another expected answer, in `answer` and in every other answer column that it has."""
    names = [name for name in ANSWER_COLUMNS if name == "answer" or name in row]
    return row | dict.fromkeys(names, answer) | {ANSWER: json.dumps(answer), NO_ANSWER: ""}


def answer_text(row: Row) -> str:
    """The expected answer as a text, or "" where there is none."""
    answer = None if row.get(NO_ANSWER) else answer_of(row)
    return "" if answer is None else str(answer).strip()


def has_column(row: Row, name: str) -> bool:
    """Whether reward functions get a value of this row under this name, as `columns_of` passes them.

    An answer column counts only where the answer is not None.
    """
    if name in ANSWER_COLUMNS[1:] and row.get(name) is not None:
        return True
    if name in ANSWER_COLUMNS:
        return not row.get(NO_ANSWER) and answer_of(row) is not None
    return name in row or (name == "question" and QUESTION in row)


def own_columns(rows: Iterable[Row]) -> list[str]:
    """The names of the data's own columns, each once, in the order in which they first appear."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if not name.startswith(PREFIX)]


def columns_of(rows: list[Row], copies: int = 1) -> dict[str, list[Any]]:
    """The columns that reward functions get: one list a column, in which each row's value stands `copies` times.

    A row that lacks a column has None there. `answer` always holds the expected answer. Where the data has no value
    of its own for `answers`, `expected_answers` or `question`, the expected answer or the question stands there.
    """
    names = own_columns(rows)
    values = {name: [row.get(name) for row in rows] for name in names}
    if any(QUESTION in row for row in rows):
        own = values.get("question", [None] * len(rows))
        values["question"] = [row.get(QUESTION) if v is None else v for v, row in zip(own, rows, strict=True)]
    answers = [answer_of(row) for row in rows]
    if any(answer is not None for answer in answers):
        values["answer"] = answers
        for name in ANSWER_COLUMNS[1:]:
            own = values.get(name, [None] * len(rows))
            values[name] = [answer if v is None else v for v, answer in zip(own, answers, strict=True)]
    return {name: [value for value in column for _ in range(copies)] for name, column in values.items()}
