"""Reads the choices of a multiple-choice question, and finds out which of them the answer is."""

import itertools
import numbers
import re
from typing import Any

import numpy as np

from ..config.files import NotJSON, parse_json
from .expected import answer_in
from .rows import Row

CHOICES = ("choices", "options")  # columns that may hold the choices
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choices_of(row: Row, where: str) -> list[tuple[str, str]]:
    """The choices of a row as (label, text). Choices of ARC have labels; those of MMLU get the labels A, B, C, D.

    Args:
        where: the place of the row, for error messages.

    Raises:
        ValueError: the choices can't be read, and the answer may be one of them.
    """
    name = next((name for name in CHOICES if row.get(name) is not None), None)
    if name is None:
        return _lettered_choices(row)
    choices = row[name]
    if isinstance(choices, str) and choices.lstrip()[:1] in ("[", "{"):  # a list in JSON, as CSV files have it
        try:
            choices = parse_json(choices)
        except NotJSON:
            raise ValueError(f"{where}: {name}={choices!r:.60}: a text, expected a list, or one in JSON") from None
    if isinstance(choices, np.ndarray | tuple):
        choices = list(choices)
    if isinstance(choices, dict) and {"text", "label"} <= choices.keys():  # ARC on Hugging Face and in TFDS
        if len(choices["text"]) != len(choices["label"]):
            raise ValueError(f"{where}: {len(choices['text'])} choices with {len(choices['label'])} labels")
        return [(str(label), str(text)) for label, text in zip(choices["label"], choices["text"], strict=True)]
    if isinstance(choices, dict) and all(isinstance(text, str | None) for text in choices.values()):  # {"A": "iron"}
        return [(label, text) for label, text in choices.items() if text is not None]
    if not isinstance(choices, list) or len(choices) < 2:
        if choices and answer_is_letter(row):
            raise ValueError(f"{where}: the answer is a letter, and {name}={choices!r:.60} are no list of choices")
        return []
    if all(isinstance(choice, dict) and {"text", "label"} <= choice.keys() for choice in choices):
        return [(str(choice["label"]), str(choice["text"])) for choice in choices]
    if len(choices) > len(LETTERS) or not all(isinstance(choice, str | numbers.Number) for choice in choices):
        raise ValueError(f"{where}: expected up to {len(LETTERS)} choices that are texts")
    return [(label, str(choice)) for label, choice in zip(LETTERS, choices, strict=False)]


def readable_choices(row: Row) -> list[tuple[str, str]]:
    """The choices of a row as `choices_of` gives them; an empty list where they can't be read."""
    try:
        return choices_of(row, "")
    except ValueError:
        return []


def _lettered_choices(row: Row) -> list[tuple[str, str]]:
    """Choices in columns A, B, C, D. They are taken for choices only where the answer names one of them."""
    letters = list(itertools.takewhile(lambda name: isinstance(row.get(name), str | numbers.Number), LETTERS))
    choices = [(name, str(row[name])) for name in letters]
    if len(choices) < 2 or not names_choice(row, choices):
        return []
    are_texts = all(isinstance(row[name], str) for name in letters)
    return choices if are_texts or str(answer_in(row, choices)[0]).strip() in letters else []


def answer_is_letter(row: Row) -> bool:
    """Whether the row's answer is one of the letters A to Z."""
    answer = row.get("answer") if row.get("answerKey") is None else row["answerKey"]
    return isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in LETTERS


def names_choice(row: Row, choices: list[tuple[str, str]]) -> bool:
    """Whether the row's answer is the label or the number of a choice, and so means nothing without the choices."""
    try:
        answer = answer_in(row, choices)[0]
    except ValueError:
        return False
    return _is_index(answer, choices) or (answer is not None and str(answer).strip() in dict(choices))


def _is_index(answer: Any, choices: list[tuple[str, str]]) -> bool:
    return isinstance(answer, numbers.Integral) and not isinstance(answer, bool) and 0 <= answer < len(choices)


def shows_choices(question: str, choices: list[tuple[str, str]]) -> bool:
    """Whether a question shows all choices with their labels, as "A. iron", "(A) iron" or "A: iron"."""
    if all(label == text for label, text in choices):  # the choices are letters that stand for parts of the question
        return True
    shown = (rf"(?<!\w){re.escape(label)}[.):\]]\s*{re.escape(text)}" for label, text in choices)
    return all(re.search(pattern, question) for pattern in shown)


def label_of(answer: Any, choices: list[tuple[str, str]], name: str) -> str:
    """The label of the right choice. The answer may be its label, its number (from 0) or its text.

    Args:
        name: the column of the answer, for error messages.

    Raises:
        ValueError: the answer is none of the choices.
    """
    labels, texts = zip(*choices, strict=True)
    if str(answer).strip() in labels:
        return str(answer).strip()
    if _is_index(answer, choices):
        return labels[answer]
    if texts.count(answer) == 1:
        return labels[texts.index(answer)]
    raise ValueError(f"{name} {answer!r} is none of the choices {', '.join(labels)}")
