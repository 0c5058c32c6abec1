"""The embedded default job, run whole, learns with three seeds, and through XLA as on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def run_default_job(output_dir, *flags, **environment):
    """Run `python train.py --use_grpo --num_completions_per_prompt 4`, and return the rows of its metrics.jsonl."""
    command = [sys.executable, "train.py", "--use_grpo", "--num_completions_per_prompt", "4", *flags]
    env = {**os.environ, "TUNIX_DEVICE": "cpu", **environment}
    env.pop("OMP_NUM_THREADS", None)  # users leave it unset
    subprocess.run([*command, "--output_dir", str(output_dir)], cwd=ROOT, env=env, check=True)
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def evaluations(rows):
    return [row for row in rows if "eval_accuracy" in row]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """Run the job with the first seed, warm start included; return its rows, and the variable that names its cache."""
    root = tmp_path_factory.mktemp("jobs")
    cache = {"TUNIX_CACHE": str(root / "cache")}
    return run_default_job(root / "cpu", **cache), cache


def check_learned(rows):
    """A skill grows: from under half of the questions to eight of ten, sampled answers twice as often, all the way."""
    first, middle, last = (evaluations(rows)[i] for i in (0, 2, -1))
    assert middle["step"] == 140 and last["step"] == 280
    assert 0.3 <= first["eval_accuracy"] < 0.5 and last["eval_accuracy"] >= 0.8
    assert last["eval_mean@8"] > 2 * first["eval_mean@8"]
    assert first["eval_mean@8"] + 0.1 < middle["eval_mean@8"] < last["eval_mean@8"] - 0.02


def test_embedded_default_learns(on_cpu):
    rows, _ = on_cpu
    print(evaluations(rows)[0], evaluations(rows)[-1])
    check_learned(rows)


@pytest.mark.parametrize("seed", ["43", "44"])
def test_other_seeds_learn_too(on_cpu, tmp_path, seed):
    rows = run_default_job(tmp_path / "run", "--seed", seed, **on_cpu[1])
    print(evaluations(rows)[0], evaluations(rows)[-1])
    check_learned(rows)


def test_the_whole_job_through_xla_reaches_the_same_accuracy_without_compiling_again(on_cpu, tmp_path):
    environment = {"TUNIX_DEVICE": "xla", "PJRT_DEVICE": "CPU"}
    rows = run_default_job(tmp_path / "run", "--device", "xla", **on_cpu[1], **environment)
    print(evaluations(rows)[-1])
    check_learned(rows)
    expected = evaluations(on_cpu[0])[-1]["eval_accuracy"]
    # Numbers that are rounded otherwise tip a token in the end, and what follows is another run: three standard errors.
    assert evaluations(rows)[-1]["eval_accuracy"] == pytest.approx(expected, abs=0.1)
    counts = [row["compilations"] for row in rows if "reward" in row and row["step"] >= 3]
    assert len(set(counts)) == 1, counts
