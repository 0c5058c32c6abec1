"""Every command that a page shows is run by a test, or says on the page what it needs that is not here; all parse."""

import ast
import csv
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from command_lines import WrongCommandError, check, module_of
from how_commands_are_run import ELSEWHERE, EVERYWHERE, FEW_STEPS, NEEDS, RUNS, WHAT_TO_DO
from shown_commands import (
    PAGES,
    ROOT,
    SHELL,
    as_if_not_called_by_make,
    blocks_of,
    called_by_make,
    in_backticks,
    in_blocks,
    in_source,
    without_language,
)

from tunix_torch.model import tiny

MARK = re.compile(r"#.*?\bneeds (?P<what>.+)$")


def shown():
    """All commands in blocks of shell, with those on all pages."""
    return [command for place, text in PAGES.items() for command in in_blocks(place, text)]


def begins_with(words, key):
    """Whether a command is the one of a table's key, or goes on after it with further flags."""
    key = tuple(shlex.split(key))
    return tuple(words[: len(key)]) == key


def needs_of(command):
    """What a command needs, as the comments on the page say; None: they say nothing.

    Raises:
        ValueError: a comment says it in other words.
    """
    own = len(command.lines)
    while own > 1 and command.lines[own - 2].endswith("\\"):
        own -= 1
    above = [line for line in command.lines[: own - 1] if line.lstrip().startswith("#")]
    for line in [*command.lines[own - 1 :], *reversed(above)]:
        mark = MARK.search(line)
        if mark:
            needed = mark["what"].split(" and ")
            if not set(needed) <= set(NEEDS):
                raise ValueError(f"{line.strip()}: expected after 'needs' some of those below")
            return needed
    return None


def missing_from(command):
    """The place and the words of a command that no table knows and no comment marks; None: it may stand on the page."""
    if command.words[0] in EVERYWHERE or shlex.join(command.words) in RUNS:
        return None
    try:
        if needs_of(command) is not None or any(begins_with(command.words, key) for key in ELSEWHERE):
            return None
    except ValueError as error:
        return f"{command.place}: {error}"
    return f"{command.place}: {shlex.join(command.words)}"


# ---- every command is run, or says why not ----


def test_every_command_in_a_block_is_run_by_a_test_or_says_what_it_needs():
    commands = shown()
    assert len(commands) > 90, "the blocks are not found"
    missing = list(filter(None, map(missing_from, commands)))
    assert not missing, "\n".join(["no test runs these commands:", *missing, WHAT_TO_DO])


def test_a_command_that_no_test_knows_is_named_with_its_place():
    page = "\n".join(
        [
            "```bash",
            "python train.py --use_grpo --max_steps 7   # for a week",
            "python train.py --use_grpo \\",
            "    --max_steps 8   # with a loop; needs a TPU",
            "make train   # in minutes",
            "python evaluate.py --dataset gsm8k   # needs a quantum computer",
            "# needs a GPU and the Hugging Face hub",
            "for steps in 1 2; do python train.py --max_steps $steps; done",
            "```",
        ]
    )
    commands = in_blocks("docs/none.md", page)
    assert [command.words[-1] for command in commands] == ["7", "8", "train", "gsm8k", "1", "2"]
    said = [missing_from(command) for command in commands]
    assert [bool(text) for text in said] == [True, False, False, True, False, False]
    assert said[0] == "docs/none.md:2: python train.py --use_grpo --max_steps 7"
    assert said[3].startswith("docs/none.md:6: ") and "expected after 'needs'" in said[3]
    assert needs_of(commands[-1]) == ["a GPU", "the Hugging Face hub"]


def test_a_block_with_commands_says_that_it_is_shell():
    wrong = [line for place, text in PAGES.items() for line in without_language(place, text)]
    assert not wrong, f"begin these blocks with ```bash, or ```console where they show output: {wrong}"


def test_the_tables_hold_what_the_pages_show_and_tests_that_exist():
    words = [command.words for command in shown()]
    assert not [key for key in RUNS if tuple(shlex.split(key)) not in words], "no page shows these any more"
    assert not [key for key in ELSEWHERE if not any(begins_with(each, key) for each in words)]
    for place in set(ELSEWHERE.values()):
        if place.startswith(".ci/run: "):
            target = place.removeprefix(".ci/run: ")
            assert re.search(rf"^make .*\b{target}\b", (ROOT / ".ci" / "run").read_text(), re.MULTILINE), place
        else:
            file, _, name = place.partition("::")
            functions = [node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
            assert name in functions, f"{place}: ELSEWHERE in tests/how_commands_are_run.py names a test that is gone"


# ---- what they are called with exists ----


@pytest.fixture
def checkout(finished_run, tmp_path, monkeypatch):
    """A folder like a checkout in which a run has ended, with the files that the pages' commands read."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "outputs":
            (tmp_path / path.name).symlink_to(path)
    outputs = shutil.copytree(finished_run, tmp_path / "outputs")
    shutil.copytree(outputs / "checkpoint-4", outputs / "checkpoint-50")
    shutil.copytree(finished_run, outputs / "previous" / "TIME")
    (outputs / "report.html").unlink()
    (tmp_path / "first_run").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in tiny.arithmetic_rows("train", 32))
    texts = "".join(
        json.dumps({"prompt": f"{n} + 1?", "completion": f"<answer>{n + 1}</answer>"}) + "\n" for n in range(16)
    )
    for name, text in {"my.jsonl": rows, "questions.jsonl": rows, "answers.jsonl": texts}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "FILE").write_text((ROOT / "configs" / "gemma3_270m.json").read_text())
    with open(tmp_path / "questions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["number", "ask"], [1, "What is 47 + 38?"], [2, "And 12 more?"]])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_of_pages_docstrings_and_helps_parses_and_names_what_is_there(checkout):
    commands = [*shown(), *in_source()]
    commands += [command for place, text in PAGES.items() for command in in_backticks(place, text)]
    places, wrong = {}, []
    for command in commands:
        places.setdefault(command.words, []).append(command.place)
    for words, where in places.items():
        try:
            check(words)
        except WrongCommandError as error:
            wrong.append(f"{', '.join(where)}: {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)
    assert len(places) > 200


@pytest.mark.parametrize(
    "line, words",
    [
        ("python train.py --use_grpo --learning_rat 1", "'--learning_rat'; did you mean '--learning_rate'"),
        ("python train.py --config configs/none.json", "configs/none.json"),
        ("python train.py --device abacus", "device='abacus'"),
        ("python trian.py", "trian.py: no such file"),
        ("python evaluate.py --preset wild", "invalid choice: 'wild'"),
        ("python inference.py --chat --serve", "--chat and --serve"),
        ("python plan_tpu.py --quick", "--topology"),
        ("python plan_tpu.py --topology v5e:2x4 --lerning_rate 1", "'--lerning_rate'"),
        ("python run_training.py model=gemma9", "model='gemma9': choose one of"),
        ("python run_training.py --multirun optimizer.learning_rate=1e-3,fast", "learning_rate"),
        ("python -m tunix_torch.none", "no module tunix_torch.none"),
        ("python -m benchmarks.torture --kils 3", "--kils"),
        ("python -m benchmarks.grpo_step --steps many", "invalid int value: 'many'"),
        ("python -m pytest -m fast tests/none", "no marker fast"),
        ("python docs/write_files.py --all", "takes no flags, and --all is given"),
        ("python -c 'import'", "invalid syntax"),
        ("accelerate launch --multi_gpus train.py", "--multi_gpus"),
        ("torchrun --nproc_per_node 4 train.py --lora_rang 2", "'--lora_rang'"),
        ("make trian", "No rule to make target 'trian'"),
        ("make crosscheck ARGS='--case gspo'", "unknown argument '--case'"),
        ("tunix-torch trian", "choose one of train"),
        ("tunix-torch ask --chat --top_p 2", "top_p=2.0"),
        ("./run_tpu_trainings.sh", "no such script"),
        ("./run_tpu_training.sh --dry-runs", "'--dry-runs'"),
        ("benchmarks/first_gpu.sh --devise cpu", "has no --devise"),
        ("pip install '.[none]'", "no extra none"),
        ("nethack", "unknown program 'nethack'"),
    ],
)
def test_a_command_that_can_not_work_is_told_with_the_reason(line, words, checkout):
    with pytest.raises(WrongCommandError) as told:
        check(shlex.split(line))
    assert words in str(told.value)


def test_every_variable_that_a_page_sets_is_read_somewhere():
    places = [
        *ROOT.glob("*.sh"),
        ROOT / "Makefile",
        *(ROOT / "tunix_torch").rglob("*.py"),
        ROOT / "tests" / "fuzzing.py",
    ]
    read = "".join(path.read_text() for path in places)
    for place, text in PAGES.items():
        blocks = ["\n".join(lines) for _, language, lines in blocks_of(text) if language in SHELL]
        set_there = re.findall(
            r"(?<![\w$-])([A-Z][A-Z_]{2,})=", "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", text)])
        )
        unread = {name for name in set_there if not re.search(rf"\b{name}\b", read)}
        assert not unread, f"{place}: nothing here reads {unread}"


# ---- they run ----


def in_this_process(words, added=()):
    """The module that a command runs, and its arguments. A target of make is what make would run for it."""
    if words[0] == "make":
        (words,) = called_by_make([*words[1:], f"ARGS={shlex.join(added)}"])
        added = ()
    name, *given = words[2:] if words[1] == "-m" else words[1:]
    return importlib.import_module(module_of(name)), [word for word in given if word != "..."] + list(added)


@pytest.mark.thorough
@pytest.mark.parametrize("line", RUNS)
def test_a_command_of_a_page_runs(line, checkout, call, monkeypatch):
    run = RUNS[line]
    monkeypatch.setattr(sys, "stdin", io.StringIO(run.typed))
    before = set(checkout.rglob(run.leaves)) if run.leaves else set()
    module, given = in_this_process(shlex.split(line), run.added.split())
    ended = call(module, *given)
    assert ended.returncode == 0, ended.stderr
    assert run.prints in ended.stdout, ended.stdout
    if run.leaves:
        assert set(checkout.rglob(run.leaves)) - before, f"{run.leaves} is not there"


@pytest.mark.slow  # Tunix's graphs are compiled for these shapes
def test_a_run_is_recorded_cross_checked_and_reported(checkout, call):
    """The three lines of docs/crosscheck.md, one after the other."""
    pytest.importorskip("tunix")
    lines = [shlex.join(c.words) for c in in_blocks("docs/crosscheck.md", PAGES["docs/crosscheck.md"])]
    added = {"train.py": FEW_STEPS.split()}
    for line, leaves in zip(lines, ("batches/step-0001.safetensors", "crosscheck.json", "report.html"), strict=True):
        words = shlex.split(line)
        module, given = in_this_process(words, added.get(words[1], ()))
        (checkout / "outputs" / "report.html").unlink(missing_ok=True)
        ended = call(module, *given)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert (checkout / "outputs" / leaves).is_file()


def test_the_seconds_of_each_step_are_those_of_the_metrics(checkout, capsys, monkeypatch):
    """The lines of Python in docs/tpu_first_run.md, on a run of this machine, which counts no compilations."""
    (code,) = [c.words[-1] for c in shown() if c.words[:2] == ("python", "-")]
    monkeypatch.setattr(sys, "argv", ["-", "outputs"])
    exec(code, {})
    rows = [json.loads(line) for line in (checkout / "outputs" / "metrics.jsonl").read_text().splitlines()]
    lines, steps = capsys.readouterr().out.splitlines(), [row for row in rows if "reward" in row]
    assert [line.split()[:2] for line in lines] == [["step", str(row["step"])] for row in steps]
    for line, row in zip(lines, steps, strict=True):
        rollout, learning = map(float, re.findall(r"([\d.]+) s", line))
        assert rollout == pytest.approx(row["rollout_seconds"], abs=0.01)
        assert learning == pytest.approx(row["learning_seconds"], abs=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize("target, prints", [("help", "make train "), ("check-device", "kind         cpu")])
def test_targets_of_make_run(target, prints):
    command = ["make", "--old-file", ".venv/.installed", target]
    ended = subprocess.run(
        command, cwd=ROOT, env=as_if_not_called_by_make(), capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0 and prints in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.thorough
def test_tensorboard_has_the_curves_of_the_runs(checkout):
    """On a port that is free, which TensorBoard says, and ended with the test."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(checkout / "outputs" / "logs") as writer:
        writer.add_scalar("reward", 1.5, 1)
    ((program, *given),) = called_by_make(["tensorboard"])
    assert program.endswith("/tensorboard")
    command = [ROOT / program, *given, "--port", "0", "--load_fast", "false"]
    deadline = time.monotonic() + 60
    with subprocess.Popen(command, cwd=checkout, stderr=subprocess.PIPE, text=True) as board:
        try:
            url = next((found[0] for line in board.stderr if (found := re.search(r"http://\S+", line))), None)
            assert url is not None, "TensorBoard ended before it said where it is"
            while "logs" not in (runs := json.load(urllib.request.urlopen(f"{url}data/runs"))):
                assert time.monotonic() < deadline, runs
                time.sleep(0.1)
        finally:
            board.kill()  # its handler of SIGTERM ends nothing where it is called in a destructor
