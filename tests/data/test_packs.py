"""Packs hold every row once, never overflow, and waste little; a batch of packs holds each row's tokens as they are."""

import itertools

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunix_torch.data.packs import PackCollator, PackedRows, best_fit, packed
from tunix_torch.data.prompts import prepare_rows
from tunix_torch.data.rows import COMPLETION_IDS, LEARNED, PROMPT_IDS
from tunix_torch.model import tiny

ROWS = [{"question": "1" * (1 + i % 7), "completion": "2" * (1 + i % 5)} for i in range(50)]


def prepared(kind=list):
    return prepare_rows(kind(ROWS), tiny.make_tokenizer(), 40, 20)


def length(row):
    return len(row[PROMPT_IDS]) + len(row[COMPLETION_IDS])


@given(st.lists(st.integers(1, 20), max_size=60))
def test_every_row_is_in_one_pack_and_two_packs_never_fit_into_one(lengths):
    packs = best_fit(lengths, 20)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    filled = sorted(sum(lengths[row] for row in pack) for pack in packs)
    assert all(tokens <= 20 for tokens in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > 20
    assert packs == best_fit(lengths, 20)


def test_lists_and_data_sets_give_the_same_packs_and_a_stream_packs_all_of_its_rows():
    rows, width = prepared(), 60
    packs = [pack for pack in packed(rows, width)]
    assert len(packs) < len(rows) / 2
    assert [*packed(prepared(datasets.Dataset.from_list), width)] == packs
    stream = packed(prepared(lambda rows: datasets.IterableDataset.from_generator(rows.__iter__)), width)
    drawn, again = ([*itertools.islice(stream, 60)] for _ in range(2))
    assert drawn == again and all(sum(map(length, pack)) <= width for pack in drawn)
    assert {row["question"] for pack in drawn for row in pack} == {row["question"] for row in ROWS}


@pytest.mark.parametrize("step_kind", ["eager", "compiled"])
def test_a_batch_holds_each_rows_tokens_in_their_places(monkeypatch, step_kind):
    monkeypatch.setattr("tunix_torch.data.packs.device.step_kind", lambda: step_kind)
    rows = PackedRows(prepared(), 60)
    packs = [rows[0], rows[len(rows) - 1]]
    batch = PackCollator(0, 60)(packs)
    assert step_kind == "eager" or batch["completion_ids"].shape == (2, 60), "where shapes must not follow the data"
    seen = []
    for i, pack in enumerate(packs):
        for number, row in enumerate(pack):
            here = batch["segments"][i] == number
            assert batch["completion_ids"][i, here].tolist() == row[PROMPT_IDS] + row[COMPLETION_IDS]
            assert batch["learned_mask"][i, here].tolist() == [False] * len(row[PROMPT_IDS]) + list(
                map(bool, row[LEARNED])
            )
            assert torch.equal(batch["offsets"][i, here], torch.arange(length(row)))
            seen.append(row["question"])
    assert int(batch["completion_mask"].sum()) == sum(length(row) for pack in packs for row in pack)
    assert [row["question"] for row in batch["rows"]] == seen
    assert not batch["prompt_mask"].any() and not (batch["learned_mask"] & ~batch["completion_mask"]).any()
