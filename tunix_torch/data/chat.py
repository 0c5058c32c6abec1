"""Renders questions and conversations with a tokenizer's chat template, as the texts that the model sees.

A conversation to learn from becomes pieces of text, of which those are learned that the assistant writes. They are
found by rendering the conversation as far as each of the assistant's turns, with the template's own beginning of such a
turn. So what the template adds to a turn (an empty thought, the token that ends the turn) counts as the assistant's
exactly where the model has to write it itself, and belongs to the prompt where the template writes it for the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..config.files import NotJSON, parse_json
from ..config.mappings import check_template_kwargs
from .rows import Row

KWARGS = "chat_template_kwargs"  # the column of a row's own names and values for the template

Piece = tuple[str, bool]  # a text, and whether it is learned


@dataclass
class Chat:
    """How questions become prompts: the tokenizer with its template, and the settings of a run."""

    tokenizer: PreTrainedTokenizerBase
    system_message: str = ""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrap_prompts: bool = True

    def uses_template(self, question: str | Sequence[Mapping[str, Any]]) -> bool:
        """Whether the chat template renders this question. It has then written the special tokens already."""
        return self.tokenizer.chat_template is not None and (self.wrap_prompts or not isinstance(question, str))

    def prompt(self, question: str | Sequence[Mapping[str, Any]], own_kwargs: Mapping[str, Any] | None = None) -> str:
        """The text of a prompt; see `render_prompt`. `own_kwargs` are from `own_template_kwargs`."""
        if isinstance(question, str) and not self.uses_template(question):
            text = f"{self.system_message}\n\n{question}" if self.system_message else question
            return f"{text}\n" if self.wrap_prompts else text
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
        return self._render(self._messages(turns), own_kwargs or {}, add_generation_prompt=True)

    def pieces(
        self,
        prompt: Sequence[Mapping[str, Any]],
        messages: Sequence[Mapping[str, Any]],
        own_kwargs: Mapping[str, Any],
        end_of_turn: int,
    ) -> tuple[str, list[Piece]]:
        """A conversation as the prompt before the assistant's first turn to learn, and the pieces that follow it.

        Args:
            prompt: messages before those to learn from; all messages of the assistant after them are learned.
            messages: the messages that follow. One of them is the assistant's.
            own_kwargs: those of the row, from `own_template_kwargs`.
            end_of_turn: the token that the template writes after a turn of the assistant.

        Raises:
            ValueError: nothing stands before the first turn to learn; or the template refuses the conversation, or
                writes an earlier turn differently when later ones follow, so that no one text has all turns as the
                model would write them.
        """
        turns = self._messages([*prompt, *messages])
        learned = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= len(prompt)]
        if learned[0] == 0:
            raise ValueError("the first message is the assistant's; expected one of the user before it")
        turns = turns[: learned[-1] + 1]  # what follows the last turn to learn changes nothing
        whole = self._render(turns, own_kwargs)
        starts = [len(self._start(whole, turns, i, own_kwargs)) for i in learned]
        mark = self.tokenizer.convert_ids_to_tokens(end_of_turn)
        pieces: list[Piece] = []
        for number, start in enumerate(starts):
            limit = starts[number + 1] if number + 1 < len(starts) else len(whole)
            end = whole.find(mark, start, limit)
            if end < 0 and limit < len(whole):
                raise ValueError(
                    f"message {learned[number] + 1} does not end with {mark!r} in the chat template, so where "
                    "the assistant's turn ends is not known; make a row for each of its turns"
                )
            end = limit if end < 0 else end + len(mark)
            pieces.append((whole[start:end], True))
            if end < limit and limit < len(whole):
                pieces.append((whole[end:limit], False))
        return whole[: starts[0]], pieces

    def _start(self, whole: str, turns: list[dict[str, Any]], number: int, own_kwargs: Mapping[str, Any]) -> str:
        """The part of a rendered conversation that stands before the assistant's turn `number`."""
        before = self._render(turns[:number], own_kwargs, add_generation_prompt=True)
        if not whole.startswith(before):
            raise ValueError(
                f"the chat template writes what stands before message {number + 1} differently when later messages "
                "follow; make a row for each turn of the assistant: the messages before it in prompt, and it in "
                "completion"
            )
        return before

    def _messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Copies of messages with the system message in the first of the user's, unless they have one of their own."""
        copies = [{name: part for name, part in message.items() if part is not None} for message in messages]
        if self.system_message and all(message["role"] != "system" for message in copies):
            first = next((message for message in copies if message["role"] == "user"), None)
            if first is None:
                hint = "there is no message of the user to put it into; give the row a system message"
                raise ValueError(f"system_message={self.system_message!r:.40}: {hint}")
            first["content"] = f"{self.system_message}\n\n{first['content']}"
        return copies

    def _render(
        self, messages: list[dict[str, Any]], own_kwargs: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the question is a list of messages, and this tokenizer has no chat template to render them"
            )
        kwargs = {**self.template_kwargs, **own_kwargs}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
            )
        except Exception as error:  # a template is a program, which may raise anything where it refuses its input
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the tokenizer's chat template refuses the question: {reason}") from error


def own_template_kwargs(row: Row) -> dict[str, Any]:
    """The names and values that a row gives the chat template. A name without a value counts as not given.

    They are a mapping, or JSON text of one, as CSV files have it.

    Raises:
        ValueError: the row's `chat_template_kwargs` are no mapping.
    """
    value = row.get(KWARGS)
    if value is None:
        return {}
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = parse_json(value)
        except NotJSON:
            pass  # it is still a text, which the check below refuses
    check_template_kwargs(value)
    return {name: part for name, part in value.items() if part is not None}
