"""What torch_tpu can't start with is an error in one line."""

import subprocess
import sys

import pytest
from graphs import KIND, ROOT, environment

pytestmark = [pytest.mark.xla, pytest.mark.skipif(KIND != "tpu", reason="about torch_tpu")]


def refused(code, **more):
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=environment("tpu", **more), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    # As it ends, torch_tpu may still say what its cache of programs held.
    return next(line for line in reversed(result.stderr.splitlines()) if line.startswith("ValueError: "))


def test_a_plugin_that_does_not_load_is_named():
    said = refused("import tunix_torch.runtime.device", TPU_LIBRARY_PATH="/nowhere/plugin.so")
    assert said.startswith("ValueError: device='tpu': torch_tpu does not start (") and "/nowhere/plugin.so" in said
    assert said.endswith("; unset TPU_LIBRARY_PATH, or let it name the libtpu.so of this environment")


def test_a_library_that_is_no_plugin_is_named():
    said = refused("import tunix_torch.runtime.device", TPU_LIBRARY_PATH="libc.so.6")
    assert "torch_tpu does not start (" in said and "undefined symbol: GetPjrtApi" in said


def test_torch_imported_first_without_the_setting_that_transformers_needs():
    said = refused("import torch, tunix_torch.runtime.device", TORCH_TPU_ALLOW_LEGACY_DEVICE_APIS="0")
    assert "import tunix_torch before torch, or set TORCH_TPU_ALLOW_LEGACY_DEVICE_APIS=1" in said


def test_a_mesh_needs_a_process_for_each_chip():
    said = refused("from tunix_torch import device; device.use_mesh(((2, 2), ('fsdp', 'tp')))")
    assert "mesh_shape='2,2': on 'tpu' each device of a mesh has a process, which makes 4, and there are 1" in said
