"""A row: the data set's own columns, which stay as they are, and what is derived from them, under keys with a prefix.

So a column of the data can be called `prompt_ids` or `answer` or anything else: no derived value takes its place.
`shapes.py` and `data.py` derive; here is what the others read. A row that neither has seen has only its own columns,
and then these are what is read.
"""

import json
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

PREFIX = "tunix/"
WHERE = PREFIX + "row"  # where the row is, for messages: "rows.jsonl, row 7"
QUESTION = PREFIX + "question"  # the question as a text; of messages, the last one's
TURNS = PREFIX + "turns"  # the column that holds the question as messages; "" where the question is a text
ANSWER = PREFIX + "answer"  # the expected answer as JSON, as a column in Arrow has one type; None: `answer` as it is
NO_ANSWER = PREFIX + "no_answer"  # why there is no expected answer; "" where there is one
REASONING = PREFIX + "reasoning"  # what stands before the final answer in the column of the answer
PROMPT = PREFIX + "prompt"  # the text that the model sees
PROMPT_IDS = PREFIX + "prompt_ids"
COMPLETION_IDS = PREFIX + "completion_ids"  # for supervised fine-tuning, with the token that ends a turn

ANSWER_COLUMNS = ("answer", "answers", "expected_answers")


def question_of(row: Row) -> str:
    """The question as a text, to show it."""
    return row[QUESTION] if QUESTION in row else row["question"]


def prompt_of(row: Row) -> str | list[dict[str, str]]:
    """What reward functions get as the prompt: the text that the model saw, or the data's own messages."""
    if row.get(TURNS):
        return list(row[row[TURNS]])
    return row[PROMPT] if PROMPT in row else row["prompt"]


def answer_of(row: Row) -> Any:
    """The expected answer, with the value and type that it has in the data; None where there is none."""
    derived = row.get(ANSWER)
    return row.get("answer") if derived is None else json.loads(derived)


def with_answer(row: Row, answer: Any) -> Row:
    """The row with another expected answer, under each name that it has there: to judge by that instead."""
    names = [name for name in ANSWER_COLUMNS if name == "answer" or name in row]
    return row | dict.fromkeys(names, answer) | {ANSWER: json.dumps(answer), NO_ANSWER: ""}


def answer_text(row: Row) -> str:
    """The expected answer as a text; "" where there is none."""
    answer = None if row.get(NO_ANSWER) else answer_of(row)
    return "" if answer is None else str(answer).strip()


def has_column(row: Row, name: str) -> bool:
    """Whether reward functions get a value of this row by this name, see `columns_of`. Answers must not be None."""
    if name in ANSWER_COLUMNS[1:] and row.get(name) is not None:
        return True
    if name in ANSWER_COLUMNS:
        return not row.get(NO_ANSWER) and answer_of(row) is not None
    return name in row or (name == "question" and QUESTION in row)


def own_columns(rows: Iterable[Row]) -> list[str]:
    """The names of the data's own columns, each once, in order."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if not name.startswith(PREFIX)]


def columns_of(rows: list[Row], copies: int = 1) -> dict[str, list[Any]]:
    """The rows' own columns as lists, each value `copies` times; a row that lacks a column has None there.

    `answer` is the expected answer. `answers`, `expected_answers` and `question` are added where the data has no such
    values.
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
