"""What the tests of devices that trace graphs need. Each runs for torch-xla ("xla") and for torch_tpu ("tpu")."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KIND = "tpu" if os.environ.get("TUNIX_DEVICE") == "tpu" else "xla"

# How many programs may be compiled after the warm-up: torch_tpu cuts small ones otherwise when what they read is not
# there yet. A pass or a decode step has hundreds.
BY_TIMING = {"xla": 0, "tpu": 6}[KIND]

only_torch_xla = pytest.mark.skipif(KIND == "tpu", reason="about torch-xla")


def environment(kind: str, **more: str) -> dict[str, str]:
    """The environment of a process on a device, which finds the library, these tests and, for "tpu", the plugin."""
    kept = {k: v for k, v in os.environ.items() if k not in ("USE_TORCH_XLA", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH"))))
    return kept | {"TUNIX_DEVICE": kind, "PYTHONPATH": path} | more


def left_to_the_host() -> list[str]:
    """The operations that ran on the host in place of the device. `_local_scalar_dense` may, which reads a number."""
    if KIND == "tpu":
        from torch_tpu._internal import execution_mode

        return ["any, since torch_tpu may fall back to the CPU"] if execution_mode.enable_cpu_fallback else []
    import torch_xla.debug.metrics as metrics

    names = [name for name in metrics.counter_names() if name.startswith("aten::")]
    return [name for name in names if name != "aten::_local_scalar_dense"]
