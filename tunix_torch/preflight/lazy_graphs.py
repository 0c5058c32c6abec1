"""What torch-xla knows of tensors that it has traced and not computed: their graphs, and zeros in their place."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla

from ..runtime.compiled import tensors_in
from ..runtime.device import sync, torch_device
from ..runtime.mesh import has_mesh, lay, sharding_of


@dataclass(frozen=True)
class LazyTensor:
    """What torch-xla knows of one tensor."""

    number: int  # of the tensor's present value
    overwrites: int  # the number of the value that it had before it was changed in place; else its own
    pending: bool  # traced, not computed
    bytes_per_device: int  # with its sharding, as if it had been computed


def lazy_tensor(tensor: torch.Tensor) -> LazyTensor:
    """What torch-xla knows of a tensor on an XLA device."""
    text = torch_xla._XLAC._get_xla_tensor_debug_info(tensor)
    fields = dict(re.findall(r"^(TensorID|AliasID|IR): (.*)$", text, re.MULTILINE))
    tiles = [1] * tensor.dim()
    sharding = re.search(r"devices=\[([\d,]+)\]", torch_xla._XLAC._get_xla_sharding_spec(tensor))
    if sharding is not None:
        tiles = [int(size) for size in sharding[1].split(",")][: tensor.dim()]
    shard = math.prod(-(-size // tile) for size, tile in zip(tensor.shape, tiles, strict=True))
    pending = fields["IR"] != "None" and "xla::device_data" not in fields["IR"]
    return LazyTensor(int(fields["TensorID"]), int(fields["AliasID"]), pending, shard * tensor.dtype.itemsize)


def graph_of(tensors: Sequence[torch.Tensor]) -> tuple[bytes, list[int]]:
    """The graph that would compute these pending tensors, and the numbers of the values that it reads.

    Returns:
        a serialized HloModuleProto with the shardings, one result a tensor; `LazyTensor.number` of each parameter.
    """
    tensors = list(tensors)
    return (
        torch_xla._XLAC._get_xla_tensors_hlo_proto(tensors),
        torch_xla._XLAC._get_tensors_xla_device_data_node(tensors)[0],
    )


def zeros_in_place_of(tensor: torch.Tensor, sharding: Any) -> torch.Tensor:
    """Zeros on the device, of the tensor's shape and type, laid on the mesh as `sharding_of` another one."""
    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape).to(torch_device())
    if sharding is not None:
        lay(zeros, sharding)
    return zeros


def traced_once(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that is traced when it is first called, and then returns the same results again and again."""
    results: list[Any] = []

    def traced_step(*args: Any) -> Any:
        if not results:
            sync()  # what is pending before it belongs to another graph
            tensors = tensors_in(args)
            shardings = [sharding_of(tensor) for tensor in tensors]
            outputs = list(step(*args))
            changed = torch_xla._XLAC._check_tensor_need_materialization(tensors)
            if has_mesh():  # results lie as what they replace, as in `runtime/compiled.py`
                replaced = list(zip(outputs, shardings, strict=False))
                replaced += [(t, old) for t, old, new in zip(tensors, shardings, changed, strict=True) if new]
                for tensor, sharding in replaced:
                    lay(tensor, sharding)
            results.append(tuple(outputs))
            sync()
        return results[0]

    return traced_step
