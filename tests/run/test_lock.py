"""One job at a time writes into a folder, whatever became of the last; what is rewritten is never there in part."""

import json
import signal
import subprocess
import sys

import pytest
from runs import run

from tunix_torch.config.files import write_whole
from tunix_torch.run.lock import LOCK_FILE, locked

HOLDER = """
import sys, time
from tunix_torch.run.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_job_is_refused_with_the_process_that_has_the_folder(holder, model_folder, tmp_path):
    with pytest.raises(ValueError, match=rf"output_dir='.*out': process {holder.pid} on .* writes there"):
        run(model_folder, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_process_that_was_killed_is_taken_over_and_said(holder, tmp_path, caplog, number):
    holder.send_signal(number)
    holder.wait()
    with locked(tmp_path / "out"):
        assert f"in use by process {holder.pid} on " in caplog.text
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def test_a_folder_is_free_when_its_job_has_ended(tmp_path, caplog):
    for _ in range(2):
        with locked(tmp_path):
            pass
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        assert not caplog.text


def test_metrics_are_whole_after_a_resume_whatever_had_become_of_the_file(model_folder, tmp_path):
    run(model_folder, tmp_path / "a", max_steps=4)
    path = tmp_path / "a" / "metrics.jsonl"

    def rows():
        timed = ("_runtime", "_per_second", "_time", "seconds")
        return [
            {k: v for k, v in json.loads(line).items() if not k.endswith(timed)}
            for line in path.read_text().splitlines()
        ]

    def resumed():
        run(model_folder, tmp_path / "a", max_steps=6, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
        return rows()

    expected = resumed()
    assert [row["step"] for row in expected if "reward" in row] == [1, 2, 3, 4, 5, 6]
    assert sum("train_loss" in row for row in expected) == 1, "the summary of the run that was resumed is left out"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:10] + "\n", *lines[2:]]))
    assert resumed() == expected
    path.unlink()
    assert resumed() == expected


def test_a_file_that_is_rewritten_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
