"""Rows -> prompts: formats of files, answers, widths, and one clear error for each kind of bad input."""

import json

import pytest

from tunix_torch import DataConfig, tiny
from tunix_torch.data import (
    Collator,
    end_of_turn_id,
    load_data,
    load_rows,
    normalize_row,
    prepare_rows,
    render_prompt,
)
from tunix_torch.scoring import columns_of


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def write(path, text):
    path.write_text(text)
    return str(path)


def test_json_list_json_lines_and_jsonl_hold_the_same_rows(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    assert load_rows(write(tmp_path / "a.json", json.dumps(rows))) == rows
    assert load_rows(write(tmp_path / "b.json", lines)) == rows
    assert load_rows(write(tmp_path / "c.jsonl", lines)) == rows


def test_pretty_printed_json_object_is_refused_with_a_line(tmp_path):
    with pytest.raises(ValueError, match="line 3"):
        load_rows(write(tmp_path / "a.json", '[\n{"question": "1"},\n{"question" 2}\n]'))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"question": "1", "answer": "1"}\n{"question": }\n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", "[1, 2]", "row 1: expected an object"),
        ("a.jsonl", '"text"\n', "row 1: expected an object"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / name, text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_rows(str(tmp_path / "missing.jsonl"))


@pytest.mark.parametrize("row", [{"question": "1 + 1?"}, {"question": "1 + 1?", "answer": " "}])
def test_row_without_an_answer_is_named(tmp_path, row):
    path = write(tmp_path / "a.jsonl", json.dumps({"question": "q", "answer": "1"}) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match="row 2: no answer"):
        load_data(DataConfig(data_path=path), seed=0)


def test_row_without_a_question_is_named():
    with pytest.raises(ValueError, match="row 7: no question"):
        normalize_row({"answer": "1"}, 7, "file")


def test_a_question_that_is_no_text_is_refused_rather_than_printed_into_a_prompt():
    with pytest.raises(ValueError, match="row 1: the question is a list"):
        normalize_row({"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}, 1, "file")


@pytest.mark.parametrize("column", ["answer", "answers", "expected_answers"])
@pytest.mark.parametrize("question", ["question", "prompt"])
def test_columns_by_any_of_their_names(question, column):
    row = normalize_row({question: "1 + 1?", column: 2, "level": "easy"}, 1, "file")
    assert (row["question"], row["answer"], row["level"]) == ("1 + 1?", "2", "easy")


def test_gsm8k_answers_are_split_into_reasoning_and_answer():
    row = normalize_row({"question": "q", "answer": "48/2 = 24 clips.\n48+24 = 72.\n#### 72"}, 1, "gsm8k")
    assert row["answer"] == "72"
    assert row["completion"] == "<reasoning>48/2 = 24 clips.\n48+24 = 72.</reasoning>\n<answer>72</answer>"


def test_generated_rows_never_share_a_question_with_the_held_out_set():
    train, evaluation = load_data(DataConfig(), seed=3)
    assert len(evaluation) == 256 and len(train) == 4096
    assert not {row["question"] for row in train} & {row["question"] for row in evaluation}


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


def test_json_lines_end_at_newlines_only(tmp_path):
    text = '{"question": "0 + 1?", "answer": "1", "note": "a\u2028b"}\n{"question": "1 + 1?", "answer": "2"}\n'
    assert [row["answer"] for row in load_rows(write(tmp_path / "a.jsonl", text))] == ["1", "2"]


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"question": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="val_data_path=.*a.jsonl.*not UTF-8"):
        load_rows(str(tmp_path / "a.jsonl"), setting="val_data_path")


def test_a_list_of_one_answer_is_that_answer():
    assert normalize_row({"question": "q", "answers": ["7"]}, 1, "file")["answer"] == "7"
    with pytest.raises(ValueError, match="row 3: 2 answers"):
        normalize_row({"question": "q", "answers": ["7", "8"]}, 3, "file")


def test_an_answer_that_ends_in_a_bare_mark_is_no_answer():
    with pytest.raises(ValueError, match="row 1: no answer"):
        normalize_row({"question": "q", "answer": "48 + 24 = 72 ####"}, 1, "file")


def test_a_completion_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match="row 2: the completion is a NoneType"):
        normalize_row({"question": "q", "answer": "1", "completion": None}, 2, "file")


def test_rewards_see_none_where_a_row_lacks_a_column():
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "p", "answer": "2", "level": 3}]
    assert columns_of(rows, 2)["level"] == [None, None, 3, 3]
    with pytest.raises(ValueError, match="column 'completions'"):
        columns_of([{"prompt": "p", "answer": "1", "completions": "x"}])
