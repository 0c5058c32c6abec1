"""The reward for the format: whether the completion is exactly a reasoning part and then an answer part."""

import re
from collections.abc import Sequence

from .answers import ANSWER_TAGS, REASONING_TAGS
from .conversations import takes_conversations

TAGS = REASONING_TAGS + ANSWER_TAGS
_LAYOUT = re.compile(r"\s*<reasoning>(.*?)</reasoning>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


@takes_conversations
def format_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: 1.0 for exactly `<reasoning>...</reasoning> <answer>...</answer>`, else 0.1 for each tag present once.

    Exactly means that each tag occurs once and in this order, that no part is empty, and that only white space stands
    around and between the parts. So a completion without this layout gets at most 0.4. The full reward is the format
    reward of DeepSeek-R1 (arXiv:2501.12948, section 2.2.2). The partial credit follows the tag count of the Tunix GRPO
    demo; it gives a first signal to a model that has not yet produced the whole layout.

    >>> format_reward(["?"] * 3, ["<reasoning>6 * 12</reasoning>\\n<answer>72</answer>", "<answer>72</answer>", "72"])
    [1.0, 0.2, 0.0]
    """
    return [_score(completion) for completion in completions]


def _score(completion: str) -> float:
    num_tags_once = sum(completion.count(tag) == 1 for tag in TAGS)
    layout = _LAYOUT.fullmatch(completion) if num_tags_once == len(TAGS) else None
    if layout is not None and all(body.strip() for body in layout.groups()):
        return 1.0
    return num_tags_once / 10
