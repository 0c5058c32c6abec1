"""Makes torch_tpu believe that this machine has a TPU. Python imports this file first if PYTHONPATH has its folder.

Behind it stands a plugin for the CPU (`shim.c`), so all is real but the chip: tracing, lowering, dispatch, compilation
and its cache, random numbers. What XLA:CPU can't run is replaced here, for tests only.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

HARDWARE, LOADER = "torch_tpu._internal.utils.hardware", "torch_tpu._loader"


class After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Calls a function with a module when it has been imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.then(module)


def say_one_chip(hardware: ModuleType) -> None:
    hardware.get_tpu_device_count = lambda: 1


def mend_when_loaded(loader: ModuleType) -> None:
    load = loader.load

    def load_and_mend() -> None:
        import host_group
        from torch_tpu._internal.distributed import tpu_distributed

        tpu_distributed.create_process_group = host_group.create  # between chips there are no links here
        load()
        replace_cumsum()

    loader.load = load_and_mend


def replace_cumsum() -> None:
    """torch_tpu computes cumulative sums by a `scan`, which makes XLA:CPU abort."""
    import torch

    def cumsum(tensor: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Sums of 1, 2, 4, ... neighbours in turn."""
        if dtype is None:
            dtype = tensor.dtype if tensor.is_floating_point() or tensor.is_complex() else torch.int64
        sums, distance = tensor.to(dtype).movedim(dim, -1), 1
        while distance < sums.shape[-1]:
            zeros = torch.zeros_like(sums[..., :distance])
            sums, distance = sums + torch.cat([zeros, sums[..., :-distance]], -1), 2 * distance
        return sums.movedim(-1, dim)

    library = torch.library.Library("aten", "IMPL")
    library.impl("cumsum", cumsum, "PrivateUse1", allow_override=True)
    replace_cumsum.library = library  # what it changed is undone when it goes


def hide_processes() -> None:
    """Let torch_tpu's runtime, which reads the environment of the C library, take each process for one by itself.

    Python still sees what `torchrun` has set. By it the processes find each other, through `host_group.py`.
    """
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK"):
        os.unsetenv(name)


if os.environ.get("TUNIX_DEVICE") == "tpu" and "TUNIX_PJRT_PLUGIN" in os.environ:
    hide_processes()
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")  # what XLA:CPU compiled can't always be read back
    sys.meta_path[:0] = [After(HARDWARE, say_one_chip), After(LOADER, mend_when_loaded)]
