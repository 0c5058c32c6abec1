"""The mesh of devices that a run computes on. It is made once, before any tensor exists.

Through torch-xla one process computes on all devices of a mesh, and tensors lie on it as a whole. Elsewhere a mesh is
one of processes, each with a device of its own, and tensors are those of the process: see `together.py` for the rows
that lie along `fsdp`, and `tensor_parallel.py` for the weights along `tp`. What is said here about "a mesh" without
more is about torch-xla's.
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from . import together
from .device import KIND, is_accelerator, is_tpu, start

if KIND == "xla":
    import torch_xla
    import torch_xla._internal.tpu as xla_tpu
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as spmd
    import torch_xla.runtime as xla_runtime

_mesh: "spmd.Mesh | None" = None
_of_processes: dict[str, int] = {}  # the sizes of the axes of a mesh of processes
Axis = str | tuple[str, ...] | None  # along which a dimension is split; several: along the first, then along the next


def use_mesh(mesh: tuple[Sequence[int], Sequence[str]] | None) -> None:
    """Spread this process's tensors, or the processes of a run, over a mesh of devices from now on.

    This must come before any tensor is on a device, and so before a `GRPOConfig` is made. With torch-xla the devices
    are those of all hosts of a TPU slice, which must all run the same program (see `together.py`).

    Args:
        mesh: the sizes of the mesh's axes, and their names. With None, or with one device, nothing changes.

    Raises:
        ValueError: there are not as many devices or processes, the device is in use already, or a mesh of another
            shape is; or there are several hosts, and no mesh; or torch-xla does not start.
    """
    global _mesh
    if KIND != "xla":
        _use_processes(mesh)
        return
    if mesh is None and _mesh is not None:
        return
    shape, axes = mesh or ((1,), ("fsdp",))
    wanted, asked = math.prod(shape), f"mesh_shape={','.join(map(str, shape))!r}"
    if _mesh is not None and _mesh.mesh_shape != tuple(shape):
        raise ValueError(f"{asked}: this process has a mesh of {_mesh.mesh_shape} already, and keeps it")
    if wanted == 1:
        if is_tpu():
            start()
            if xla_runtime.process_count() > 1:
                raise ValueError(f"mesh_shape: {xla_runtime.process_count()} hosts need a mesh of all their devices")
        return
    if not xla_runtime.is_spmd():
        if torch_xla._XLAC._xla_get_spmd_config_is_locked():
            raise ValueError(f"{asked}: too late, the device is in use; call device.use_mesh before GRPOConfig is made")
        xla_runtime.use_spmd()
    start()
    found = xla_runtime.global_runtime_device_count()
    if found != wanted:
        hint = "" if is_tpu() else f"; CPU_NUM_DEVICES={wanted} makes as many on the CPU"
        raise ValueError(f"{asked}: {wanted} devices, and there are {found}{hint}")
    _mesh = spmd.Mesh(np.arange(wanted), tuple(shape), tuple(axes))


def _use_processes(mesh: tuple[Sequence[int], Sequence[str]] | None) -> None:
    """Lay the processes that `torchrun` has started on a mesh. Those along tp are neighbours."""
    if mesh is None or (math.prod(mesh[0]) == 1 and not _of_processes):
        return
    shape, axes = mesh
    wanted, asked = math.prod(shape), f"mesh_shape={','.join(map(str, shape))!r}"
    sizes, started = dict(zip(axes, shape, strict=True)), int(os.environ.get("WORLD_SIZE", "1"))
    if _of_processes not in ({}, sizes):
        raise ValueError(f"{asked}: this process has a mesh of {_of_processes} already, and keeps it")
    if wanted != started:
        found = f"on {KIND!r} each device of a mesh has a process, which makes {wanted}, and there are {started}"
        raise ValueError(f"{asked}: {found}; torchrun --nproc_per_node {wanted} train.py starts as many")
    if wanted > 1:
        _of_processes.update(sizes)
    together.share_rows(sizes.get("tp", 1))


def along_tp() -> int:
    """How many processes hold parts of the weights together: 1 where each has all, or one process has all devices."""
    return _of_processes.get("tp", 1)


def hosts() -> tuple[int, int, str]:
    """The number of this host, how many hosts the mesh has, and the address of the first, Google Cloud's worker 0.

    Raises:
        ValueError: the hosts are not the workers of one slice.
    """
    count = 1 if _mesh is None else xla_runtime.process_count()
    if count == 1:
        return 0, 1, "localhost"
    addresses = xla_tpu.get_worker_ips()
    if len(addresses) != count:
        raise ValueError(f"mesh_shape: {count} hosts, but the slice has {len(addresses)}; a mesh lies on one slice")
    return xla_tpu.worker_id(), count, addresses[0]


def has_mesh() -> bool:
    """Whether this process spreads its tensors over several devices, as torch-xla does."""
    return _mesh is not None


def axis_size(axis: str | None) -> int:
    """How many devices lie along an axis of the mesh: 1 where there is no such axis or no mesh."""
    return 1 if _mesh is None or axis is None else _mesh.shape().get(axis, 1)


def merges_lora() -> bool:
    """Whether a LoRA layer is faster when it multiplies once, by the sum of its weights: on the CPU, also through XLA.

    On a mesh of either kind each matrix is laid out for itself, and a GPU or TPU hardly waits for the small products of
    a LoRA. Nor would a TPU see a young LoRA in the sum if it rounded that to bfloat16.
    """
    return not is_accelerator() and not has_mesh() and along_tp() == 1


def writes_caches_last() -> bool:
    """Whether a decode step writes the new token to each row's cache after all layers, which take it separately.

    A TPU's compiler otherwise fetches the whole cache into fast memory, writes the token to it there, and copies the
    whole cache back. A mesh on the CPU does as a TPU does.
    """
    return is_tpu() or has_mesh()


def tokens_per_pass() -> int | None:
    """How many tokens a learning pass should have where the user has not said how many rows it has.

    None means as few rows as keep every device busy, since memory is the limit on a TPU or a mesh.
    """
    if KIND == "cuda":
        return 32_768  # not measured: enough to keep a GPU busy, by the sizes of its matrix products
    return None if is_tpu() or has_mesh() else 4096  # a CPU is slower with fewer, and no faster with more


def num_devices() -> int:
    """How many devices the mesh has: 1 where there is no mesh."""
    return 1 if _mesh is None else math.prod(_mesh.mesh_shape)


def _on_mesh(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    def known(axis: Axis) -> Axis:
        if isinstance(axis, tuple):
            return tuple(one for one in axis if one in _mesh.axis_names) or None
        return axis if axis in _mesh.axis_names else None

    return tuple(known(axis) for axis in axes)


def shard(tensor: torch.Tensor, axes: Sequence[Axis]) -> None:
    """Split each dimension of a tensor along an axis of the mesh; None, or an axis that the mesh lacks: not split."""
    if _mesh is not None:
        spmd.mark_sharding(tensor, _mesh, _on_mesh(axes))


def shard_activation(tensor: torch.Tensor, axes: Sequence[Axis]) -> torch.Tensor:
    """Split an intermediate result over the mesh, and its gradient in the same way. Returns the result."""
    if _mesh is None:
        return tensor
    return spmd.xla_sharding.mark_sharding_with_gradients(tensor, _mesh, _on_mesh(axes))


def describe() -> str:
    """One line of words about the device, and about how many there are."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in _of_processes.items())
    return f"{_describe_device()}, one of a mesh of {sizes}" if along_tp() > 1 else _describe_device()


def _describe_device() -> str:
    if KIND == "xla":
        start()
        count = len(xm.get_xla_supported_devices())
        name = f"TPU through torch-xla, {count} device(s)" if is_tpu() else "XLA on the CPU (no TPU was found)"
        sizes = ", ".join(f"{axis} {size}" for axis, size in _mesh.shape().items()) if _mesh is not None else ""
        return f"{name}, mesh of {sizes}" if sizes else name
    if KIND == "tpu":
        return f"TPU through torch_tpu: {torch.tpu.get_device_name()}" if is_tpu() else "torch_tpu on the CPU, no TPU"
    if KIND == "cuda":
        return f"CUDA: {torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} device(s)"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def sharding_of(tensor: torch.Tensor) -> Any:
    """How a tensor lies on the mesh, as `lay` takes it; None where nothing has decided that."""
    return torch_xla._XLAC._get_xla_op_sharding(tensor) if torch_xla._XLAC._get_xla_sharding_spec(tensor) else None


def lay(tensor: torch.Tensor, sharding: Any) -> None:
    """Give a tensor the sharding that `sharding_of` returned for another. None: it lies whole on every device."""
    if sharding is not None:
        torch_xla._XLAC._xla_mark_sharding(tensor, sharding)
    elif _mesh is not None:
        spmd.mark_sharding(tensor, _mesh, (None,) * tensor.dim())
