"""`benchmarks/first_gpu.sh` runs through where there is no GPU, with tiny models, and names what has failed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import make_model

from benchmarks.first_gpu import bytes_of_a_step

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "benchmarks/first_gpu.sh"


def run(*args):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", SCRIPT, *map(str, args)], env=environment, capture_output=True, text=True)


def test_shellcheck_has_no_complaint():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_mistakes_and_a_machine_without_a_gpu_are_one_line(subtests, tmp_path):
    for args, message in [
        ([tmp_path], "PyTorch sees no CUDA device here; --device cpu tries everything else"),
        (["--device", "tpu", tmp_path], "--device tpu: choose cuda or cpu"),
        (["--peers"], "--peers: a value is missing"),
        (["--fast"], "--fast: there are --device, --peers and --presets"),
    ]:
        with subtests.test(message=message):
            done = run(*args)
            assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_the_time_limits_leave_it_under_ten_minutes():
    limits = {line.split()[1].strip('"'): int(line.split()[2]) for line in _lines() if line.startswith("part ")}
    presets = [limits.pop(name) for name in ("decode-$preset", "$preset")]
    assert sum(limits.values()) + 2 * sum(presets) < 600


def _lines():
    return (line.strip() for line in SCRIPT.read_text().splitlines())


def test_a_decode_step_reads_every_weight_once_and_the_keys_and_values_that_are_looked_at():
    model = make_model("gemma3")  # a layer with a window of 8, and one without; two KV heads of 8 numbers
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    of_token = 2 * 2 * 8 * 4  # key and value
    own = (1 + 2 + 3) / 3
    cached = of_token * (2 * (7 + 20) + 6 * 2 * own)  # 2 prompts of 20 tokens, 6 rows
    assert bytes_of_a_step(model, 2, 6, 20, 4) == pytest.approx(weights + cached)


@pytest.mark.slow
def test_it_runs_through_on_a_cpu_and_names_what_fails(tmp_path):
    done = run("--device", "cpu", "--peers", "ours", "--presets", "270m,huge", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["failed: decode-huge (exit code 2)"], done.stdout + done.stderr
    found = json.loads((tmp_path / "first_gpu.json").read_text())
    assert {name for name, part in found["parts"].items() if part["exit_code"]} == {"decode-huge"}
    assert found["environment"]["torch"] and "skipped" in found["tests"]
    assert found["steps"]["270m"]["peers"]["ours"]["seconds_per_step"]["median"] > 0 and not found["steps"]["1b"]
    measured = found["decode"]["270m"]
    assert 0 < measured["share_of_bandwidth"] and 0 < measured["tokens_per_second"] and measured["bandwidth"] > 1e8
    assert (tmp_path / "first_gpu.png").stat().st_size > 5000
