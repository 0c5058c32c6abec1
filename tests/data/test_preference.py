"""Rows of preferences become pairs of one prompt, and each kind of wrong row gets one line that names it."""

import json
import re

import datasets
import pytest
import torch

from tunix_torch.data.batches import Collator
from tunix_torch.data.preference import pair_of
from tunix_torch.data.prompts import prepare_rows, render_prompt
from tunix_torch.data.rows import COMPLETION_IDS, PROMPT, PROMPT_IDS, QUESTION, REJECTED_IDS
from tunix_torch.data.shapes import normalize_row
from tunix_torch.model import tiny


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [user("1 + 1?")]
TALK = [SYSTEM, user("Hello"), assistant("Hello."), *ASKED]

# Rows, and the prompt, the chosen and the rejected completion in them.
ROWS = [
    ({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, ("1 + 1?", "2", "3")),
    ({"question": "1 + 1?", "chosen": "2", "rejected": "3"}, ("1 + 1?", "2", "3")),
    ({"prompt": ASKED, "chosen": [assistant("2")], "rejected": [assistant("3")]}, (ASKED, "2", "3")),
    ({"prompt": TALK, "chosen": "2", "rejected": "3"}, (TALK, "2", "3")),
    ({"chosen": [*TALK, assistant("2")], "rejected": [*TALK, assistant("3")]}, (TALK, "2", "3")),
    # a prompt that is a text beside whole conversations: they hold it too, and they decide
    ({"prompt": "1 + 1?", "chosen": [*TALK, assistant("2")], "rejected": [*TALK, assistant("3")]}, (TALK, "2", "3")),
    ({"chosen": "1 + 1? It is 2", "rejected": "1 + 1? It is 3"}, ("1 + 1? It is", "2", "3")),
    # neither a word nor a number is cut in two
    ({"chosen": "So 1 + 1 = 42", "rejected": "So 1 + 1 = 43"}, ("So 1 + 1 =", "42", "43")),
    ({"chosen": "one two three", "rejected": "one two"}, ("one", "two three", "two")),
    # a prompt of its own stays whole, though both sides begin with other words too
    ({"prompt": "Say it", "chosen": "It is 2", "rejected": "It is 3"}, ("Say it", "It is 2", "It is 3")),
]


@pytest.mark.parametrize("row, expected", ROWS)
def test_the_prompt_is_found_in_every_form(row, expected):
    pair = pair_of(normalize_row(row, 1, "data set"))
    assert (pair.prompt, pair.chosen, pair.rejected) == expected


def test_of_conversations_the_common_messages_are_the_prompt_as_in_trl():
    trl = pytest.importorskip("trl.data_utils")
    row = {"chosen": [*TALK, assistant("2")], "rejected": [*TALK, assistant("3")]}
    theirs, ours = trl.extract_prompt(row), pair_of(normalize_row(row, 1, "data set"))
    assert ours.prompt == theirs["prompt"] and [assistant(ours.chosen)] == theirs["chosen"]
    assert [assistant(ours.rejected)] == theirs["rejected"]


TWO, THREE = assistant("2"), assistant("3")


def sides(chosen, rejected=(*ASKED, THREE)):
    return {"chosen": list(chosen), "rejected": list(rejected)}


WRONG = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    ({"chosen": "q a", "rejected": "q a"}, "chosen and rejected are equal"),
    (sides([*ASKED, TWO], [*ASKED, TWO]), "chosen and rejected are equal"),
    (sides([TWO], [TWO]) | {"prompt": ASKED}, "chosen and rejected are equal"),
    ({"prompt": "q", "chosen": "a"}, "no rejected; a preference has columns named chosen and rejected"),
    ({"prompt": "q", "rejected": "a", "chosen": None}, "no chosen; a preference has"),
    ({"chosen": "q a"}, "no rejected; a preference has"),
    ({"prompt": "q"}, "no chosen and no rejected; a preference has columns named chosen and rejected"),
    ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected is blank"),
    ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is empty"),
    ({"prompt": "q", "chosen": 1, "rejected": "a"}, "chosen is a int, expected a text or a list of messages"),
    ({"prompt": "q", "chosen": [TWO], "rejected": "3"}, "of chosen and rejected one is a text and one a list"),
    ({"chosen": "yes", "rejected": "no"}, "no prompt, and chosen and rejected do not begin with the same words"),
    (sides([user("a"), TWO]), "no prompt, and chosen and rejected do not begin with the same message"),
    (sides([*ASKED, TWO, TWO]), "messages 2 and 3 of chosen are both the assistant's; user and assistant must take"),
    (sides([*ASKED, *ASKED, TWO]), "messages 1 and 2 of chosen are both the user's"),
    ({"prompt": [*ASKED, *ASKED], "chosen": "2", "rejected": "3"}, "messages 1 and 2 of prompt are both the user's"),
    (sides([*ASKED, SYSTEM]), "message 2 of chosen is a system message; only the first one may be"),
    (sides([*ASKED, {"role": "bot", "content": "2"}]), "message 2 of chosen has the role 'bot'"),
    (sides([*ASKED, {"role": "assistant"}]), "message 2 of chosen is not of the form"),
    (
        sides([*ASKED, TWO, *ASKED, TWO]),
        "after the prompt, chosen has assistant, user, assistant; the two must have all",
    ),
    (sides([*ASKED, TWO], ASKED), "after the prompt, rejected has no message; the two must have"),
    ({"prompt": "q", "chosen": "half \ud83d", "rejected": "3"}, "chosen has '\\ud83d' at character 6, half of a pair"),
]


@pytest.mark.parametrize("row, message", WRONG)
def test_a_wrong_row_is_one_line_that_names_it(row, message):
    with pytest.raises(ValueError, match=re.escape(f"data set, row 7: {message}")) as error:
        pair_of(normalize_row(row, 7, "data set"))
    assert "\n" not in str(error.value)


def as_list(rows):
    return list(rows)


def on_disk(rows):
    return datasets.Dataset.from_list(rows)


def as_stream(rows):
    return datasets.IterableDataset.from_generator(rows.__iter__)


@pytest.mark.parametrize("kind", [as_list, on_disk, as_stream])
@pytest.mark.parametrize(
    "number", [0, 4, 6]
)  # a text with a prompt, whole conversations, texts with a common beginning
def test_pairs_are_tokenised_once_as_prompts_and_completions_are_elsewhere(kind, number):
    tokenizer, (row, (prompt, chosen, rejected)) = tiny.make_tokenizer(), ROWS[number]
    ready = prepare_rows(kind([row] * 3), tokenizer, 256, 64, pairs=True)
    found = next(iter(ready))
    assert found[PROMPT] == render_prompt(tokenizer, prompt)
    assert found[PROMPT_IDS] == tokenizer(found[PROMPT], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found[COMPLETION_IDS]) == f"{chosen}<end_of_turn>"
    assert tokenizer.decode(found[REJECTED_IDS]) == f"{rejected}<end_of_turn>"
    assert json.dumps(found["chosen"]) == json.dumps(row["chosen"]), "the data's own columns stay as they are"
    if kind is not as_stream:
        assert prepare_rows(ready, tokenizer, 256, 64, pairs=True) is ready or kind is as_list


def test_rows_that_are_too_long_on_either_side_are_left_out_and_counted(caplog):
    rows = [{"prompt": "q", "chosen": "1" * n, "rejected": "2" * m} for n, m in ((3, 3), (30, 3), (3, 30))]
    ready = prepare_rows(rows, tokenizer := tiny.make_tokenizer(), 64, 16, pairs=True)
    assert len(ready) == 1 and "a completion longer than generation_max_length=16" in caplog.text
    assert "1 of 2 rows have a rejected longer than generation_max_length=16" in caplog.text
    streamed = prepare_rows(as_stream(rows), tokenizer, 64, 16, pairs=True)
    drawn = iter(streamed)
    assert [next(drawn)["chosen"] for _ in range(2)] == ["111"] * 2 and streamed.num_overlong == 2


def test_a_batch_has_chosen_and_rejected_side_by_side():
    tokenizer = tiny.make_tokenizer()
    rows = [{"prompt": "q" * n, "chosen": "1" * n, "rejected": "2"} for n in (1, 3)]
    ready = prepare_rows(rows, tokenizer, 64, 16, pairs=True)
    batch = Collator(tokenizer.pad_token_id, 64, 16)(ready)
    texts = [
        tokenizer.decode(ids[mask]) for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    assert [text.removesuffix("<end_of_turn>") for text in texts] == ["1", "2", "111", "2"]
    assert len(batch["prompt_ids"]) == 2 and batch["completion_mask"].dtype == torch.bool
    assert all(COMPLETION_IDS not in row and REJECTED_IDS not in row and QUESTION in row for row in batch["rows"])


def test_other_losses_take_rows_with_chosen_and_rejected_as_any_others():
    """Chosen and rejected are plain columns where nothing learns from pairs, equal ones too."""
    (row,) = prepare_rows([{"prompt": "q", "chosen": "a", "rejected": "a"}], tiny.make_tokenizer(), 64)
    assert row["chosen"] == "a" and REJECTED_IDS not in row
