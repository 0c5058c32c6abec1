"""Finds the prompt, the chosen and the rejected completion in a row of preferences.

A row has `chosen` and `rejected`: two texts, or two lists of messages. It may have a prompt, like any other row. Where
it has none, the common beginning of both is the prompt, as in TRL (`extract_prompt`): of lists, the messages that both
begin with; of texts, the words that both begin with. A list of more than one message holds its prompt in any case.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .rows import PREFIX, QUESTION, TURNS, WHERE, Row, prompt_of

SIDES = ("chosen", "rejected")


@dataclass
class Pair:
    """A prompt with two completions: what the assistant writes, without the token that ends its turn."""

    prompt: str | list[Mapping[str, Any]]
    chosen: str
    rejected: str


def lacks_prompt(row: Row, prompt_columns: Sequence[str]) -> bool:
    """Whether a row has preferences, or one side of them, and none of the columns that may hold a prompt."""
    has_side = any(row.get(side) is not None for side in SIDES)
    return has_side and all(row.get(name) is None for name in prompt_columns)


def prompt_in_sides(row: Row, where: str) -> str | list[Mapping[str, Any]]:
    """The prompt of a row that has none of its own: the common beginning of its two sides.

    Raises:
        ValueError: a side is missing or is no text or list, or they have no common beginning; the message names the
            row.
    """
    sides = _sides(row, where)
    return (_split_texts if isinstance(sides[0], str) else _split_messages)(*sides, where)[0]


def pair_of(row: Row) -> Pair:
    """The pair in a row from `normalize_row`.

    Raises:
        ValueError: a side is missing, is not of the other's type, has roles that do not alternate, does not end with
            one message of the assistant, or is blank; the two sides are equal; or there is no prompt. The message
            names the row.
    """
    where, question = row[WHERE], prompt_of(row) if row[TURNS] else row[QUESTION]
    chosen, rejected = _sides(row, where)
    if isinstance(chosen, str):
        if _is_implicit(row, chosen, rejected):
            question, chosen, rejected = _split_texts(chosen, rejected, where)
    elif max(len(chosen), len(rejected)) > 1:
        question, chosen, rejected = _split_messages(chosen, rejected, where)
    else:
        chosen, rejected = _answers(chosen, rejected, where)
    if not isinstance(question, str):
        _check_turns(question, "prompt", where)
    for side, text in zip(SIDES, (chosen, rejected), strict=True):
        _check_text(text, side, where)
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are equal, so neither is preferred; leave out the row")
    return Pair(question, chosen, rejected)


def _check_text(text: str, side: str, where: str) -> None:
    """Raise ValueError for a completion that is blank, or that UTF-8, and so a tokenizer, can't encode."""
    if not text.strip():
        raise ValueError(f"{where}: {side} is blank")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        place = f"{text[error.start]!r} at character {error.start + 1}"
        hint = "half of a pair of surrogates, which is no character; mend or leave out the row"
        raise ValueError(f"{where}: {side} has {place}, {hint}") from None


def _sides(row: Row, where: str) -> tuple[Any, Any]:
    """The two sides: two texts, or two lists that are not empty."""
    missing = [f"no {side}" for side in SIDES if row.get(side) is None]
    if missing:
        raise ValueError(f"{where}: {' and '.join(missing)}; a preference has columns named chosen and rejected")
    sides = [row[side] for side in SIDES]
    for side, value in zip(SIDES, sides, strict=True):
        if not isinstance(value, str | list | tuple | np.ndarray):
            raise ValueError(f"{where}: {side} is a {type(value).__name__}, expected a text or a list of messages")
        if not len(value):
            raise ValueError(f"{where}: {side} is empty")
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise ValueError(f"{where}: of chosen and rejected one is a text and one a list; give both in one form")
    return tuple(side if isinstance(side, str) else list(side) for side in sides)


# ---- texts ----


def _is_implicit(row: Row, chosen: str, rejected: str) -> bool:
    """Whether the question of a row of texts was made by `prompt_in_sides`, and so stands in both sides too."""
    own = (value for name, value in row.items() if not name.startswith(PREFIX) and isinstance(value, str))
    return row[QUESTION] not in own and row[QUESTION] == _common_words(chosen, rejected)


def _common_words(chosen: str, rejected: str) -> str:
    """What both texts begin with, up to the last white space in it, so that no word and no number is cut in two."""
    count = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    common = chosen[: min(len(chosen), len(rejected)) if count is None else count]
    words = common.rstrip()
    if len(words) < len(common):  # it ends with white space, and so with a whole word
        return words
    return common[: max((i for i, letter in enumerate(common) if letter.isspace()), default=0)].rstrip()


def _split_texts(chosen: str, rejected: str, where: str) -> tuple[str, str, str]:
    """The prompt and the two completions, without the white space between them."""
    prompt = _common_words(chosen, rejected)
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are equal, so neither is preferred; leave out the row")
    if not prompt.strip():
        raise ValueError(f"{where}: no prompt, and chosen and rejected do not begin with the same words; add a prompt")
    return prompt, chosen[len(prompt) :].lstrip(), rejected[len(prompt) :].lstrip()


# ---- messages ----


def _split_messages(chosen: list[Any], rejected: list[Any], where: str) -> tuple[list[Any], str, str]:
    """The messages that both lists begin with, and the text of the one message of the assistant that follows in each.

    Raises:
        ValueError: the lists are equal, do not begin with the same message, or something else follows.
    """
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        _check_turns(messages, side, where)
    differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if _plain(a) != _plain(b))
    count = next(differ, min(len(chosen), len(rejected)))
    if count == len(chosen) == len(rejected):
        raise ValueError(f"{where}: chosen and rejected are equal, so neither is preferred; leave out the row")
    if count == 0:
        raise ValueError(
            f"{where}: no prompt, and chosen and rejected do not begin with the same message; add a prompt"
        )
    return chosen[:count], *_answers(chosen[count:], rejected[count:], where)


def _plain(message: Any) -> Any:
    """A message for comparison. Arrow adds fields that are None to messages which lack them."""
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, Mapping) else message


def _check_turns(messages: list[Any], what: str, where: str) -> None:
    """Raise ValueError unless these are messages whose roles alternate, after a system message if there is one."""
    for number, message in enumerate(messages, start=1):
        at = f"{where}: message {number} of {what}"
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            raise ValueError(f'{at} is not of the form {{"role": "assistant", "content": "..."}}')
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{at} has the role {message.get('role')!r}; known are system, user, assistant")
        if message["role"] == "system" and number > 1:
            raise ValueError(f"{at} is a system message; only the first one may be")
    for number, (before, message) in enumerate(pairwise(messages), start=2):
        if before["role"] == message["role"]:
            at = f"{where}: messages {number - 1} and {number} of {what}"
            raise ValueError(f"{at} are both the {message['role']}'s; user and assistant must take turns")


def _answers(chosen: list[Any], rejected: list[Any], where: str) -> list[str]:
    """The texts of two lists that must hold one message of the assistant each."""
    texts = []
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        _check_turns(messages, side, where)
        roles = [message["role"] for message in messages]
        if roles != ["assistant"]:
            hint = "the two must have all but their last message, the assistant's, in common"
            raise ValueError(f"{where}: after the prompt, {side} has {', '.join(roles) or 'no message'}; {hint}")
        texts.append(messages[0]["content"])
    return texts
