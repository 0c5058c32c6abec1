"""The shapes of rows that are understood: which column is the question, what is the expected answer, the completion.

A row has a question in `prompt` or `question`: a text, or a list of messages. It may have an answer in `answer`,
`answers` or `expected_answers`. Also understood, by their columns: GSM8K ("... #### 72"), MATH (`problem`, and
`solution` with a \\boxed{...}), ARC and MMLU (`question`, `choices` or the columns `A`, `B`, ..., and `answerKey` or
`answer`).
"""

import datetime
import itertools
import json
import math
import numbers
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from .rows import ANSWER, ANSWER_COLUMNS, NO_ANSWER, QUESTION, REASONING, TURNS, WHERE, Row, answer_text

COLUMNS = {  # of the data sets that are known by name
    "gsm8k": ("question", "answer"),
    "math": ("problem", "solution"),
    "arc": ("question", "choices", "answerKey"),
}
QUESTION_COLUMNS = ("prompt", "question")
CHOICES = ("choices", "options")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROLES = ("system", "user", "assistant")
NUMBER = re.compile(
    r"[-+−–]?\s?[$€£¥₹]?\s?[-+−–]?"
    r"([0-9][0-9,]*(\.[0-9]+)?|\.[0-9]+|([0-9]+\s)?[0-9]+\s?/\s?[0-9]+)\s?[%$€£¥₹]?\.?"
)  # what a final answer after "####" may be when that mark does not begin a line
BEFORE_MARK = tuple(".!?=0123456789)>")  # what a sentence or a calculation ends with before such a mark


def normalize_row(
    row: Row,
    number: int,
    source: str,
    dataset: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
) -> Row:
    """The row with what is derived from its columns (see `rows.py`); those stay as they are. Twice is as once.

    A row without an answer is taken: who needs the answer says that it lacks.

    Args:
        dataset: gsm8k, math or arc: the row must have its columns.
        question_column, answer_column: columns that the user names, in place of those that are looked for.

    Raises:
        ValueError: no question, or not a row of `dataset`; names the row.
    """
    if QUESTION in row:
        return row
    where = f"{source}, row {number}"
    looked_at = row  # as it were if the columns had the names that are looked for
    for setting, column, names in (
        ("question_column", question_column, QUESTION_COLUMNS),
        ("answer_column", answer_column, (*ANSWER_COLUMNS, "answerKey")),
    ):
        if column is not None and column not in row:
            raise ValueError(f"{setting}={column!r}: not in {where}, which has {', '.join(row)}")
        if column is not None:
            looked_at = {**looked_at, **dict.fromkeys(names), setting.removesuffix("_column"): row[column]}
    if dataset is not None:
        require_shape(looked_at, where, dataset)
    column = _question_column(looked_at, where)
    question, choices, turns, hidden = looked_at[column], [], "", False
    if isinstance(question, str):
        _check_encodable(question, where, "the question")
    else:
        question = check_messages(question, where)[-1]["content"]
        turns = question_column or column
    whole = turns or (column != "question" and question_column is None)  # as a prompt is, which may hold the choices
    if not whole or _answer_is_letter(looked_at) or _names_choice(looked_at, _readable_choices(looked_at)):
        choices = _choices(looked_at, where)
    if choices and not _shows(question, choices):
        hidden = bool(turns)
        question = question if turns else "\n".join([question, *(f"{label}. {text}" for label, text in choices)])
    derived = {WHERE: where, QUESTION: question, TURNS: turns, ANSWER: None, NO_ANSWER: "", REASONING: ""}
    try:
        if hidden:
            raise ValueError(f"the answer is one of the choices, and the messages don't show '{choices[0][0]}. ...'")
        answer, derived[REASONING] = _expected_answer(looked_at, choices)
        if answer is not row.get("answer") or type(answer) in (str, int, float, bool):
            derived[ANSWER] = json.dumps(answer, default=_plain)
    except ValueError as error:
        derived[NO_ANSWER] = str(error)
    return row | derived


def require_shape(row: Row, where: str, dataset: str) -> None:
    """Raises ValueError when it is no row of this data set."""
    missing = [name for name in COLUMNS[dataset] if row.get(name) is None]
    if missing:
        names = ", ".join(name for name, value in row.items() if value is not None)
        raise ValueError(f"{where}: no row of dataset={dataset!r}: no column {missing[0]!r}; it has {names}")
    if dataset == "gsm8k" and "####" not in str(row["answer"]):
        raise ValueError(f"{where}: no row of dataset='gsm8k': no '####' before the final answer")


def _has(row: Row, columns: tuple[str, ...]) -> bool:
    return all(row.get(name) is not None for name in columns)


def _check_encodable(text: str, where: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {what} has {text[error.start]!r} at character {error.start + 1}, half of a pair of "
            "surrogates, which is no character; mend or leave out the row"
        ) from None


# ---- the question ----


def _question_column(row: Row, where: str) -> str:
    names = [*QUESTION_COLUMNS, *(["problem"] if _has(row, COLUMNS["math"]) else [])]
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
    """A question's messages, such as `[{"role": "user", "content": "6 x 12?"}]`.

    Raises:
        ValueError: it is no such list, or its last message is not the user's; names the row.
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


def _choices(row: Row, where: str) -> list[tuple[str, str]]:
    """(label, text) of each choice: those of ARC have labels, those of MMLU get A, B, C, D.

    Raises:
        ValueError: they can't be read, and the answer may be one of them.
    """
    name = next((name for name in CHOICES if row.get(name) is not None), None)
    if name is None:
        return _lettered_choices(row)
    choices = row[name]
    if isinstance(choices, str) and choices.lstrip()[:1] in ("[", "{"):  # a CSV has them so
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError:
            raise ValueError(f"{where}: {name}={choices!r:.60}: a text, expected a list, or one in JSON") from None
    if isinstance(choices, np.ndarray | tuple):
        choices = list(choices)
    if isinstance(choices, dict) and {"text", "label"} <= choices.keys():  # Hugging Face and TFDS: a list a column
        if len(choices["text"]) != len(choices["label"]):
            raise ValueError(f"{where}: {len(choices['text'])} choices with {len(choices['label'])} labels")
        return [(str(label), str(text)) for label, text in zip(choices["label"], choices["text"], strict=True)]
    if isinstance(choices, dict) and all(isinstance(text, str | None) for text in choices.values()):  # {"A": "iron"}
        return [(label, text) for label, text in choices.items() if text is not None]
    if not isinstance(choices, list) or len(choices) < 2:
        if choices and _answer_is_letter(row):
            raise ValueError(f"{where}: the answer is a letter, and {name}={choices!r:.60} are no list of choices")
        return []
    if all(isinstance(choice, dict) and {"text", "label"} <= choice.keys() for choice in choices):
        return [(str(choice["label"]), str(choice["text"])) for choice in choices]
    if len(choices) > len(LETTERS) or not all(isinstance(choice, str | numbers.Number) for choice in choices):
        raise ValueError(f"{where}: expected up to {len(LETTERS)} choices that are texts")
    return [(label, str(choice)) for label, choice in zip(LETTERS, choices, strict=False)]


def _readable_choices(row: Row) -> list[tuple[str, str]]:
    """Likewise; none where they can't be read."""
    try:
        return _choices(row, "")
    except ValueError:
        return []


def _lettered_choices(row: Row) -> list[tuple[str, str]]:
    """Choices in columns A, B, C, D. What else such columns may hold is left alone: only an answer tells."""
    letters = list(itertools.takewhile(lambda name: isinstance(row.get(name), str | numbers.Number), LETTERS))
    choices = [(name, str(row[name])) for name in letters]
    if len(choices) < 2 or not _names_choice(row, choices):
        return []
    are_texts = all(isinstance(row[name], str) for name in letters)
    return choices if are_texts or str(_answer_in(row, choices)[0]).strip() in letters else []


def _answer_is_letter(row: Row) -> bool:
    answer = row.get("answer") if row.get("answerKey") is None else row["answerKey"]
    return isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in LETTERS


def _names_choice(row: Row, choices: list[tuple[str, str]]) -> bool:
    """Whether the row's answer is the label or the number of a choice, and so says nothing without them."""
    try:
        answer = _answer_in(row, choices)[0]
    except ValueError:
        return False
    return _is_index(answer, choices) or (answer is not None and str(answer).strip() in dict(choices))


def _is_index(answer: Any, choices: list[tuple[str, str]]) -> bool:
    return isinstance(answer, numbers.Integral) and not isinstance(answer, bool) and 0 <= answer < len(choices)


def _shows(question: str, choices: list[tuple[str, str]]) -> bool:
    """Whether a question holds all choices with their labels: "A. iron", "(A) iron" or "A: iron"."""
    if all(label == text for label, text in choices):  # only the letters, of what is in the question
        return True
    shown = (rf"(?<!\w){re.escape(label)}[.):\]]\s*{re.escape(text)}" for label, text in choices)
    return all(re.search(pattern, question) for pattern in shown)


# ---- the answer ----


def _expected_answer(row: Row, choices: list[tuple[str, str]]) -> tuple[Any, str]:
    """The answer, and the reasoning that stands before it in the same column.

    Raises:
        ValueError: there is none, or it is none that a completion could be compared with.
    """
    answer, name = _answer_in(row, choices)
    reasoning = ""
    if choices and answer is not None:
        answer = _label_of(answer, choices, name)
    elif isinstance(answer, str):
        _check_encodable(answer, "no answer", "the text")
        answer, reasoning = after_mark(answer)
    if answer is None or (isinstance(answer, str) and (not answer.strip() or answer.rstrip().endswith("####"))):
        boxed = ", or \\boxed{...} in the solution" if "solution" in row else ""
        raise ValueError(f"no answer; expected a column named {', '.join(ANSWER_COLUMNS)}{boxed}")
    return answer, reasoning


def _answer_in(row: Row, choices: list[tuple[str, str]]) -> tuple[Any, str | None]:
    """What the row has as its answer, as a text or number, and in which column; None where there is none.

    Raises:
        ValueError: it is neither a text nor a number nor a date.
    """
    names = ("answerKey", *ANSWER_COLUMNS) if choices else (*ANSWER_COLUMNS, "answerKey")
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None and _has(row, COLUMNS["math"]):
        answer = last_boxed(str(row["solution"]))
    else:
        answer = None if name is None else row[name]
    if hasattr(answer, "tolist") and not isinstance(answer, np.generic):  # an array, or a tensor
        array = np.asarray(answer)
        answer = list(array) if array.ndim else array[()]
    if isinstance(answer, list | tuple):
        if len(answer) != 1:
            raise ValueError(f"{len(answer)} answers; expected one")
        answer = answer[0]
    return _as_text_or_number(answer), name


def _as_text_or_number(answer: Any) -> Any:
    """An answer as reward functions take it: a date or a time becomes its ISO text.

    Raises:
        ValueError: it is neither a text nor a real and finite number nor a date.
    """
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, datetime.date | datetime.time | np.datetime64):
        if answer != answer:
            raise ValueError("the answer is NaT, which is no date")
        text = str(answer) if isinstance(answer, np.datetime64) else answer.isoformat()
        # NumPy writes all nine digits of a second's fraction
        return text.rstrip("0").rstrip(".") if isinstance(answer, np.datetime64) and "." in text else text
    if isinstance(answer, np.bool_):
        return bool(answer)
    if not isinstance(answer, numbers.Real | Decimal) or isinstance(answer, np.timedelta64):  # an integer of NumPy's
        raise ValueError(f"the answer is a {type(answer).__name__}, expected a text or a number")
    if not isinstance(answer, numbers.Rational) and not math.isfinite(answer):
        raise ValueError(f"the answer is {answer}, which is no finite number")
    return answer


def _label_of(answer: Any, choices: list[tuple[str, str]], name: str) -> str:
    """The label of the right choice, of which a row has the label, the number from 0, or the text."""
    labels, texts = zip(*choices, strict=True)
    if str(answer).strip() in labels:
        return str(answer).strip()
    if _is_index(answer, choices):
        return labels[answer]
    if texts.count(answer) == 1:
        return labels[texts.index(answer)]
    raise ValueError(f"{name} {answer!r} is none of the choices {', '.join(labels)}")


def after_mark(text: str) -> tuple[str, str]:
    """(final answer, reasoning): GSM8K has "####" between them. In other texts these signs say nothing.

    The last of them count where they begin the last line of a text without Markdown headings besides, or where they
    follow the end of a sentence or calculation, and a number comes after them that ends the text.
    """
    reasoning, mark, final = text.rpartition("####")
    final = final.strip()
    *lines, beside = reasoning.split("\n")
    begins_line = not beside.strip() and not any(line.lstrip(" \t").startswith(("# ", "##")) for line in lines)
    before = reasoning.rstrip()
    follows_end = len(before) < len(reasoning) and before.endswith(BEFORE_MARK)
    if mark and "\n" not in final and (begins_line or (follows_end and NUMBER.fullmatch(final))):
        return final, reasoning.strip()
    return text, ""


def last_boxed(text: str) -> str | None:
    """What the last \\boxed{...} (or \\fbox{...}, or `\\boxed 2`) of a LaTeX text holds; None: there is none."""
    found = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*", text)]
    if not found:
        return None
    rest = text[found[-1] :]
    if not rest.startswith("{"):
        return rest.partition("$")[0].strip()
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0 and match.group() == "}":
            return rest[1 : match.start()]
    return None


def _plain(value: Any) -> Any:
    """What JSON can't hold: NumPy's numbers become Python's (float32's 0.1 is 0.1), the rest texts."""
    if isinstance(value, np.floating):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else str(value)


# ---- the completion, for supervised fine-tuning ----


def completion_of(row: Row) -> str:
    """The text to learn: the row's `completion`, else its reasoning and answer in tags.

    Args:
        row: from `normalize_row`.

    Raises:
        ValueError: there is none, or it is neither a text nor a list with one message of the assistant; names the row.
    """
    completion, where = row.get("completion"), row[WHERE]
    if completion is None and "completion" not in row and not row[NO_ANSWER]:
        reasoning = row[REASONING] or row.get("reasoning") or row.get("solution") or ""
        completion = f"<reasoning>{str(reasoning).strip()}</reasoning>\n<answer>{answer_text(row)}</answer>"
    elif isinstance(completion, list | tuple | np.ndarray):
        (message,) = completion if len(completion) == 1 else [None]
        right = isinstance(message, Mapping) and message.get("role") == "assistant"
        if not right or not isinstance(message.get("content"), str):
            raise ValueError(f"{where}: the completion is a list, expected a text or one message of the assistant")
        completion = message["content"]
    elif completion is None and "completion" not in row:
        raise ValueError(f"{where}: no completion to learn from, and none can be made: {row[NO_ANSWER]}")
    if not isinstance(completion, str):
        raise ValueError(f"{where}: the completion is a {type(completion).__name__}, expected a text")
    _check_encodable(completion, where, "the completion")
    return completion
