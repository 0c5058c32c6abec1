"""`inference.py`: conversations, comparison with the base model, batches of questions, and lines for other servers."""

import csv
import io
import json
import re
import shlex
import signal
import sys

import pyarrow.parquet
import pytest
from commands import ROOT, refused

from tunix_torch.cli import answering, ask, chat
from tunix_torch.cli.chat import DIM, PLAIN, Shown
from tunix_torch.cli.serving import how_to_serve
from tunix_torch.data.files import read_file

SHORT = ["--max_new_tokens", "6", "--seed", "7"]


@pytest.fixture
def talk(call, monkeypatch, finished_run):
    """`talk(text, *flags)` is a conversation through a pipe whose input is the text."""

    def talk(text, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return call(ask, "--chat", "--model_path", finished_run, *SHORT, *flags)

    return talk


def asked_by(finished_run, *flags):
    args = ask.parse_args(["--question", "1 + 1?", *SHORT, *flags], "ask")
    return answering.Asked(args, str(finished_run))


# ---- conversations ----


@pytest.mark.parametrize("how", [["--no_do_sample"], ["--temperature", "1.5"]])
def test_what_a_chat_shows_token_by_token_is_the_answer(how, finished_run):
    """It is also the answer that the model gives to the question without a chat, whatever was shown on the way."""
    asked, shown = asked_by(finished_run, *how), []
    ids = asked.prompt("1 + 1?")[1]
    text = asked.stream(ids, 7, shown.append)
    ((result,),) = asked.answers(["1 + 1?"])
    assert result["completions"] == [text]
    assert len(shown) == 5, "once for every token after the first"
    assert all(later.startswith(earlier) for earlier, later in zip(shown, [*shown[1:], text], strict=True))
    assert asked.sampler.watch.__name__ == "<lambda>", "nobody watches any more"


def test_a_conversation_is_kept_through_a_pipe(talk, finished_run, monkeypatch):
    """Each line is a question, blank ones are none, `exit` ends, and a later prompt has the turns before it."""
    prompts = []
    prompt = answering.Asked.prompt
    monkeypatch.setattr(
        answering.Asked, "prompt", lambda self, question: prompts.append(question) or prompt(self, question)
    )
    result = talk("1 + 1?\n\n  And 2?  \nexit\nnever asked\n", "--no_do_sample")
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert re.findall("^> (.*)", result.stdout, re.MULTILINE) == ["1 + 1?", "And 2?"]
    first = result.stdout.split("> 1 + 1?\n")[1].split("\n\n> And 2?")[0]
    assert prompts[0] == "1 + 1?"
    assert [turn["role"] for turn in prompts[1]] == ["user", "assistant", "user", "assistant"], "the list grows"
    assert prompts[1][1]["content"] == first and prompts[1][2]["content"] == "And 2?"
    assert "\x1b" not in result.stdout, "codes are for terminals"
    refused(talk("half \udcff\n"), "surrogates")


def test_the_tiny_model_is_asked_each_question_by_itself(talk, monkeypatch):
    """It has seen no conversations; and a line says what it has learned."""
    prompts = []
    prompt = answering.Asked.prompt
    monkeypatch.setattr(
        answering.Asked, "prompt", lambda self, question: prompts.append(question) or prompt(self, question)
    )
    monkeypatch.setattr(chat, "asks_tiny", lambda path: True)
    monkeypatch.setattr(answering, "asks_tiny", lambda path: True)
    result = talk("1 + 1?\nAnd 2?\n", "--no_do_sample")
    assert prompts == ["1 + 1?", "And 2?"] and "; it has learned sums" in result.stdout


@pytest.mark.parametrize(
    "settings, is_tiny",
    [
        ({"model_name": "tiny", "data_path": None, "dataset": None}, True),
        ({"model_name": "tiny", "data_path": "mine.jsonl", "dataset": None}, False),
        ({"model_name": "google/gemma-3-270m-it"}, False),
        ({}, False),
    ],
)
def test_what_a_job_has_learned_is_known_by_its_settings(settings, is_tiny, tmp_path):
    """Also where it trained all weights, which name no base model. Of a script's trainer the data are not known."""
    facts = {"settings": settings | {"system_message": "", "learning_rate": 1e-3}}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert answering.asks_tiny(str(tmp_path)) == is_tiny
    assert answering.asks_tiny("tiny") and not answering.asks_tiny("google/gemma-3-270m-it")


def test_turns_that_the_model_cannot_take_are_left_out(finished_run, capsys):
    asked = asked_by(finished_run)
    most = asked.most_tokens
    turns = [{"role": role, "content": "1 " * 40} for role in ("user", "assistant", "user")]
    asked.model.config.max_position_embeddings = len(asked.prompt(turns)[1]) + 5
    chat._answer(asked, turns, 0)
    assert len(turns) == 1 and "left out" in capsys.readouterr().err
    asked.model.config.max_position_embeddings = 20
    with pytest.raises(ValueError, match=r"the question has \d+ tokens, and max_new_tokens=6: the model takes 20"):
        chat._answer(asked, turns, 0)
    assert most > 20


def test_reasoning_is_dim_whatever_the_parts_are():
    text = "a<reasoning>b\nc</reasoning><answer>d</answer>"
    for size in (1, 3, 7, 100):
        printed, before = io.StringIO(), sys.stdout
        sys.stdout = printed
        try:
            shown = Shown(dim=True)
            for end in range(size, len(text) + size, size):
                shown.update(text[:end])
            shown.update(text, whole=True)
        finally:
            sys.stdout = before
        result = printed.getvalue().replace(PLAIN + DIM, "")
        assert result == f"a{DIM}<reasoning>b\nc</reasoning>{PLAIN}<answer>d</answer>", (size, result)


def test_what_may_still_change_waits(capsys):
    shown = Shown(dim=False)
    for text, printed in (("é\ufffd", "é"), ("é€", "€"), ("é€<rea", ""), ("é€<read", "<read"), ("\x1b", "")):
        shown.update(text)
        assert capsys.readouterr().out == printed
    shown.update("é€<reader\x1b\ufffd", whole=True)
    assert capsys.readouterr().out == "er\\x1b\ufffd", "what would move the cursor is spelled"


class Keyboard(io.StringIO):
    """An input that counts as a terminal. Ctrl-C is pressed where a line is that says so."""

    def isatty(self):
        return True

    def readline(self, *_):
        line = super().readline()
        if line == "^C\n":
            signal.raise_signal(signal.SIGINT)
        return line


def test_ctrl_c_stops_an_answer_and_not_the_program(call, monkeypatch, finished_run):
    """Each answer can be stopped, and what there is of it stays in the conversation; at the prompt nothing happens."""
    handler, update, asked = signal.getsignal(signal.SIGINT), Shown.update, []

    def stopped_at_third_token(self, text, whole=False):
        update(self, text, whole)
        asked.append(text)
        if len(asked) in (3, 6):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Shown, "update", stopped_at_third_token)
    monkeypatch.setattr(sys, "stdin", Keyboard("1 + 1?\n^C\n2 + 2?\n3 + 3?\n"))
    try:
        result = call(ask, "--chat", "--model_path", finished_run, *SHORT, "--no_do_sample")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout.count("(stopped)") == 2 and len(asked) == 6 + 6, "the third answer came to its end"
    assert "exit or Ctrl-D ends" in result.stdout


# ---- the base model beside it ----


def test_the_base_model_answers_as_it_does_alone(finished_run, model_folder, call, tmp_path, monkeypatch):
    """With its adapter off a model samples what the base model samples from the same numbers."""
    questions = ["1 + 1?", "What is 12 + 7?"]

    def answers(model, *flags):
        batches = asked_by(model, "--num_samples", "2", "--system_message", "", *flags).answers(questions)
        return [result for batch in batches for result in batch]

    both, base, tuned = answers(finished_run, "--compare_base"), answers(model_folder), answers(finished_run)
    assert [r["base_completions"] for r in both] == [r["completions"] for r in base]
    assert [r["completions"] for r in both] == [r["completions"] for r in tuned] != [r["completions"] for r in base]

    monkeypatch.setenv("COLUMNS", "100")
    flags = ["--model_path", finished_run, "--question", "1 + 1?", "--compare_base", *SHORT]
    result = call(ask, *flags, "--output_file", tmp_path / "a.jsonl")
    assert re.search("^with the adapter +[|] base model$", result.stdout, re.MULTILINE), result.stdout
    (row,) = read_file(tmp_path / "a.jsonl", "file")
    assert set(row) == {"question", "prompt", "completions", "answers", "base_completions", "base_answers"}
    refused(call(ask, "--model_path", model_folder, *flags[2:]), "compare_base", "is no adapter")


def test_columns_stand_side_by_side():
    lines = ask.side_by_side(["left", "a long line of words"], ["right"], 23)
    assert lines == ["left       | right", "a long     |", "line of    |", "words      |"]


# ---- batches ----


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_batch_of_questions_is_answered_into_a_file_of_each_format(ending, finished_run, call, tmp_path):
    asked = [{"id": n, "ask": f'What is {n} + {n}?\nSay, "quickly"'} for n in range(3)]
    source, target = tmp_path / f"q{ending}", tmp_path / f"a{ending}"
    if ending == ".csv":
        with open(source, "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "ask"])
            writer.writeheader()
            writer.writerows(asked)
    elif ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(asked), source)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in asked))
    flags = ["--model_path", finished_run, "--questions_file", source, "--num_samples", "2", *SHORT]
    result = call(ask, *flags, "--question_column", "ask", "--output_file", target)
    assert result.returncode == 0, result.stderr
    rows = list(read_file(target, "file"))
    questions = [row["ask"] for row in asked]
    if ending == ".csv":
        assert [row["question"] for row in rows] == [question for question in questions for _ in range(2)]
        assert [row["sample"] for row in rows] == ["1", "2"] * 3
        assert list(rows[0]) == ["question", "prompt", "sample", "completion", "answer"]
    else:
        assert [row["question"] for row in rows] == questions
        assert all(len(row["completions"]) == len(row["answers"]) == 2 for row in rows)
    refused(call(ask, *flags, "--question_column", "nosuch"), "nosuch")
    new = ["--question", "half \udcff", "--output_file", tmp_path / "new.jsonl"]
    refused(call(ask, "--model_path", finished_run, *new), "surrogates")
    assert not (tmp_path / "new.jsonl").exists(), "a refused question leaves no file that would stand in the way"


def test_answers_are_written_as_they_come(finished_run, call, tmp_path, monkeypatch):
    """What was answered before a Ctrl-C is in the file, and the line says how much that is."""
    (tmp_path / "q.txt").write_text("".join(f"{n} + 1?\n" for n in range(6)))
    monkeypatch.setattr(answering, "BATCH_ROWS", 2)
    answers = answering.Asked.answers

    def stopped(self, questions):
        batches = answers(self, questions)
        yield next(batches)
        yield next(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(answering.Asked, "answers", stopped)
    for ending in (".csv", ".jsonl", ".parquet"):
        flags = ["--model_path", finished_run, "--questions_file", tmp_path / "q.txt", *SHORT]
        result = call(ask, *flags, "--output_file", tmp_path / f"a{ending}")
        assert result.returncode == 130 and "stopped after 4 of 6 questions; " in result.stderr
        assert [row["question"] for row in read_file(tmp_path / f"a{ending}", "file")] == [
            f"{n} + 1?" for n in range(4)
        ]


# ---- what does not go together, and other servers ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--chat", "--question", "1"], ["--question and --chat"]),
        (["--chat", "--output_file", "a.jsonl"], ["output_file='a.jsonl'", "goes with --question", "not with --chat"]),
        (["--chat", "--num_samples", "2"], ["num_samples=2", "not with --chat"]),
        (["--question", "1", "--question", "2"], ["--question was given twice", "--questions_file takes many"]),
        (["--chat", "--compare_base"], ["compare_base=True", "not with --chat"]),
        (["--chat", "--prompt_template", "alpaca"], ["prompt_template='alpaca'", "not with --chat"]),
        (["--serve", "--show_prompt"], ["show_prompt=True", "not with --serve"]),
        (["--question", "1", "--question_column", "a"], ["question_column='a'", "goes with --questions_file"]),
        (["--question", "1", "--output_file", "a.xlsx"], ["output_file='a.xlsx'", ".parquet"]),
        (["--questions_file", str(ROOT / "README.md"), "--question_column", "a"], ["question_column='a'", "a line"]),
        (["--serve", "--model_path", "./nowhere"], ["error: model_path='./nowhere'", "no such folder"]),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, words, call):
    refused(call(ask, *flags), *words)


def test_a_run_without_a_model_says_so_and_names_its_newest_checkpoint(call, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"learning_rate": 0.1}')
    given = ["--question", "1 + 1?", "--model_path", run]
    refused(call(ask, *given), f"error: model_path={str(run)!r}: a run that has no checkpoint yet")
    for step in (9, 10):
        (run / f"checkpoint-{step}").mkdir()
    refused(
        call(ask, *given), f"model_path={str(run)!r}: the run has not ended", f"{str(run / 'checkpoint-10')!r}, give"
    )


def test_serve_prints_lines_of_other_programs(finished_run, model_folder, call, tmp_path):
    result = call(ask, "--serve", "--model_path", finished_run)
    assert result.returncode == 0 and "-m tunix_torch.export" in result.stdout, result.stderr
    lines = how_to_serve(str(model_folder))
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("  ")]
    assert ["vllm", "serve", str(model_folder)] in words and ["transformers", "serve", str(model_folder)] in words
    curl = next(line for line in words if line[0] == "curl")
    assert json.loads(curl[-1])["model"] == str(model_folder)
    assert any("convert_hf_to_gguf.py" in line for line in words)


def test_the_lines_for_servers_ask_as_the_run_asked(tmp_path):
    """A server knows no system message: it stands before the question, as it did in training."""
    adapter = tmp_path / "it's"
    adapter.mkdir()
    (adapter / "config.json").write_text(json.dumps({"system_message": "Don't guess."}))
    lora = {
        "peft_type": "LORA",
        "r": 8,
        "base_model_name_or_path": "google/gemma-3-270m-it",
        "target_modules": ["q_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    lines = how_to_serve(str(adapter))
    words = [shlex.split(line, comments=True) for line in lines if line.startswith("  ")]
    assert words[0][-2:] == ["--merged", f"{adapter}-merged"]
    curl = next(line for line in words if line[0] == "curl")
    assert json.loads(curl[-1])["messages"][0]["content"].startswith("Don't guess.\n\n")
    assert words[-1][:3] == ["vllm", "serve", "google/gemma-3-270m-it"] and f"tuned={adapter}" in words[-1]
    (adapter / "adapter_config.json").write_text(json.dumps(lora | {"base_model_name_or_path": "./gone"}))
    with pytest.raises(ValueError, match="model_name=.*it's.*its base model is not to be found: './gone': no such fo"):
        how_to_serve(str(adapter))  # it was trained on a folder that lay elsewhere, or that is another one from here
