"""The default job runs to its end through torch_tpu, and answers as many questions as the job on the CPU."""

import json
import subprocess
import sys

import pytest
from graphs import BY_TIMING, KIND, ROOT, environment

pytestmark = [pytest.mark.xla, pytest.mark.slow, pytest.mark.skipif(KIND != "tpu", reason="about torch_tpu")]

ERRORS = 3  # how many standard errors the two shares of right answers may differ by


def metrics_of(kind, output_dir):
    command = [sys.executable, "train.py", "--use_grpo", "--num_completions_per_prompt", "4", "--device", kind]
    command += ["--output_dir", str(output_dir)]
    result = subprocess.run(command, env=environment(kind), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_default_job_learns_what_it_learns_on_the_cpu(tmp_path):
    runs = {kind: metrics_of(kind, tmp_path / kind) for kind in ("cpu", "tpu")}
    steps = {kind: {row["step"]: row for row in rows if "loss" in row} for kind, rows in runs.items()}
    evaluations = {kind: {row["step"]: row for row in rows if "eval_accuracy" in row} for kind, rows in runs.items()}
    names = ("reward", "completions/mean_length")  # of the completions, which are equal until a rounded number differs
    first = next((s for s, row in steps["cpu"].items() if any(row[n] != steps["tpu"][s][n] for n in names)), None)
    print(f"\ncompletions differ first in step {first}")
    for step, row in evaluations["cpu"].items():
        print(f"accuracy after step {step}: {row['eval_accuracy']:.3f} on the CPU,", end=" ")
        print(f"{evaluations['tpu'][step]['eval_accuracy']:.3f} through torch_tpu")
    assert first is None or first > 2
    for name in ("loss", "grad_norm", "entropy"):
        assert steps["tpu"][1][name] == pytest.approx(steps["cpu"][1][name], rel=1e-3, abs=1e-6), name
    compilations = {step: row["compilations"] for step, row in steps["tpu"].items()}
    assert compilations[max(compilations)] - compilations[2] <= BY_TIMING, compilations
    (last, cpu), tpu = max(evaluations["cpu"].items()), evaluations["tpu"]
    share, questions = (cpu["eval_accuracy"] + tpu[last]["eval_accuracy"]) / 2, 256
    error = (2 * share * (1 - share) / questions) ** 0.5
    assert abs(cpu["eval_accuracy"] - tpu[last]["eval_accuracy"]) < ERRORS * error
