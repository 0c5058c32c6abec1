"""The same rows reach the terminal, TensorBoard, W&B and Trackio, each by its real package, without a network."""

import json
import os
import subprocess
import sys

import pytest
from commands import ROOT
from rich.console import Console
from trainers import digits_reward, make_trainer

from tunix_torch.completions.tables import as_markdown, chosen, on_terminal

COLUMNS = {
    "step": [3] * 4,
    "prompt_index": [0, 0, 1, 1],
    "prompt": ["What is 2 + 2?"] * 2 + ["Add [bold]7[/] and 5."] * 2,
    "answer": ["4", "4", None, None],
    "completion": ["<answer>4</answer>\n<b>", "\x1b[31mred", "x" * 900, "数" * 60],
    "rewards/correctness_reward": [1.0, 0.0, None, 0.0],
    "reward": [1.0, 0.0, 0.5, 0.0],
    "advantage": [1.0, -1.0, 1.0, -1.0],
    "length": [12, 4, 128, 9],
    "clipped": [False, False, True, False],
}


@pytest.mark.parametrize("width", [40, 60, 100, 200])
def test_a_table_fits_its_terminal_and_shows_what_is_there(width, capsys):
    Console(width=width, highlight=False).print(on_terminal(COLUMNS, "Step 3", width))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= width and "\x1b" not in shown
    for text in (
        "Step 3",
        "<answer>4</answer>",
        r"\x1b[31mred",
        "(answer: 4)",
        "[bold]7[/]",
        "-1.00",
        "128 cut",
        "...",
    ):
        assert text in shown, (text, shown)
    assert shown.count("What is 2 + 2?") == 1, "a prompt stands above its group"


def test_those_that_are_shown_are_the_first_ones():
    assert chosen(COLUMNS, 3, False)["length"] == [12, 4, 128] and chosen(COLUMNS, None, False) == COLUMNS
    assert chosen(COLUMNS, 8, True)["length"] == [12, 128]


def test_in_markdown_texts_are_code_that_nothing_renders():
    lines = as_markdown(COLUMNS).splitlines()
    for text in ("<b>", r"\x1b[31mred", "Add [bold]7[/] and 5."):
        assert f"    {text}" in lines
    assert any("`rewards/correctness_reward` 1.00" in line for line in lines)


def test_tables_come_as_often_as_was_asked_and_reach_tensorboard(model_folder, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = {"log_completions": True, "log_completions_steps": 2, "num_completions_to_print": 3}
    trainer = make_trainer(
        model_folder, tmp_path, digits_reward, report_to="tensorboard", max_steps=4, completions_max_mb=0, **shown
    )
    trainer.train()
    out = capsys.readouterr().out
    assert [step for step in range(1, 5) if f"Step {step}\n" in out.replace(" ", "").replace("Step", "Step ")] == [2, 4]
    (events,) = (tmp_path / "runs").rglob("events*")
    texts = EventAccumulator(str(events)).Reload()
    written = texts.Tensors("completions/text_summary")
    assert [event.step for event in written] == [2, 4]
    assert written[0].tensor_proto.string_val[0].decode().count("`advantage`") == 16, (
        "all of them, not those on the terminal"
    )
    assert not (tmp_path / "completions").exists()


# ---- services whose packages are no requirement ----

JOB = """
import sys
from trainers import digits_reward, make_trainer
make_trainer(sys.argv[1], sys.argv[2], digits_reward, report_to=sys.argv[3], max_steps=2, log_completions=True).train()
"""


def run_with(service, model_folder, folder, **environment):
    """Train for two steps in a process of its own, with a home folder of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "TUNIX_DEVICE": "cpu", "HOME": str(folder)} | environment
    command = [sys.executable, "-c", JOB, model_folder, str(folder / "out"), service]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.thorough
def test_trackio_gets_the_rows(model_folder, tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    import pyarrow.parquet

    run_with("trackio", model_folder, tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    kept = pyarrow.parquet.read_table(tmp_path / "out" / "completions" / "completions_00002.parquet").to_pydict()
    code = (
        "import json, sqlite3, pathlib\n"
        "from trackio.sqlite_storage import SQLiteStorage as S\n"
        "(project,) = S.get_projects(); (run,) = S.get_runs(project)\n"
        "print(json.dumps([row for row in S.get_logs(project, run) if 'completions' in row], default=str))\n"
    )
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    rows = json.loads(result.stdout.splitlines()[-1])
    assert [row["step"] for row in rows] == [1, 2], result.stderr
    table = rows[1]["completions"]["_value"]
    assert [row["completion"] for row in table] == kept["completion"]
    assert [row["advantage"] for row in table] == pytest.approx(kept["advantage"])


@pytest.mark.thorough
def test_wandb_gets_the_rows_offline(model_folder, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    import pyarrow.parquet

    run_with("wandb", model_folder, tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    kept = pyarrow.parquet.read_table(tmp_path / "out" / "completions" / "completions_00002.parquet").to_pydict()
    tables = [json.loads(path.read_text()) for path in (tmp_path / "wandb").rglob("*.table.json")]
    (table,) = [table for table in tables if table["data"][0][table["columns"].index("step")] == 2]
    rows = {name: [row[i] for row in table["data"]] for i, name in enumerate(table["columns"])}
    assert rows == kept
