"""Every shape of rows that docs/data.md shows is understood, from a list, a data set on disk, and a stream."""

import itertools
import json
import re
from pathlib import Path

import datasets
import pytest

from tunix_torch.data.prompts import prepare_rows
from tunix_torch.data.rows import COMPLETION_IDS, LEARNED, PROMPT, PROMPT_IDS, answer_text
from tunix_torch.model import tiny

DATA_PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
# | `{"prompt": ...}` | GRPO | what is asked |
DOCUMENTED = re.findall(r"^\| `(\{.*\})` \| (GRPO|SFT) \| (.*) \|$", DATA_PAGE, re.MULTILINE)
KINDS = {
    "list": list,
    "data set": datasets.Dataset.from_list,
    "stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}


def test_the_table_is_found():
    assert len(DOCUMENTED) >= 14 and {purpose for _, purpose, _ in DOCUMENTED} == {"GRPO", "SFT"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text, purpose, meaning", DOCUMENTED, ids=[text[:40] for text, *_ in DOCUMENTED])
def test_every_documented_row_is_understood(text, purpose, meaning, kind):
    tokenizer, row = tiny.make_tokenizer(), json.loads(text)
    width = 200 if purpose == "SFT" else None
    (ready,) = itertools.islice(prepare_rows(KINDS[kind]([row]), tokenizer, 200, width), 1)
    assert tokenizer.decode(ready[PROMPT_IDS]).endswith("model\n") or "text" in row
    said = re.search(r"the answer is (\w+)", meaning)
    assert said is None or answer_text(ready) == said[1]
    if purpose == "GRPO":
        assert "6 x 12?" in ready[PROMPT]
        return
    learned = zip(ready[COMPLETION_IDS], ready[LEARNED], strict=True)
    learned = tokenizer.decode([token for token, is_learned in learned if is_learned])
    expected = "72<end_of_turn>Yes.<end_of_turn>" if "messages" in row else "72"
    assert expected in learned and "Sure?" not in learned and learned.endswith("<end_of_turn>")
