"""Where it computes: the device, compiled and recorded steps, meshes, processes and hosts, profiling.

`tunix_torch.device` is this room, with the few names that a script needs.
"""

from ..public import public_names

_HOMES = {
    "KIND": "device",
    "describe": "mesh",
    "is_tpu": "device",
    "memory_summary": "device",
    "torch_device": "device",
    "use_mesh": "mesh",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
