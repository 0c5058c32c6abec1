"""A device that can't be had is an error in one line that says what to do, before anything heavy is imported."""

import importlib.util
import os
import subprocess
import sys

import pytest
from graphs import ROOT, environment

from tunix_torch import GRPOConfig
from tunix_torch.cli.script import choose_device
from tunix_torch.runtime import choice, device, together

HINT = "pip install -r requirements-tpu.txt, in an environment of its own"


@pytest.fixture
def asked(monkeypatch):
    """`asked(device, *installed)` lets a process ask for a device where only these backends are installed."""

    def asked(device, *installed):
        monkeypatch.setenv("TUNIX_DEVICE", device)
        monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
        monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object() if name in installed else None)
        return choice.choose()

    with pytest.MonkeyPatch.context() as kept:  # what `choose` sets
        for name in ("USE_TORCH_XLA", "TORCH_DEVICE_BACKEND_AUTOLOAD", "ACCELERATE_TORCH_DEVICE"):
            kept.setenv(name, os.environ.get(name, ""))
        for name in ("TORCH_TPU_ALLOW_LEGACY_DEVICE_APIS", "TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT"):
            kept.setenv(name, os.environ.get(name, "0"))
        yield asked


def test_torch_tpu_that_is_not_installed(asked):
    with pytest.raises(ValueError, match=f"device='tpu' needs torch_tpu, which is not installed: {HINT}"):
        asked("tpu")


def test_torch_tpu_asked_for_in_the_environment_of_torch_xla(asked):
    with pytest.raises(ValueError, match="not installed: this environment has torch_xla, so choose device='xla'; or"):
        asked("tpu", "torch_xla")


def test_torch_tpu_without_a_tpu(asked, monkeypatch):
    monkeypatch.setattr(choice, "tpu_chips", lambda: [])
    with pytest.raises(ValueError, match="device='tpu': there is no TPU on this host's PCI bus; choose device='cpu'"):
        asked("tpu", "torch_tpu")
    assert asked("auto", "torch_tpu") == "auto"


def test_where_a_tpu_is_there_auto_takes_torch_tpu(asked, monkeypatch):
    monkeypatch.setattr(choice, "tpu_chips", lambda: ["v5e"])
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert asked("auto", "torch_tpu") == "tpu"
    assert os.environ["ACCELERATE_TORCH_DEVICE"] == "tpu:2"
    assert asked("cpu", "torch_tpu") == "cpu"
    assert "ACCELERATE_TORCH_DEVICE" not in os.environ, "else Accelerate would take the device of another process"


def test_more_processes_than_chips(monkeypatch):
    monkeypatch.setattr(together, "tpu_chips", lambda: ["v5e"] * 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="8 processes on a host with 4 TPU chip.*torchrun --nproc_per_node 4"):
        together.check_processes("tpu")


def test_more_processes_than_gpus(monkeypatch):
    """Refused when the device is checked: Accelerate would give two processes the same GPU, which NCCL refuses late."""
    monkeypatch.setattr(device, "KIND", "cuda")
    monkeypatch.setattr(together.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="device='cuda': 8 processes on a host with 4 GPU.*--nproc_per_node 4"):
        GRPOConfig(device="cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    together.check_processes("cuda")


def test_a_command_prints_the_line_and_exits_with_2():
    command = [sys.executable, "train.py", "--device", "tpu"]
    result = subprocess.run(command, env=environment("cpu"), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: device='tpu' needs torch_tpu, which is not installed")


def test_a_device_that_a_flag_names_is_not_called_by_the_name_of_the_variable(monkeypatch):
    monkeypatch.setenv("TUNIX_DEVICE", "cpu")
    with pytest.raises(ValueError, match="^device='npu': choose one of auto, tpu"):
        choose_device(["--device", "npu"])


@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is None, reason="torch_xla is not installed")
def test_a_plugin_of_torch_xla_that_does_not_load():
    command = [sys.executable, "train.py", "--device", "xla", "--max_steps", "1"]
    without_plugin = environment("cpu", PJRT_DEVICE="CUDA")
    result = subprocess.run(command, env=without_plugin, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: device='xla': torch-xla does not start (No PjRtPlugin registered")
    assert result.stderr.endswith("; PJRT_DEVICE is 'CUDA': unset it, or set it to CPU\n")


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_threads_that_wait_sleep_soon_unless_the_user_has_said_otherwise(own, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TUNIX_DEVICE", "nothing")
    with pytest.raises(ValueError):
        choice.choose()
    found = {name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if name in os.environ}
    assert found == (own or {"GOMP_SPINCOUNT": "5000"})
