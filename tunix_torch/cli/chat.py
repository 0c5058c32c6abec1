"""A conversation with a model on the terminal or through a pipe: answers appear token by token, reasoning is dim."""

import argparse
import importlib
import importlib.util
import os
import sys
from typing import Any

from ..data.shapes import normalize_row
from ..data.visible import visible
from ..rewards.answers import REASONING_TAGS
from .answering import Asked, Question, asks_tiny
from .script import wait_for_ctrl_c

DIM, PLAIN = "\x1b[2m", "\x1b[22m"
END = "exit"  # the word that ends a conversation


class Shown:
    """Prints an answer as it grows, each part once.

    Args:
        dim: show the reasoning dimmed, by the terminal's codes.
    """

    def __init__(self, dim: bool) -> None:
        self.dim, self.text = dim, ""

    def update(self, text: str, whole: bool = False) -> None:
        """Print what is new in the text of the answer so far.

        What may still change waits: the bytes of a character that is not there in full, and the beginning of a tag.

        Args:
            whole: the answer has ended, so nothing waits any more.
        """
        text = visible(text)
        if not whole:
            text = _settled(text)
        if not text.startswith(self.text):
            if not whole:
                return
            sys.stdout.write("\n")  # the tokenizer wrote the beginning differently when more had followed
            self.text = ""
        start, end = _reasoning(text) if self.dim else (0, 0)
        cuts = sorted({len(self.text), *(cut for cut in (start, end) if len(self.text) < cut < len(text)), len(text)})
        for first, last in zip(cuts, cuts[1:], strict=False):
            part = text[first:last]
            sys.stdout.write(f"{DIM}{part}{PLAIN}" if start <= first < end else part)
        sys.stdout.flush()
        self.text = text


def _settled(text: str) -> str:
    """The text without an end that may change when more follows."""
    text = text.rstrip("\ufffd")
    tag = REASONING_TAGS[0]
    waits = next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
    return text[: len(text) - waits]


def _reasoning(text: str) -> tuple[int, int]:
    """Where the reasoning begins and ends, with its tags; it may have no end yet."""
    start = text.find(REASONING_TAGS[0])
    if start < 0:
        return 0, 0
    end = text.find(REASONING_TAGS[1], start)
    return start, len(text) if end < 0 else end + len(REASONING_TAGS[1])


def shows_colours() -> bool:
    """Whether the output is a terminal that takes codes, and the user has nothing against them."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def chat(args: argparse.Namespace, model_path: str) -> None:
    """Answer one question after the other, each with the conversation before it, until `exit` or the end of the input.
    The tiny model has seen no conversations, so it is asked each question by itself.

    On a terminal Ctrl-C stops the answer, and Ctrl-D ends. Through a pipe every line of the input is a question.

    Raises:
        ValueError: the model can't be loaded; or, through a pipe, a question can't be asked.
    """
    asked, at_terminal, keeps_turns = Asked(args, model_path), sys.stdin.isatty(), not asks_tiny(model_path)
    if at_terminal:
        print(f"{END} or Ctrl-D ends, Ctrl-C stops an answer", flush=True)
        if importlib.util.find_spec("readline"):  # not on every system; `input` uses it for editing and history
            importlib.import_module("readline")
    turns: list[dict[str, Any]] = []
    number = 0
    while (question := _next_question(at_terminal)) is not None:
        if not keeps_turns:
            turns.clear()
        turns.append({"role": "user", "content": question})
        try:
            answer = _answer(asked, turns, args.seed + number)
        except ValueError as error:
            turns.pop()
            if not at_terminal:
                raise
            print(f"error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
            continue
        turns.append({"role": "assistant", "content": answer})
        number += 1


def _next_question(at_terminal: bool) -> str | None:
    """The next line that is not blank; None: there is none, or the user ends. Through a pipe it is printed."""
    while True:
        wait_for_ctrl_c()
        try:
            line = input("\n> ") if at_terminal else sys.stdin.readline()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            continue
        question = line.strip()
        if question == END or (not line and not at_terminal):
            return None
        if question:
            if not at_terminal:
                print(visible(f"\n> {question}"), flush=True)
            return question


def _answer(asked: Asked, turns: list[dict[str, Any]], seed: int) -> str:
    """Print the answer to the last of the turns, and return it, or what there is of it when the user stops it.

    Of a conversation that has become too long for the model, the earliest turns are left out.
    """
    normalize_row({"question": turns[-1]["content"]}, 1, "the question")
    ids = asked.prompt(_question(turns))[1]
    most = asked.most_tokens
    while most is not None and len(ids) + asked.params.max_new_tokens > most:
        if len(turns) == 1:
            given = f"{len(ids)} tokens, and max_new_tokens={asked.params.max_new_tokens}"
            raise ValueError(f"the question has {given}: the model takes {most} in all; ask for less")
        del turns[:2]
        print("(the model can't take all of the conversation; its earliest turns are left out)", file=sys.stderr)
        ids = asked.prompt(_question(turns))[1]
    shown = Shown(dim=shows_colours())
    try:
        text = asked.stream(ids, seed, shown.update)
        shown.update(text, whole=True)
        print(flush=True)
        return text
    except KeyboardInterrupt:
        print("\n(stopped)", flush=True)
        return shown.text


def _question(turns: list[dict[str, Any]]) -> Question:
    """A first question is asked as `--question` would ask it."""
    return turns[0]["content"] if len(turns) == 1 else turns
