"""`run_tpu_training.sh` checks the host, plans the job, starts it, and lets a job that was cut short go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from tunix_torch.cli import train
from tunix_torch.cli.tpu_host import check_tpu_host
from tunix_torch.preflight.chips import parse_topology
from tunix_torch.runtime import choice

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "run_tpu_training.sh"


def plug_in(monkeypatch, folder, product, count):
    """Let the PCI bus of this host say that it has `count` TPU chips."""
    for i in range(count):
        card = folder / f"0000:00:0{i}.0"
        card.mkdir(parents=True)
        (card / "vendor").write_text("0x1ae0\n")
        (card / "device").write_text(product + "\n")
    monkeypatch.setattr(choice, "PCI_DEVICES", str(folder))


@pytest.mark.parametrize(
    "product, count, topology",
    [
        ("0x0063", 8, "v5e:2x4"),
        ("0x006f", 1, "v6e:1x1"),
        ("0x0062", 3, None),
        ("0x0027", 4, None),
        ("0x0056", 4, None),
        ("0x005e", 4, None),
        ("0x0062", 4, "v5p:2x2x1"),
        ("0x0063", 4, "v5e:2x2"),
        ("0x006f", 4, "v6e:2x2"),
        ("0x0076", 4, None),
    ],
)
def test_the_slice_is_read_off_the_chips(monkeypatch, tmp_path, capsys, product, count, topology):
    plug_in(monkeypatch, tmp_path / "pci", product, count)
    monkeypatch.setattr(choice, "check_libtpu", lambda: "0.0.21")
    assert check_tpu_host(["--output_dir", str(tmp_path)]) == topology
    assert f"{count} chip(s), " in capsys.readouterr().err
    assert topology is None or parse_topology(topology).num_chips == count, "the script gives it to plan_tpu.py"


def test_without_a_tpu_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(choice, "PCI_DEVICES", str(tmp_path))
    assert check_tpu_host(["--output_dir", str(tmp_path)]) is None
    assert "No TPU was found" in capsys.readouterr().err


def test_a_libtpu_that_does_not_fit_is_an_error(monkeypatch):
    import importlib.metadata as metadata

    monkeypatch.setattr(metadata, "requires", lambda name: ["absl-py", 'libtpu==0.0.21; extra == "tpu"'])
    versions = {"torch_xla": "2.9.0", "libtpu": "0.0.21"}
    monkeypatch.setattr(metadata, "version", lambda name: versions[name])
    assert choice.check_libtpu() == "0.0.21"
    versions["libtpu"] = "0.0.17"
    with pytest.raises(ValueError, match="libtpu 0.0.17: torch_xla 2.9.0 needs ==0.0.21"):
        choice.check_libtpu()


def test_torch_tpu_takes_a_newer_libtpu_and_no_older_one(monkeypatch):
    import importlib.metadata as metadata

    monkeypatch.setattr(choice, "tpu_backend", lambda: "tpu")
    monkeypatch.setattr(metadata, "requires", lambda name: {"torch_tpu": ["numpy>=2", "libtpu>=0.0.50"]}[name])
    versions = {"torch_tpu": "0.2.0", "libtpu": "0.0.52"}
    monkeypatch.setattr(metadata, "version", lambda name: versions[name])
    assert choice.check_libtpu() == "0.0.52"
    versions["libtpu"] = "0.0.21"
    with pytest.raises(ValueError, match="libtpu 0.0.21: torch_tpu 0.2.0 needs >=0.0.50: pip install -r "):
        choice.check_libtpu()


def test_a_model_is_looked_for_in_the_cache_and_needs_room_on_the_disk(monkeypatch, tmp_path, capsys):
    config = tmp_path / "job.json"
    config.write_text(json.dumps({"model_size": "1b", "output_dir": str(tmp_path)}))
    check_tpu_host(["--config", str(config)])
    assert "google/gemma-3-1b-it is not in the cache" in capsys.readouterr().err
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(3 * 2**30))
    check_tpu_host(["--config", str(config)])
    with pytest.raises(ValueError, match="3.0 GiB free, and 50.3 GiB are needed"):
        check_tpu_host(["--config", str(config), "--model_name", "google/gemma-3-27b-it", "--model_size="])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**29))
    with pytest.raises(ValueError, match="0.5 GiB free"):
        check_tpu_host(["--output_dir", str(tmp_path)])


@pytest.mark.parametrize("weights", [None, "model.safetensors", "model.safetensors.index.json"])
def test_a_model_is_in_the_cache_when_its_weights_are(monkeypatch, tmp_path, capsys, weights):
    import huggingface_hub

    there = {"config.json", weights}  # tokenizers and configs are fetched without the weights
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: f"/{file}" if file in there else None
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(2**40))
    check_tpu_host(["--model_name", "google/gemma-3-1b-it", "--output_dir", str(tmp_path)])
    found = capsys.readouterr().err
    assert ("is in the cache" in found) == (weights is not None)
    assert ("will be downloaded" in found) == (weights is None)


@pytest.fixture
def start(tmp_path):
    """`start(*flags)` runs a copy of the script whose Python only notes its calls, and returns the result and these."""

    def start(*flags, plan=True, **environment):
        folder = tmp_path / "copy"
        (folder / ".venv" / "bin").mkdir(parents=True)
        shutil.copy(SCRIPT, folder)
        if plan:
            (folder / "plan_tpu.py").touch()
        python = folder / ".venv" / "bin" / "python"
        python.write_text(
            f'#!/bin/bash\necho "$TUNIX_COMPILE_CACHE $*" >> {tmp_path}/calls\n'
            'if [[ $1 == -c ]]; then echo "$FOUND"; fi\n'
            "if [[ $2 == torch.tpu.distributed ]]; then echo TORCH_TPU_TOPOLOGY=2,2,1; exit; fi\n"
            f'echo "$TORCH_TPU_TOPOLOGY" >> {tmp_path}/topologies\n'
            "if [[ $1 == plan_tpu.py ]]; then exit ${PLAN_FAIL:-0}; fi\nexit ${FAIL:-0}\n"
        )
        python.chmod(0o755)
        clean = {name: os.environ[name] for name in ("PATH", "HOME")}
        result = subprocess.run(
            [str(folder / SCRIPT.name), *flags], env=clean | environment, capture_output=True, text=True
        )
        return result, (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    return start


def test_the_quick_plan_comes_before_the_job_when_the_slice_is_known(start):
    result, calls = start("--max_steps", "3", TOPOLOGY="v5e:2x4", BATCH_SIZE="2", TUNIX_COMPILE_CACHE="/there")
    assert result.returncode == 0, result.stderr
    _, plan, job = calls
    flags = "--device xla --per_device_train_batch_size 2 --use_grpo true --max_steps 3"
    assert plan.endswith(f"plan_tpu.py --quick --topology v5e:2x4 {flags}")
    assert job == f"/there train.py {flags} --resume_from_checkpoint auto"


def test_where_torch_tpu_is_installed_the_job_runs_through_it_and_only_torch_xla_plans(start):
    result, calls = start(FOUND="tpu v5e:1x1")
    assert result.returncode == 0, result.stderr
    assert len(calls) == 2 and "the plan is left out" in result.stderr
    assert calls[1].endswith("train.py --device tpu --use_grpo true --resume_from_checkpoint auto")


def test_through_torch_tpu_each_chip_of_a_host_has_a_process(start, tmp_path):
    result, calls = start("--max_steps", "3", FOUND="tpu v5e:2x2")
    assert result.returncode == 0, result.stderr
    assert calls[1].endswith("-m torch.tpu.distributed")
    flags = "--device tpu --use_grpo true --max_steps 3 --resume_from_checkpoint auto"
    assert calls[2].endswith(f"-m torch.distributed.run --nproc_per_node 4 train.py {flags}")
    assert (tmp_path / "topologies").read_text().splitlines()[-1] == "2,2,1"


def test_what_the_check_found_is_what_is_planned(start):
    _, calls = start(FOUND="xla v6e:2x2")
    assert "plan_tpu.py --quick --topology v6e:2x2 --device xla" in calls[1]


def test_the_quick_plan_can_be_left_out_and_the_checkpoint_be_named(start):
    result, calls = start("--resume_from_checkpoint", "latest", TOPOLOGY="v5e:2x4", SKIP_PREFLIGHT="1")
    assert result.returncode == 0 and len(calls) == 2
    assert calls[1].endswith("train.py --device xla --use_grpo true --resume_from_checkpoint latest")


@pytest.mark.parametrize("code, said", [("2", "going on without a plan"), ("1", "may not fit: going on all the same")])
def test_a_job_that_cannot_be_planned_or_may_not_fit_is_started_all_the_same(start, code, said):
    result, calls = start(TOPOLOGY="v5e:2x4", PLAN_FAIL=code)
    assert result.returncode == 0 and said in result.stderr
    assert "plan_tpu.py" in calls[1] and " train.py " in calls[2]


def test_an_interrupted_plan_ends_the_script(start):
    result, calls = start(TOPOLOGY="v5e:2x4", PLAN_FAIL="130")
    assert result.returncode == 130 and len(calls) == 2


def test_a_check_that_fails_ends_the_script(start):
    result, calls = start(FAIL="2")
    assert result.returncode == 2 and len(calls) == 1


def test_dry_run_prints_the_command_and_help_the_environment(tmp_path):
    result = subprocess.run(
        [str(SCRIPT), "--dry-run", "--output_dir", str(tmp_path / "a b")],
        env=os.environ | {"PYTHON": sys.executable, "LEARNING_RATE": "1e-4"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "train.py --device xla --learning_rate 1e-4 --use_grpo true --output_dir" in result.stdout
    assert f"{tmp_path}/a\\ b --resume_from_checkpoint auto" in result.stdout and not (tmp_path / "a b").exists()
    result = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "--worker=all" in result.stdout and "TOPOLOGY" in result.stdout


def test_shellcheck_has_no_complaint():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.thorough
def test_sigterm_saves_and_the_next_start_ends_where_an_uninterrupted_run_does(model_folder, tmp_path, caplog):
    flags = "--use_grpo --max_steps 40 --save_strategy no --eval_strategy no --batch_size 2 --num_eval_rows 2 "
    flags += "--max_completion_length 8 --max_prompt_length 40 --report_to none --resume_from_checkpoint auto"
    environment = {**os.environ, "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}

    def command(output):
        words = [*flags.split(), "--model_name", model_folder, "--system_message=", "--eval_on_start", "false"]
        return [sys.executable, str(ROOT / "train.py"), *words, "--output_dir", str(output)]

    process = subprocess.Popen(command(tmp_path / "a"), env=environment, stderr=subprocess.PIPE, text=True)
    try:
        metrics = tmp_path / "a" / "metrics.jsonl"
        for _ in range(1200):
            if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and "Stopped by SIGTERM after step" in stderr, stderr
    (checkpoint,) = (tmp_path / "a").glob("checkpoint-*")
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()

    result = subprocess.run(command(tmp_path / "a"), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    train.main(command(tmp_path / "b")[2:])
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert adapters[0] == adapters[1]
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == list(range(1, 41))
    assert checkpoint.is_dir()  # the run went on; it did not begin anew

    from tunix_torch.run.folder import resolve_checkpoint

    # Without a checkpoint after the last step, the next start knows from the final files that the run is finished.
    assert resolve_checkpoint("auto", tmp_path / "a") == str(checkpoint)
    train.main(command(tmp_path / "a")[2:])
    assert "The run is finished" in caplog.text
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == adapters[0]
