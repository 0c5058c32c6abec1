"""The notebooks are clean, name only flags and files that exist, and run from the first cell to the last on a CPU."""

import ast
import contextlib
import importlib
import io
import json
import os
import re
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parent.parent.parent
KAGGLE, COLAB = ROOT / "notebooks" / "kaggle_tpu_v5e8.ipynb", ROOT / "notebooks" / "colab_gpu.ipynb"
QUICKSTART = ROOT / "notebooks" / "quickstart.ipynb"
NOTEBOOKS = pytest.mark.parametrize("path", [KAGGLE, COLAB], ids=lambda path: path.stem)  # of machines
ALL = pytest.mark.parametrize("path", [KAGGLE, COLAB, QUICKSTART], ids=lambda path: path.stem)
# The commands that cells call, by the word that names each, with the module of `tunix_torch.cli` that reads its flags.
COMMANDS = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "inference.py": "ask",
    "plan_tpu.py": "plan",
    "tunix_torch.export": "export",
}


def cells(path, kind):
    """The sources of a notebook's cells of a kind, by their ids, in order."""
    book = json.loads(path.read_text(encoding="utf-8"))
    return {cell["id"]: "".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == kind}


def strings_in(node, lists):
    """The text constants in an expression, those of the lists that it takes up with a star included."""
    for child in ast.walk(node):
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        elif isinstance(child, ast.Name):
            yield from lists.get(child.id, [])


def commands_of(path):
    """Each command that the cells call: the word that names it, and all words of it that stand in the notebook."""
    lists = {}
    for source in cells(path, "code").values():
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign | ast.AugAssign):
                (target,) = node.targets if isinstance(node, ast.Assign) else [node.target]
                if isinstance(node.value, ast.List | ast.IfExp):
                    before = lists.get(target.id, []) if isinstance(node, ast.AugAssign) else []
                    lists[target.id] = [*before, *strings_in(node.value, lists)]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run":
                words = [word for argument in node.args[1:] for word in strings_in(argument, lists)]
                name = next((word for word in words if word in COMMANDS), None)
                if name is not None:
                    yield name, words


def flags_known_to(command):
    """The flags in a command's help."""
    printed, asked = io.StringIO(), "--help-all" if command == "train" else "--help"
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        importlib.import_module(f"tunix_torch.cli.{command}").main([asked], command)
    return set(re.findall(r"(?<![\w-])--\w+", printed.getvalue()))


@ALL
def test_a_notebook_is_valid_and_holds_no_results(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert set(book["metadata"]) == {"kernelspec", "language_info"} and len(book["metadata"]["language_info"]) == 1
    ids = [cell["id"] for cell in book["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in book["cells"]:
        assert cell["metadata"] == {} and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            ast.parse("".join(cell["source"]))  # no magics, so that plain Python runs it
        else:
            assert cell["cell_type"] == "markdown" and set(cell) == {"cell_type", "id", "metadata", "source"}


@NOTEBOOKS
def test_what_can_be_set_stands_in_the_first_code_cell(path):
    first, *others = cells(path, "code").values()
    assert first.count("TUNIX_NOTEBOOK_") > 8
    assert not set(re.findall(r"TUNIX_NOTEBOOK_\w+", "".join(others))) - {"TUNIX_NOTEBOOK_INSTALLED"}


@NOTEBOOKS
def test_every_flag_that_a_notebook_passes_exists(path):
    commands = dict(commands_of(path))
    assert set(commands) == set(COMMANDS) - ({"plan_tpu.py"} if path == COLAB else set())
    of_train = flags_known_to("train")
    for name, words in commands.items():
        flags = {word for word in words if word.startswith("--")}
        known = flags_known_to(COMMANDS[name]) | (of_train if name == "plan_tpu.py" else set())
        assert flags and not flags - known, name


@ALL
def test_every_file_that_a_notebook_names_exists(path):
    text = "\n".join([*cells(path, "code").values(), *cells(path, "markdown").values()])
    named = set(re.findall(r"(?<![\w/])(?:configs|docs)/[\w/.]+\.\w+|(?<![\w/.])\w+\.py\b", text))
    assert named and not {name for name in named if not (ROOT / name).is_file()}


def test_both_notebooks_call_commands_alike():
    (kaggle,), (colab,) = [cells(path, "code")["run"].partition("\nos.environ")[:1] for path in (KAGGLE, COLAB)]
    assert kaggle == colab


# ---- from the first cell to the last ----


@pytest.fixture
def settings(model_folder, tmp_path, monkeypatch):
    """The environment in which a notebook runs a small job with GSM8K's shape of rows, offline and on the CPU."""
    monkeypatch.chdir(ROOT / "notebooks")
    rows = [
        {
            "question": f"Tom has {a} apples and buys {b}. How many has he?",
            "answer": f"He has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} apples.\n#### {a + b}",
        }
        for a in range(2, 8)
        for b in range(3, 7)
    ]
    for name, part in (("train", rows[:16]), ("test", rows[16:20])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    values = {
        "MODEL": model_folder,
        "CONFIG": ROOT / "configs" / "quick_test.json",
        "TOPOLOGY": "v5e:1x1",
        "DEVICE": "cpu",
        "TRAIN_FILE": tmp_path / "train.jsonl",
        "TEST_FILE": tmp_path / "test.jsonl",
        "STEPS": 2,
        "PROMPTS": 2,
        "GROUP": 2,
        "LENGTH": 8,
        "NUM_QUESTIONS": 2,
        "FOLDER": tmp_path / "results",
        "INSTALLED": 1,
    }
    inherited = {k: v for k, v in os.environ.items() if k not in ("USE_TORCH_XLA", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    environment = inherited | {f"TUNIX_NOTEBOOK_{name}": str(value) for name, value in values.items()}
    with mock.patch.dict(os.environ, environment, clear=True):
        yield tmp_path / "results"


def execute(path, in_processes):
    """Run all code cells in order in one namespace, which is returned.

    Args:
        in_processes: the commands, by the name of their log, that run as the notebook runs them, each in a process of
            its own. The others run here, since imports take most of the time of a small job; None: all in processes.
    """
    namespace = {"__name__": path.stem}
    for name, source in cells(path, "code").items():
        exec(compile(source, f"{path.name}, cell {name}", "exec"), namespace)
        if name == "run" and in_processes is not None:
            namespace["run"] = partial(run_some_here, namespace["run"], in_processes)
    return namespace


def run_some_here(in_process, in_processes, name, *words, **environment):
    """Call the notebook's own `run` for the commands named in `in_processes`, and `run_here` for the others."""
    return (in_process if name in in_processes else run_here)(name, *words, **environment)


def run_here(name, *words, **environment):
    """What the notebooks' `run` does, but in this process and without a log."""
    words, printed = list(map(str, words)), io.StringIO()
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(printed):
        if words[0] == "-c":
            exec(words[1], {})
        else:
            command, *flags = words[1:] if words[0] == "-m" else words
            importlib.import_module(f"tunix_torch.cli.{COMMANDS[command]}").main(flags, name)
    return printed.getvalue()


def check_results(folder):
    """What a notebook must have left: the adapter, metrics of every step, an evaluation, a model that loads."""
    from transformers import AutoModelForCausalLM

    assert (folder / "run" / "adapter_model.safetensors").is_file()
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    summary = json.loads((folder / "evaluation-2.summary.json").read_text())
    assert summary["num_questions_done"] == summary["metrics"]["total"] == 2
    assert AutoModelForCausalLM.from_pretrained(folder / "merged-2").num_parameters() > 0
    assert json.loads((folder / "device.json").read_text())["kind"] == "cpu"
    assert (folder / "send_back.zip").is_file()


@pytest.mark.thorough
def test_the_kaggle_notebook_runs_to_its_end(settings):
    pytest.importorskip("torch_xla")  # plan_tpu.py needs it, and a process of its own
    execute(KAGGLE, ("device", "plan"))
    check_results(settings)
    assert json.loads((settings / "plan.json").read_text())["fits"]
    assert "Probably fits v5e:1x1" in (settings / "plan.log").read_text()


@pytest.mark.thorough
def test_the_colab_notebook_runs_to_its_end(settings):
    execute(COLAB, ())
    check_results(settings)


@pytest.mark.thorough
def test_the_quickstart_notebook_runs_to_its_end(settings, monkeypatch, capsys):
    pytest.importorskip("tunix")  # its last part compares with Tunix
    for name, value in {"MPLBACKEND": "Agg", "TUNIX_NOTEBOOK_PROMPTS": "8", "TUNIX_NOTEBOOK_GROUP": "4"}.items():
        monkeypatch.setenv(name, value)
    execute(QUICKSTART, ())
    assert (settings / "adapter_model.safetensors").is_file()
    printed = capsys.readouterr().out
    assert printed.count("Question: ") == 3 and "policy log-probabilities" in printed and "fail" not in printed


@NOTEBOOKS
def test_a_command_that_fails_stops_the_notebook_and_its_output_is_kept(path, settings):
    namespace, cell = {}, cells(path, "code")
    for name in ("settings", "install", "run"):
        exec(cell[name], namespace)
    with pytest.raises(RuntimeError, match="broken ended with exit code 3"):
        namespace["run"]("broken", "-c", "print('so far'); exit(3)")
    assert "so far" in (settings / "broken.log").read_text()


@pytest.mark.slow
@NOTEBOOKS
def test_a_notebook_runs_to_its_end_with_a_process_for_each_command(path, settings):
    execute(path, None)
    check_results(settings)
    logs = {log.stem for log in settings.glob("*.log")}
    assert logs == {"device", "train", "evaluate", "ask", "export"} | ({"plan"} if path == KAGGLE else set())
