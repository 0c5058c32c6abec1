"""Rows become prompts of known widths, texts are tokenised once, and each kind of bad input gets one clear error."""

import datetime
import itertools
import math

import datasets
import pandas
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tunix_torch import GRPOConfig, TunixTrainer, rewards
from tunix_torch.data import batches
from tunix_torch.data import prompts as data
from tunix_torch.data.batches import Collator
from tunix_torch.data.prompts import end_of_turn_id, prepare_rows, render_prompt
from tunix_torch.data.rows import COMPLETION_IDS, PROMPT, PROMPT_IDS, answer_of, columns_of
from tunix_torch.data.sources import training_rows
from tunix_torch.model import tiny
from tunix_torch.rewarding.columns import check_columns
from tunix_torch.rewarding.scoring import call_rewards
from tunix_torch.run.callbacks import MetricsFile

ROWS = [{"question": "1" * (1 + i % 7), "answer": str(i)} for i in range(50)]


def as_list(rows):
    return list(rows)


def on_disk(rows):
    return datasets.Dataset.from_list(rows)


def as_stream(rows):
    return datasets.IterableDataset.from_generator(rows.__iter__)


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
    assert row[PROMPT_IDS].count(tokenizer.bos_token_id) == 1
    assert row[PROMPT].endswith("<start_of_turn>model\n") and "Think.\n\n1 + 1?" in row[PROMPT]


def test_tokenizer_without_a_chat_template_gets_plain_text():
    plain = tiny.make_tokenizer()
    plain.chat_template = None
    assert render_prompt(plain, "1 + 1?") == "1 + 1?\n"
    assert end_of_turn_id(plain) == plain.eos_token_id


def test_completions_for_supervised_training_end_with_the_turn(tokenizer):
    row = prepare_rows([{"question": "1 + 1?", "answer": "2"}], tokenizer, 64, max_completion_length=64)[0]
    assert row[COMPLETION_IDS][-1] == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert tokenizer.decode(row[COMPLETION_IDS][:-1]) == "<reasoning></reasoning>\n<answer>2</answer>"


def test_collator_pads_prompts_left_and_completions_right(tokenizer):
    rows = [{"question": q, "answer": a} for q, a in (("1?", "1"), ("12345?", "12"))]
    batch = Collator(tokenizer.pad_token_id, 64, 64)(prepare_rows(rows, tokenizer, 64, 64))
    assert batch["prompt_mask"][0].tolist() == [False] * 4 + [True] * (batch["prompt_ids"].shape[1] - 4)
    assert batch["completion_mask"][0].tolist() == [True] * (batch["completion_ids"].shape[1] - 1) + [False]
    assert [row["answer"] for row in batch["rows"]] == ["1", "12"]


# ---- messages ----

ASKED = [{"role": "user", "content": "1 + 1?"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [*ASKED, {"role": "assistant", "content": "3"}, {"role": "user", "content": "Really?"}]


def test_messages_are_rendered_with_the_chat_template(tokenizer):
    def render(messages, system_message=""):
        return prepare_rows([{"prompt": messages}], tokenizer, 90, system_message=system_message)[0][PROMPT]

    assert render(ASKED) == render_prompt(tokenizer, "1 + 1?")
    assert render(ASKED, "Think.") == render_prompt(tokenizer, "1 + 1?", "Think."), "before the question"
    turns = ["user\n1 + 1?", "model\n3", "user\nReally?"]
    expected = "".join(f"<start_of_turn>{turn}<end_of_turn>\n" for turn in turns)
    assert render(TURNS) == f"<bos>{expected}<start_of_turn>model\n"
    assert render(TURNS, "Think.") == render(TURNS).replace("1 + 1?", "Think.\n\n1 + 1?"), "the first of the user's"
    assert render([SYSTEM, *ASKED], "Think.") == render([SYSTEM, *ASKED]), "they have an instruction of their own"
    assert TURNS[0] == ASKED[0] == {"role": "user", "content": "1 + 1?"}, "and stay as they are"


def test_messages_that_can_not_be_rendered_are_named_with_their_row():
    plain, gemma2 = tiny.make_tokenizer(), tiny.make_tokenizer()
    plain.chat_template = None
    gemma2.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + gemma2.chat_template
    )
    rows = [{"prompt": ASKED}, {"prompt": [SYSTEM, *ASKED]}]
    with pytest.raises(ValueError, match="data set, row 1: .*no chat template"):
        prepare_rows(rows, plain, 64)
    with pytest.raises(ValueError, match="data set, row 2: .*chat template refuses .*: System role not supported"):
        prepare_rows(rows, gemma2, 64)
    with pytest.raises(ValueError, match="data set, row 2: the question is a dict"):
        prepare_rows([*rows[:1], {"prompt": ASKED[0]}], gemma2, 64)


# ---- columns ----


@pytest.mark.parametrize("kind", ["list", "on disk"])
def test_rows_with_columns_named_like_ours_are_not_taken_for_prepared_ones(tokenizer, kind):
    rows = [{"question": "1?", "answer": "1", "prompt_ids": [7], "completion_ids": "x", "prompt_mask": None}] * 2
    ready = prepare_rows(rows if kind == "list" else datasets.Dataset.from_list(rows), tokenizer, 40, 60)
    assert ready[0][PROMPT_IDS] == tokenizer(ready[0][PROMPT], add_special_tokens=False)["input_ids"]
    assert columns_of(list(ready))["prompt_ids"] == [[7], [7]]
    assert list(prepare_rows(ready, tokenizer, 40)) == list(ready), "ours are"
    batch = Collator(tokenizer.pad_token_id, 40, 60)(ready)
    assert batch["rows"][0]["completion_ids"] == "x" and batch["completion_ids"].shape[0] == 2


@pytest.mark.parametrize("kind", [as_list, on_disk])
def test_rows_prepared_for_rollouts_are_prepared_anew_for_supervised_training(tokenizer, kind):
    """Regression: prepared rows of a data set on disk no longer held the reasoning that a completion is made of."""
    rows = [{"question": f"{i}?", "answer": f"so\n#### {i}"} for i in range(9)]
    anew = prepare_rows(prepare_rows(kind(rows), tokenizer, 40), tokenizer, 40, 64)
    assert list(anew) == list(prepare_rows(kind(rows), tokenizer, 40, 64))
    assert tokenizer.decode(anew[7][COMPLETION_IDS][:-1]) == "<reasoning>so</reasoning>\n<answer>7</answer>"


def test_answers_of_a_data_set_are_classes_names_and_numbers_as_they_were_meant(tokenizer):
    features = {
        "question": datasets.Value("string"),
        "answer": datasets.ClassLabel(names=["no", "yes"]),
        "answers": datasets.List(datasets.Value("float32")),
        "level": datasets.ClassLabel(names=["easy"]),
    }
    rows = datasets.Dataset.from_list(
        [{"question": "1?", "answer": 1, "answers": None, "level": 0}] * 2
        + [{"question": "2?", "answer": None, "answers": [0.1], "level": 0}],
        datasets.Features(features),
    )
    stream = rows.to_iterable_dataset()
    for kind in (rows, rows.with_format("torch"), stream, stream.with_format("torch")):
        ready = list(itertools.islice(prepare_rows(kind, tokenizer, 40), 3))
        assert [answer_of(row) for row in ready] == ["yes", "yes", 0.1]
        assert [row["level"] for row in ready] == [0, 0, 0], "other columns are as they are"


@pytest.mark.parametrize("kind", [as_list, on_disk, as_stream])
def test_rewards_get_dates_as_iso_texts(tokenizer, kind):
    """Regression: dates were accepted when rows were read, but rewards refused them after the first rollout."""
    rows = [{"question": f"Day {i}?", "answer": datetime.date(2024, 5, i)} for i in (1, 2)]
    ready = list(itertools.islice(prepare_rows(kind(rows), tokenizer, 40), 2))
    texts = ["<answer>2024-05-01</answer>", "<answer>2024-05-01</answer>"]
    assert call_rewards([rewards.correctness_reward], ready, texts) == [[1.0, 0.0]]
    assert ready[0]["answer"] == rows[0]["answer"]


@pytest.mark.parametrize("kind", [as_list, on_disk])
def test_an_answer_that_comes_after_many_rows_without_one_has_its_type(tokenizer, kind):
    rows = [{"question": "1?", "answers": None, "solved": None}] * 1500 + [
        {"question": "1?", "answers": [7], "solved": 7}
    ]
    ready = prepare_rows(kind(rows), tokenizer, 40)
    assert answer_of(ready[0]) is None and answer_of(ready[1500]) == 7
    with pytest.raises(
        ValueError, match="data set, row 1: no answer.* The judge 'needs' takes 'answer'; .* give its param"
    ):
        check_columns([needs], ready, "judge")


def needs(completions, answer, **columns):
    return [float(a == "2") for a in answer]


def test_what_a_function_lacks_is_seen_before_it_is_called(tokenizer):
    def by_level(completions, level):
        return level

    for kind in (as_list, on_disk):
        ready = prepare_rows(kind(ROWS), tokenizer, 40)
        check_columns([needs], ready)
        with pytest.raises(
            ValueError, match="data set, row 1: no column 'level'. The reward function 'by_level' takes"
        ):
            check_columns([needs, by_level], ready)
        bad = prepare_rows(kind([{**row, "completions": "x"} for row in ROWS]), tokenizer, 40)
        with pytest.raises(ValueError, match="column 'completions' of the data set: reward functions get something"):
            check_columns([needs], bad)


NESTED = [
    {
        "prompt": f"{i}?",
        "count": i,
        "share": 0.1 * i,
        "is": i == 1,
        "meta": {"a": [1, i], "b": {"c": "x"}},
        "list": [[i]],
    }
    for i in range(3)
]


@pytest.mark.parametrize("kind", [as_list, on_disk, as_stream, pandas.DataFrame])
def test_all_columns_reach_reward_functions_as_they_stand_in_the_data(tokenizer, kind):
    seen = {}

    def reward(completions, **columns):
        seen.update(columns)
        return [0.0] * len(completions)

    rows = training_rows(kind(NESTED))
    ready = list(itertools.islice(prepare_rows(rows, tokenizer, 40, wrap_prompts=False), 3))
    call_rewards([reward], ready, ["x"] * 6)
    for name in NESTED[0]:
        expected = [row[name] for row in NESTED for _ in range(2)]
        assert seen[name] == expected and [type(value) for value in seen[name]] == list(map(type, expected)), name
    assert seen["prompts"] == seen["prompt"], "a text that is not wrapped is the prompt as it stands in the data"


# ---- overlong prompts ----


def test_lists_data_sets_and_streams_give_the_same_prompts(tokenizer, subtests):
    for completion_width in (None, 60):
        for kind in (as_list, on_disk, as_stream):
            with subtests.test(kind=kind, completion_width=completion_width):
                rows = [
                    *ROWS[:5],
                    {"question": "1" * 99, "answer": "7"},
                    {"question": "2", "answer": "8" * 99},
                    *ROWS[5:],
                ]
                expected = prepare_rows(rows, tokenizer, 40, completion_width)
                got = prepare_rows(kind(rows), tokenizer, 40, completion_width)
                got = list(itertools.islice(got, len(expected)))
                assert got == expected
                assert columns_of(got) == columns_of(expected)
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
        ids = [data.encode_prompts(one, [row[PROMPT]])[0] for row in rows]
        assert [row[PROMPT_IDS] for row in rows] == ids


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
    assert len(pulled) <= 100 + batches.CHUNK


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
    with pytest.raises(ValueError, match="row 2: no question"):
        list(prepare_rows(as_stream([ROWS[0], {"answer": "a"}]), tokenizer, 20))


def digits(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def make_trainer(model_folder, folder, train, evaluation=None, reward=digits, **settings):
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


# ---- what people bring ----


def test_the_quick_start_of_trl_runs(model_folder, tmp_path):
    """TRL's quick start has rows with a prompt only, and a reward function that takes completions and **kwargs."""

    def reward(completions, **kwargs):
        assert kwargs.keys() == {
            "prompts",
            "prompt",
            "question",
            "completion_ids",
            "trainer_state",
            "log_metric",
            "log_extra",
        }
        return [float(len(set(completion))) for completion in completions]

    rows = datasets.Dataset.from_dict({"prompt": [f"Say {i}." for i in range(8)]})
    trainer = make_trainer(model_folder, tmp_path, rows, rows.select([0, 1]), reward, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2 and "eval_accuracy" in trainer.evaluate()


@pytest.mark.parametrize("kind", [as_list, on_disk, as_stream])
def test_messages_train_and_rewards_get_messages(model_folder, tmp_path, kind):
    seen = []

    def reward(prompts, completions):
        assert all(prompt in (ASKED, TURNS) for prompt in prompts)
        assert all([message["role"] for message in completion] == ["assistant"] for completion in completions)
        seen.extend(prompts)
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = kind([{"prompt": ASKED}, {"prompt": TURNS}] * 2)
    trainer = make_trainer(model_folder, tmp_path, rows, rows, reward, max_steps=1, max_prompt_length=90)
    trainer.train()
    assert len(seen) == 16 and seen.count(TURNS) == 8


def test_texts_and_messages_may_be_mixed(model_folder, tmp_path):
    def reward(prompts, completions, **columns):
        kinds = {(isinstance(p, str), isinstance(c, str)) for p, c in zip(prompts, completions, strict=True)}
        assert kinds == {(True, True), (False, False)}
        return [float(len(completion)) for completion in completions]

    rows = [{"prompt": ASKED}, {"question": "1 + 1?", "answer": 2}] * 2
    make_trainer(model_folder, tmp_path, rows, None, reward, max_steps=1).train()


@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("kind", [as_list, on_disk, as_stream])
def test_supervised_training_takes_a_prompt_and_a_completion(model_folder, tmp_path, kind, messages):
    rows = [{"prompt": "1 + 1?", "completion": "So 2."}] * 4
    if messages:
        rows = [{"prompt": ASKED, "completion": [{"role": "assistant", "content": "So 2."}]}] * 4
    trainer = make_trainer(model_folder, tmp_path, kind(rows), kind(rows[:2]), None, use_grpo=False, max_steps=1)
    text = make_trainer(model_folder, tmp_path, ROWS, None, None, use_grpo=False).processing_class
    (row, *_) = itertools.islice(trainer.train_dataset, 1)
    assert text.decode(row[COMPLETION_IDS]) == "So 2.<end_of_turn>" and row[PROMPT] == render_prompt(text, "1 + 1?")
    trainer.train()
    assert trainer.evaluate().keys() - {"epoch"} == {"eval_loss", "eval_runtime"}


@pytest.mark.parametrize(
    "rows, settings, message",
    [
        ([{"question": "q"}], {"reward": needs}, "row 1: no answer.*The reward function 'needs' takes 'answer'"),
        ([{"question": "q"}], {"use_grpo": False}, "row 1: no completion to learn from"),
        ([{"question": "q", "answer": {"a": 1}}], {"reward": needs}, "row 1: the answer is a dict.*'needs' takes"),
        ([{"question": "q", "answer": math.inf}], {"reward": needs}, "row 1: the answer is inf.*'needs' takes"),
        ([{"question": "half \ud83d"}], {}, "row 1: the question has"),
        ([{"question": "q", "prompts": 1}], {}, "column 'prompts' of the data set"),
        ([], {}, "there are only 0 training rows"),
    ],
)
def test_rows_that_can_not_be_trained_on_are_one_line(model_folder, tmp_path, rows, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(model_folder, tmp_path, rows * 4, **settings)


def test_evaluation_rows_have_what_the_judge_takes(model_folder, tmp_path):
    with pytest.raises(ValueError, match="data set, row 1: no answer.*The judge 'needs' takes 'answer'"):
        make_trainer(model_folder, tmp_path, None, [{"question": "q"}], needs)
    trainer = make_trainer(model_folder, tmp_path, None, ROWS[:2], needs)
    with pytest.raises(ValueError, match="data set, row 1: no answer.*The judge 'needs' takes 'answer'"):
        trainer.evaluate([{"question": "q"}])
    rows = datasets.Dataset.from_list([{"question": "q", "answer": 2}])
    assert trainer.evaluate(datasets.DatasetDict(test=rows))["eval_accuracy"] == 0.0


def test_a_stream_without_what_a_reward_takes_is_named_when_it_is_called(model_folder, tmp_path):
    rows = as_stream([{"question": "q"}] * 4)
    with pytest.raises(ValueError, match="data set, row 1: no answer.*The reward function 'needs' takes 'answer'"):
        make_trainer(model_folder, tmp_path, rows, None, needs).train()
