"""Lets reward functions of texts take completions that are lists of messages, as TRL gives them for such prompts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

RewardOfTexts = Callable[..., list[Any]]


def completion_text(completion: object) -> str:
    """The text of a completion: the completion itself, or in a list of messages what the assistant says.

    Raises:
        ValueError: the completion is neither a text nor a list of messages.

    >>> completion_text("72"), completion_text([{"role": "assistant", "content": "72"}])
    ('72', '72')
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, (list, tuple)) or not all(isinstance(message, dict) for message in completion):
        raise ValueError(f"completions: one is a {type(completion).__name__}, expected a text or a list of messages")
    said = [message.get("content") or "" for message in completion if message.get("role") == "assistant"]
    return "\n".join(map(_content_text, said))


def takes_conversations(reward_fn: RewardOfTexts) -> RewardOfTexts:
    """Make a reward function of texts accept completions that are lists of messages as well.

    >>> @takes_conversations
    ... def length_reward(prompts, completions, **columns):
    ...     return [len(completion) for completion in completions]
    >>> length_reward(["?"] * 2, ["72", [{"role": "assistant", "content": "72"}]])
    [2, 2]
    """

    @functools.wraps(reward_fn)
    def of_texts(prompts: Sequence[object], completions: Sequence[object], *args: object, **columns: object) -> list:
        return reward_fn(prompts, [completion_text(completion) for completion in completions], *args, **columns)

    return of_texts


def _content_text(content: object) -> str:
    """The text of a message's content, which may come in parts: [{"type": "text", "text": "72"}]."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(part.get("text") or "" for part in content)
    raise ValueError(f"completions: a message's content is a {type(content).__name__}, expected a text")
