"""Where it computes: the device, compiled and recorded steps, meshes, processes and hosts, profiling.

`tunix_torch.device` is this room, with the few names that a script needs.
"""

import importlib
from typing import Any

_HOMES = {
    "KIND": "device",
    "describe": "mesh",
    "is_tpu": "device",
    "memory_summary": "device",
    "torch_device": "device",
    "use_mesh": "mesh",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
