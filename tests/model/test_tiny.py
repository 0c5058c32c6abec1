"""The embedded default's tokenizer loses nothing, its arithmetic is right, and no test problem is trained on."""

import fcntl
import inspect
import operator
import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainers import make_trainer

from tunix_torch.data.prompts import end_of_turn_id
from tunix_torch.model import policy, tiny
from tunix_torch.model.loading import load_base_model, load_model, load_tokenizer
from tunix_torch.model.tiny import CHARACTERS, ROLES, SPECIAL_TOKENS, TAGS, arithmetic_rows, make_model, make_tokenizer

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True)
TOKENIZER = make_tokenizer()
# Arbitrary characters almost never spell a token of several characters, so such pieces are mixed in.
PIECES = [*TAGS, *ROLES, *SPECIAL_TOKENS, "<reason", "answer>", "users", "<", "</", "123", "  ", "\n\n"]
TEXT = st.lists(st.sampled_from([*CHARACTERS, *PIECES])).map("".join)

OPERATIONS = {"+": operator.add, "-": operator.sub, "x": operator.mul}
QUESTIONS = {
    r"What is (?P<a>\d+) (?P<op>[-+x]) (?P<b>\d+)\?": None,
    r"Add (?P<a>\d+) and (?P<b>\d+)\.": "+",
    r"(?P<a>\d+) plus (?P<b>\d+)\?": "+",
    r"Take (?P<b>\d+) from (?P<a>\d+)\.": "-",
    r"(?P<a>\d+) minus (?P<b>\d+)\?": "-",
    r"Multiply (?P<a>\d+) by (?P<b>\d+)\.": "x",
    r"(?P<a>\d+) times (?P<b>\d+)\?": "x",
}


def parse(question):
    """Return the problem that a question asks, as a person reads it: (a, operation, b)."""
    for pattern, operation in QUESTIONS.items():
        if match := re.fullmatch(pattern, question):
            return int(match["a"]), operation or match["op"], int(match["b"])
    raise AssertionError(f"nobody understands {question!r}")


def problems(rows):
    """Return the problems that rows ask; a sum is the same with its terms swapped."""
    return {
        (min(a, b), op, max(a, b)) if op == "+" else (a, op, b) for a, op, b in (parse(r["question"]) for r in rows)
    }


# ---- the tokenizer ----


@EXAMPLES
@given(TEXT)
def test_text_comes_back_from_its_tokens(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.unk_token_id not in ids or "<unk>" in text


def test_special_tokens_are_left_out_on_request_and_tags_are_not():
    ids = TOKENIZER("<bos><start_of_turn>user\n1<end_of_turn><reasoning>2</reasoning><pad>")["input_ids"]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "user\n1<reasoning>2</reasoning>"


def test_digits_are_tokens_one_by_one(subtests):
    for text in ("7", "1234", "40x8=320", "<answer>376</answer>"):
        with subtests.test(text=text):
            tokens = TOKENIZER.tokenize(text)
            assert [token for token in tokens if re.search(r"\d", token)] == re.findall(r"\d", text)


def test_tags_roles_and_characters_are_single_tokens(subtests):
    for piece in (*TAGS, *ROLES, *SPECIAL_TOKENS, *CHARACTERS):
        with subtests.test(piece=piece):
            assert TOKENIZER.tokenize(piece) == [piece]
            assert TOKENIZER.tokenize(piece * 2) == [piece] * 2
            assert len(TOKENIZER(f"1{piece}2")["input_ids"]) == 3


def test_every_token_has_its_own_id():
    ids = TOKENIZER.get_vocab().values()
    assert sorted(ids) == list(range(len(TOKENIZER)))
    names = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")
    assert len({getattr(TOKENIZER, name) for name in names}) == 4


def test_a_character_outside_the_alphabet_is_one_unknown_token():
    assert TOKENIZER.tokenize("1é2") == ["1", "<unk>", "2"]


def test_the_chat_template_begins_with_bos_and_ends_with_the_turn_of_the_model():
    turns = [{"role": "user", "content": " 1 + 1? "}]
    text = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><start_of_turn>user\n1 + 1?<end_of_turn>\n<start_of_turn>model\n"
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert ids.count(TOKENIZER.bos_token_id) == 1 and ids[0] == TOKENIZER.bos_token_id
    turns.append({"role": "assistant", "content": "2"})
    whole = TOKENIZER.apply_chat_template(turns, tokenize=False)
    assert whole == text + "2<end_of_turn>\n"
    assert end_of_turn_id(TOKENIZER) == TOKENIZER.eos_token_id


def test_what_is_saved_loads_again(tmp_path):
    model = make_model(TOKENIZER)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    tokenizer, text = load_tokenizer(str(tmp_path)), f"<bos><start_of_turn>user\n{CHARACTERS}<answer>12</answer>é"
    assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == TOKENIZER.decode(TOKENIZER(text)["input_ids"])
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer.special_tokens_map == TOKENIZER.special_tokens_map
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(load_base_model(str(tmp_path))(ids).logits, model(ids).logits)


# ---- the arithmetic ----


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_and_every_step_are_right(split):
    rows = arithmetic_rows(split, 3000, seed=1)
    assert len(rows) == 3000
    counts = dict.fromkeys(OPERATIONS, 0)
    for row in rows:
        a, operation, b = parse(row["question"])
        counts[operation] += 1
        assert row["answer"] == str(OPERATIONS[operation](a, b))
        layout = re.fullmatch(r"<reasoning>(.+)</reasoning><answer>(.+)</answer>", row["completion"], re.DOTALL)
        steps, answer = layout[1].split("\n"), layout[2]
        assert answer == row["answer"] and len(steps) >= 2
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+)([-+x])(\d+)=(-?\d+)", step).groups()
            assert OPERATIONS[sign](int(left), int(right)) == int(result), (row["question"], step)
        assert operation != "+" or steps[0].startswith(f"{a // 10 * 10}+"), "terms in another order than asked"
        assert steps[-1].endswith(f"={answer}")
    assert counts == dict.fromkeys(OPERATIONS, 1000)


def test_no_test_problem_is_ever_trained_on(subtests):
    """The rows are enough to show every problem of a split, sums with their terms swapped included."""
    for seed in (0, 1, 2, 77):
        with subtests.test(seed=seed):
            train, test = (
                problems(arithmetic_rows("train", 12_000, seed)),
                problems(arithmetic_rows("test", 1500, seed + 1)),
            )
            assert not train & test
            assert (len(train), len(test)) == (3695 + 3695 + 600, 400 + 400 + 120)


def test_test_rows_ask_different_problems():
    assert len(problems(arithmetic_rows("test", 256))) == 256


@pytest.mark.parametrize("split", ["train", "test"])
def test_same_seed_same_rows(split):
    assert arithmetic_rows(split, 100, seed=3) == arithmetic_rows(split, 100, seed=3)
    assert arithmetic_rows(split, 100, seed=3) != arithmetic_rows(split, 100, seed=4)


def test_rows_use_only_the_alphabet_of_the_tokenizer():
    for row in arithmetic_rows("train", 300):
        assert TOKENIZER.unk_token_id not in TOKENIZER(row["question"] + row["completion"])["input_ids"]


# ---- the model ----


def test_the_model_is_the_same_each_time_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    first, second, other = make_model(TOKENIZER), make_model(TOKENIZER), make_model(TOKENIZER, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_its_weights_do_not_depend_on_the_number_of_threads(monkeypatch):
    """An adapter that was trained on it where OMP_NUM_THREADS=1 has another base otherwise, by the same name."""
    monkeypatch.setitem(tiny.WARM_START, "steps", 3)
    encode, threads = tiny._encode_demonstrations, []
    spy = lambda *given: threads.append(torch.get_num_threads()) or encode(*given)  # noqa: E731
    monkeypatch.setattr(tiny, "_encode_demonstrations", spy)

    def made(own):
        torch.set_num_threads(own)
        model = tiny.make_model(tiny.make_tokenizer())
        tiny._warm_start(model, tiny.make_tokenizer())
        assert torch.get_num_threads() == own, "those of the process are as before"
        return model.state_dict()

    before = torch.get_num_threads()
    try:
        one, two = made(1), made(3)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert threads == [2] * 6, "where their number changes how sums are rounded, it is the same one"


def test_the_model_has_about_a_million_parameters_and_both_kinds_of_layers():
    model = make_model(TOKENIZER)
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.3e6
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == len(TOKENIZER) and model.config.eos_token_id == TOKENIZER.eos_token_id


def test_the_name_of_its_folder_changes_with_what_makes_it_and_with_nothing_else(monkeypatch):
    before = tiny.folder_name()
    with monkeypatch.context() as changed:
        changed.setitem(tiny.WARM_START, "steps", 1)
        assert tiny.folder_name() != before
    source = inspect.getsource
    with monkeypatch.context() as changed:
        changed.setattr(inspect, "getsource", lambda made: source(made).replace('"""', '"""Reworded. ', 1) + "# why\n")
        assert tiny.folder_name() == before
        changed.setattr(inspect, "getsource", lambda made: source(made).replace("128", "129"))
        assert tiny.folder_name() != before


def test_what_a_killed_process_left_in_the_cache_is_removed_and_what_another_writes_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNIX_CACHE", str(tmp_path))
    monkeypatch.setitem(tiny.WARM_START, "steps", 1)
    left, held = tmp_path / f"{tiny.UNFINISHED}left", tmp_path / f"{tiny.UNFINISHED}held"
    for folder in (left, held):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
    descriptor = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # as the process does that writes there
        made = tiny.ensure_tiny_model()
    finally:
        os.close(descriptor)
    assert sorted(tmp_path.iterdir()) == sorted([made, held])


def test_an_instruction_is_said_to_be_new_to_it(model_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(policy, "load_model", lambda name: load_model(model_folder))
    for message in ("", "Think."):
        make_trainer("tiny", tmp_path, processing_class=tiny.make_tokenizer(), system_message=message)
        assert ("model_name='tiny' has seen no instructions" in caplog.text) == bool(message)
