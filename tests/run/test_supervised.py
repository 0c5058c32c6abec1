"""The loop that the README and docs/reliability.md give starts a job again until it is finished, and not for ever."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import left_by

from benchmarks.small_job import command, make_model

ROOT = Path(__file__).parent.parent.parent
LOOP = re.compile(r"^until python train.py .*; do .*; done$", re.MULTILINE)
JOB = (
    "--max_steps 6 --save_strategy steps --save_steps 1 --eval_strategy steps --eval_steps 3 --resume_from_checkpoint"
).split()


def loop_around(words):
    """The documented loop with another command, that waits less."""
    (loop,) = LOOP.findall((ROOT / "docs" / "reliability.md").read_text())
    documented = "python train.py --use_grpo --output_dir outputs/mine --resume_from_checkpoint auto"
    assert documented in loop and "sleep 10" in loop
    return loop.replace(documented, shlex.join(words)).replace("sleep 10", "sleep 0.1")


def test_the_readme_has_the_same_loop():
    pages = [LOOP.findall((ROOT / name).read_text()) for name in ("README.md", "docs/reliability.md")]
    assert len(pages[0]) == 1 and pages[0] == pages[1]


@pytest.mark.parametrize("status, starts", [(0, 1), (2, 1), (130, 1), (1, 3), (137, 3), (143, 3)])
def test_only_what_another_start_can_mend_is_started_again(tmp_path, status, starts):
    """Here in place of a job a command that ends with this status twice, and then with 0."""
    script = 'echo >> log; [ "$(wc -l < log)" -gt 2 ] && exit 0; exit "$1"'
    loop = loop_around(["bash", "-c", script, "job", str(status)])
    subprocess.run(["bash", "-c", loop], cwd=tmp_path, timeout=60)
    assert (tmp_path / "log").read_text().count("\n") == starts


@pytest.mark.thorough
def test_a_job_that_is_killed_twice_comes_to_its_end(tmp_path):
    model = make_model(tmp_path / "model")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, *JOB, "auto", model=model), cwd=ROOT, check=True)
    loop = loop_around(command(killed, *JOB, "auto", model=model))
    with open(tmp_path / "log.txt", "w") as log:
        shell = subprocess.Popen(["bash", "-c", loop], cwd=ROOT, stdout=log, stderr=log)
        for number, step in ((signal.SIGKILL, 1), (signal.SIGTERM, 3)):
            while not (killed / f"checkpoint-{step}").exists():
                assert shell.poll() is None, (tmp_path / "log.txt").read_text()
                time.sleep(0.001)
            job = int(re.search(r'"process": (\d+)', (killed / "run.lock").read_text())[1])
            os.kill(job, number)
        assert shell.wait() == 0, (tmp_path / "log.txt").read_text()
    assert (tmp_path / "log.txt").read_text().count("Continuing from") == 2
    assert left_by(killed) == left_by(whole)


@pytest.mark.thorough
def test_a_mistake_in_the_command_is_said_once(tmp_path):
    loop = loop_around([sys.executable, "train.py", "--output_dir", str(tmp_path / "run"), "--max_stps", "4"])
    ended = subprocess.run(["bash", "-c", loop], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.stderr.count("error: ") == 1 and "max_stps" in ended.stderr
