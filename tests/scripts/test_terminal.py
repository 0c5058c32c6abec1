"""What a terminal shows of a command that ends: one line for an error, and nothing that moves the cursor."""

import os
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, refused
from tqdm import tqdm

from tunix_torch.cli import ask, train
from tunix_torch.data.visible import visible

ESCAPE, SPELLED = "\x1b[31mred", r"\x1b[31mred"


def start(code, **how):
    """Start Python with some code in which `run_script` is known."""
    code = f"import logging, sys, time\nfrom tunix_torch.cli.script import run_script\n{code}"
    environment = {**os.environ, "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **(pipe | how))


# ---- endings ----


def test_a_python_without_pytorch_is_told_where_it_is():
    """`-S` leaves out the environment's packages, as another Python has none."""
    result = subprocess.run([sys.executable, "-S", "train.py"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "has no PyTorch" in result.stderr and ". .venv/bin/activate" in result.stderr


def test_a_second_ctrl_c_leaves_at_once():
    """The first one lets the script close what it has open, which may take long."""
    process = start(
        "def main():\n"
        "    try:\n        print('working'); time.sleep(60)\n"
        "    finally:\n        print('closing'); time.sleep(60)\n"
        "run_script(main)",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    try:
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "closing\n"
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(timeout=30) == 130 and time.monotonic() - began < 10
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_whoever_stops_reading_ends_a_command_without_a_traceback(closed):
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does when it has its lines
    process = start(
        f"def main():\n    for _ in range(100):\n        print('x' * 10_000, file=sys.{closed}, flush=True)\n"
        "run_script(main)",
        **{closed: writer},
    )
    os.close(writer)
    said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGPIPE and "Traceback" not in f"{said}", said


class Script:
    """A script that fails while it shows a progress bar."""

    __name__ = "script"

    def __init__(self, error):
        self.error = error

    def main(self):
        self.bar = tqdm(total=3, file=sys.stderr)
        self.bar.update(1)
        raise self.error


@pytest.mark.parametrize("error, code", [(ValueError("a=1: no"), 2), (OSError(5, "gone", "/x"), 1)])
def test_an_error_has_a_line_of_its_own_beside_a_progress_bar(error, code, call):
    result = call(Script(error))
    *before, last = result.stderr.splitlines()
    assert result.returncode == code and last.startswith("error: ") and "[Errno" not in last, result.stderr
    assert before, "the bar stands above the line, and is not drawn again below it"


@pytest.mark.parametrize("ended_by_torchrun", [True, False])
def test_a_mistake_is_said_by_the_first_process_and_by_another_only_if_that_one_goes_on(ended_by_torchrun, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "60" if ended_by_torchrun else "1")
    process = start("def main():\n    print('here')\n    raise ValueError('a=1: no')\nrun_script(main)")
    process.stdout.readline()
    if ended_by_torchrun:
        time.sleep(0.5)
        process.terminate()
    _, stderr = process.communicate(timeout=30)
    said = (-signal.SIGTERM, "") if ended_by_torchrun else (2, "error: a=1: no\n")
    assert (process.returncode, stderr) == said


def test_a_warning_has_a_line_of_its_own_beside_a_progress_bar():
    process = start(
        "from tqdm import tqdm\n"
        "def main():\n"
        "    with tqdm(total=2) as bar:\n"
        "        bar.update(1)\n"
        f"        logging.getLogger('x').warning('it says %s', {ESCAPE!r})\n"
        "run_script(main)"
    )
    _, stderr = process.communicate(timeout=60)
    assert f"it says {SPELLED}" in [line.rpartition("\r")[2] for line in stderr.split("\n")], repr(stderr)


# ---- what comes from data and models ----


def test_what_could_change_a_terminal_is_spelled_and_all_else_stays():
    assert visible("a\tb\nc é 数 🙂") == "a\tb\nc é 数 🙂"
    assert visible(f"{ESCAPE}\r\x07\x9b\u202e\ud800\x7f") == SPELLED + r"\r\x07\x9b\u202e\ud800\x7f"


def test_questions_and_answers_are_shown_without_their_escape_codes(call, model_folder, tmp_path):
    result = call(ask, "--model_path", model_folder, "--question", ESCAPE, "--max_new_tokens", "2", "--show_prompt")
    assert result.stdout.count(SPELLED) == 2 and "\x1b" not in result.stdout, result.stdout
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"question": "{ESCAPE}", "answer": "{ESCAPE}"}}\n'.replace("\x1b", r"\u001b") * 8)
    flags = "--use_grpo --max_steps 1 --batch_size 2 --max_completion_length 4 --report_to none".split()
    flags += ["--model_name", model_folder, "--system_message=", "--output_dir", tmp_path / "out"]
    result = call(train, *flags, "--data_path", path, "--val_data_path", path)
    assert result.returncode == 0, result.stderr
    assert f"{SPELLED}  (answer: {SPELLED})" in result.stdout and "\x1b" not in result.stdout, result.stdout


def test_errors_are_shown_without_the_escape_codes_of_data(call, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a\\u001b[31mred": 1}')
    result = call(train, "--data_path", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out")
    refused(result, f"it has a{SPELLED}")
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("script, flags", [(train, []), (ask, ["--question", "1"])])
@pytest.mark.parametrize("wrong", [["--hub_tokn=SECRET"], ["--hub_tokn", "SECRET"]])
def test_the_value_of_an_argument_that_is_unknown_is_not_shown(script, flags, wrong, call):
    result = call(script, *flags, *wrong)
    refused(result, "--hub_tokn")
    assert "SECRET" not in result.stdout + result.stderr
