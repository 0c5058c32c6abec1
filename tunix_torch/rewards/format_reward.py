"""Format: is the completion exactly a reasoning part and then an answer part?"""

import re
from collections.abc import Sequence

from .answers import ANSWER_TAGS, REASONING_TAGS
from .conversations import takes_conversations

TAGS = REASONING_TAGS + ANSWER_TAGS
_LAYOUT = re.compile(r"\s*<reasoning>(.*?)</reasoning>\s*<answer>(.*?)</answer>\s*", re.DOTALL)


@takes_conversations
def format_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: 1.0 for exactly `<reasoning>...</reasoning> <answer>...</answer>`, else 0.1 for each tag present once.

    Exactly means: each tag once and in this order, neither part empty, nothing but white space around and between
    them. So a completion that misses the layout gets at most 0.4. The full reward is the format reward of DeepSeek-R1
    (arXiv:2501.12948, section 2.2.2); the partial credit, which gives a first signal to a model that has not yet
    produced the whole layout, follows the tag count of the Tunix GRPO demo.

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
