"""Rows -> prompts: widths, tokens that are made once, streams, and one clear error for each kind of bad input."""

import itertools

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tunix_torch import GRPOConfig, TunixTrainer, data, tiny
from tunix_torch.callbacks import MetricsFile
from tunix_torch.data import Collator, end_of_turn_id, prepare_rows, render_prompt
from tunix_torch.scoring import columns_of

ROWS = [{"question": "1" * (1 + i % 7), "answer": str(i)} for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def test_long_prompts_are_left_out_and_counted_never_cut(tokenizer, caplog):
    rows = [{"question": "1" * n, "answer": "1"} for n in (3, 50, 4)]
    ready = prepare_rows(rows, tokenizer, max_prompt_length=20)
    assert [row["question"] for row in ready] == ["111", "1111"]
    assert "1 of 3 rows have a prompt longer than max_prompt_length=20" in caplog.text
    with pytest.raises(ValueError, match="raise max_prompt_length"):
        prepare_rows(rows[1:2], tokenizer, max_prompt_length=20)


def test_prompts_begin_with_one_bos_and_end_with_the_models_turn(tokenizer):
    row = prepare_rows([{"question": "1 + 1?", "answer": "2"}], tokenizer, 64, system_message="Think.")[0]
    assert row["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert row["prompt"].endswith("<start_of_turn>model\n") and "Think.\n\n1 + 1?" in row["prompt"]


def test_tokenizer_without_a_chat_template_gets_plain_text():
    plain = tiny.make_tokenizer()
    plain.chat_template = None
    assert render_prompt(plain, "1 + 1?") == "1 + 1?\n"
    assert end_of_turn_id(plain) == plain.eos_token_id


def test_completions_for_supervised_training_end_with_the_turn(tokenizer):
    row = prepare_rows([{"question": "1 + 1?", "answer": "2"}], tokenizer, 64, max_completion_length=64)[0]
    assert row["completion_ids"][-1] == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert tokenizer.decode(row["completion_ids"][:-1]) == "<reasoning></reasoning>\n<answer>2</answer>"


def test_collator_pads_prompts_left_and_completions_right(tokenizer):
    rows = [{"question": q, "answer": a} for q, a in (("1?", "1"), ("12345?", "12"))]
    batch = Collator(tokenizer.pad_token_id, 64, 64)(prepare_rows(rows, tokenizer, 64, 64))
    assert batch["prompt_mask"][0].tolist() == [False] * 4 + [True] * (batch["prompt_ids"].shape[1] - 4)
    assert batch["completion_mask"][0].tolist() == [True] * (batch["completion_ids"].shape[1] - 1) + [False]
    assert [row["answer"] for row in batch["rows"]] == ["1", "12"]


def test_rewards_see_none_where_a_row_lacks_a_column():
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "p", "answer": "2", "level": 3}]
    assert columns_of(rows, 2)["level"] == [None, None, 3, 3]
    with pytest.raises(ValueError, match="column 'completions'"):
        columns_of([{"prompt": "p", "answer": "1", "completions": "x"}])


# ---- overlong prompts ----


def as_list(rows):
    return list(rows)


def on_disk(rows):
    return datasets.Dataset.from_list(rows)


def as_stream(rows):
    return datasets.IterableDataset.from_generator(rows.__iter__)


@pytest.mark.parametrize("kind", [as_list, on_disk, as_stream])
@pytest.mark.parametrize("completion_width", [None, 60])
def test_lists_data_sets_and_streams_give_the_same_prompts(tokenizer, kind, completion_width):
    rows = [*ROWS[:5], {"question": "1" * 99, "answer": "7"}, {"question": "2", "answer": "8" * 99}, *ROWS[5:]]
    expected = prepare_rows(rows, tokenizer, 40, completion_width)
    got = prepare_rows(kind(rows), tokenizer, 40, completion_width)
    assert list(itertools.islice(got, len(expected))) == expected
    assert len(expected) == len(rows) - 1 - (completion_width is not None)


@pytest.mark.parametrize("kind", [as_list, on_disk])
def test_overlong_prompts_are_counted_or_raised(tokenizer, kind, caplog):
    rows = [{"question": "1" * n, "answer": "1"} for n in (3, 50, 60, 4)]
    ready = prepare_rows(kind(rows), tokenizer, 20)
    assert [row["question"] for row in ready] == ["111", "1111"]
    assert "2 of 4 rows have a prompt longer than max_prompt_length=20" in caplog.text
    message = "2 of 4 rows .*max_prompt_length=20 tokens; the first is row 2 with 59: raise max_prompt_length"
    with pytest.raises(ValueError, match=message):
        prepare_rows(kind(rows), tokenizer, 20, overlong="raise")


def test_other_columns_of_any_type_come_through_untouched(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNIX_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "CACHED_CHARACTERS", 0)
    rows = [{"question": "1", "answer": "1", "x": x} for x in (3, "three", [1, "a"], None)]
    assert [row["x"] for row in prepare_rows(rows, tokenizer, 20)] == [3, "three", [1, "a"], None]


# ---- tokenised once ----


def forbid_tokenizing(monkeypatch):
    call = PreTrainedTokenizerFast.__call__

    def forbid(tokenizer, text, **settings):
        assert isinstance(text, str), "tokenised again"  # the token that ends a turn is looked up in a single text
        return call(tokenizer, text, **settings)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", forbid)


def test_the_same_texts_are_tokenised_once(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNIX_CACHE", str(tmp_path))
    uncached = prepare_rows(ROWS, tokenizer, 40, 64)
    assert not list(tmp_path.iterdir()), "few short texts are not worth a file"
    monkeypatch.setattr(data, "CACHED_CHARACTERS", 0)
    first = prepare_rows(ROWS, tokenizer, 40, 64)
    with monkeypatch.context() as context:
        forbid_tokenizing(context)
        assert prepare_rows(ROWS, tiny.make_tokenizer(), 40, 64) == first == uncached
        with pytest.raises(AssertionError, match="tokenised again"):
            prepare_rows(ROWS[:-1], tokenizer, 40, 64)


def test_another_tokenizer_or_instruction_finds_no_tokens_of_the_first(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("TUNIX_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "CACHED_CHARACTERS", 0)
    other, plain = tiny.make_tokenizer(), tiny.make_tokenizer()
    other.add_tokens(["111"])
    plain.chat_template = None
    for one, message in ((tokenizer, ""), (other, ""), (plain, ""), (tokenizer, "Think.")):
        rows = prepare_rows(ROWS, one, 60, system_message=message)
        ids = [data.encode_prompts(one, [row["prompt"]])[0] for row in rows]
        assert [row["prompt_ids"] for row in rows] == ids


def test_data_set_on_disk_is_tokenised_once_and_stays_on_disk(tokenizer, monkeypatch, tmp_path):
    on_disk(ROWS).save_to_disk(tmp_path / "rows")
    ready = prepare_rows(datasets.load_from_disk(tmp_path / "rows"), tokenizer, 40)
    assert isinstance(ready, datasets.Dataset) and ready.cache_files
    forbid_tokenizing(monkeypatch)
    again = prepare_rows(datasets.load_from_disk(tmp_path / "rows"), tiny.make_tokenizer(), 40)
    assert list(again) == list(ready)
    assert prepare_rows(ready, tokenizer, 40) is ready


# ---- streams ----


def test_stream_is_read_as_it_is_drawn(tokenizer):
    pulled = []

    def rows():
        for i in itertools.count():
            pulled.append(i)
            yield {"question": str(i), "answer": "1"}

    stream = prepare_rows(datasets.IterableDataset.from_generator(rows), tokenizer, 40)
    assert not pulled
    assert [row["question"] for row in itertools.islice(stream, 100)] == [str(i) for i in range(100)]
    assert len(pulled) <= 100 + data.CHUNK


def test_stream_begins_anew_in_the_next_epochs_order(tokenizer):
    rows = [{"question": str(i), "answer": "1"} for i in range(20)]
    stream = prepare_rows(as_stream(rows).shuffle(seed=0, buffer_size=10), tokenizer, 40)
    drawn = [row["question"] for row in itertools.islice(stream, 60)]
    epochs = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(epoch) == sorted(row["question"] for row in rows) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [row["question"] for row in itertools.islice(stream, 60)] == drawn


def test_overlong_prompts_of_a_stream_are_counted_warned_of_once_or_raised(tokenizer, caplog):
    rows = [{"question": "1" * n, "answer": "1"} for n in (3, 50, 60, 4)]
    stream = prepare_rows(as_stream(rows), tokenizer, 20)
    assert [row["question"] for row in itertools.islice(stream, 2)] == ["111", "1111"]
    assert (stream.num_rows, stream.num_overlong) == (4, 2)
    assert caplog.text.count("left out") == 1
    with pytest.raises(ValueError, match="row 2 of the stream has a prompt of 59 tokens"):
        list(prepare_rows(as_stream(rows), tokenizer, 20, overlong="raise"))
    with pytest.raises(ValueError, match="none that fits max_prompt_length=20"):
        list(prepare_rows(as_stream(rows[1:3]), tokenizer, 20))


def test_stream_names_a_bad_row(tokenizer):
    with pytest.raises(ValueError, match="row 2: no answer"):
        list(prepare_rows(as_stream([ROWS[0], {"question": "q"}]), tokenizer, 20))


def make_trainer(model_folder, folder, train, evaluation=None, **settings):
    def reward(prompts, completions, **columns):
        return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "generation_max_length": 8,
        "max_prompt_length": 40,
        "system_message": "",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | settings
    args = GRPOConfig(output_dir=str(folder), **settings)
    return TunixTrainer(model_folder, reward, args, train, evaluation, callbacks=[MetricsFile()])


@pytest.mark.parametrize("num_rows", [5, 100], ids=["resumed past the end of the data", "within it"])
def test_resumed_stream_equals_the_uninterrupted_one_bit_for_bit(model_folder, tmp_path, num_rows):
    def run(name, checkpoint=None):
        rows = as_stream(tiny.arithmetic_rows("train", num_rows)).shuffle(seed=3, buffer_size=10)
        trainer = make_trainer(model_folder, tmp_path / name, rows, save_strategy="steps", save_steps=3)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "checkpoint-3"))
    for name, weights in whole.items():
        assert torch.equal(weights, resumed[name]), name


def test_trainer_says_what_a_stream_needs(model_folder, tmp_path):
    with pytest.raises(ValueError, match="max_steps=-1: streamed rows have no end"):
        make_trainer(model_folder, tmp_path, as_stream(ROWS), max_steps=-1)
    with pytest.raises(ValueError, match="dataloader_num_workers=2"):
        make_trainer(model_folder, tmp_path, as_stream(ROWS), dataloader_num_workers=2)


def test_trainer_takes_data_sets_and_tokenises_evaluation_rows_once(model_folder, tmp_path, monkeypatch):
    trainer = make_trainer(model_folder, tmp_path, on_disk(ROWS), on_disk(ROWS[:4]), max_steps=1)
    trainer.train()
    forbid_tokenizing(monkeypatch)
    first = trainer.evaluate()
    assert trainer.evaluate()["eval_accuracy"] == first["eval_accuracy"]


def test_trainer_raises_overlong_prompts_when_asked(model_folder, tmp_path):
    rows = [*ROWS, {"question": "1" * 90, "answer": "1"}]
    with pytest.raises(ValueError, match="1 of 51 rows"):
        make_trainer(model_folder, tmp_path, rows, overlong_prompts="raise")
