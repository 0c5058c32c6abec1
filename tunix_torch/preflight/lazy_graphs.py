"""Read the graphs that torch-xla has traced and not computed, for the pre-flight.

torch-xla computes lazily: an operation on a tensor is only noted in a graph, which runs later. Such a tensor is called
pending here. These functions use torch-xla's private `_XLAC` module, as no public one gives the graph.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_xla

from ..runtime.arguments import tensors_in
from ..runtime.device import sync
from ..runtime.mesh import has_mesh, lay, sharding_of
from .graph import Graph, TracedGraph


@dataclass(frozen=True)
class LazyTensor:
    """What torch-xla knows about one tensor."""

    number: int  # torch-xla's id of the tensor's present value
    overwrites: int  # the id of the value before the tensor was changed in place; `number` if it was not
    pending: bool  # whether its value has been traced and not yet computed
    bytes_per_device: int  # of memory that its value takes on one device, with its sharding, once it is computed


def lazy_tensor(tensor: torch.Tensor) -> LazyTensor:
    """Return what torch-xla knows about a tensor on an XLA device."""
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
    """Return the graph that would compute these pending tensors, and which values it reads.

    Returns:
        a serialized HloModuleProto with shardings, whose results are the tensors; and for each of its parameters, in
        order, the `LazyTensor.number` of the value.
    """
    tensors = list(tensors)
    return (
        torch_xla._XLAC._get_xla_tensors_hlo_proto(tensors),
        torch_xla._XLAC._get_tensors_xla_device_data_node(tensors)[0],
    )


class Reader:
    """Reads the graphs of a trainer that torch-xla traces.

    Args:
        live: gives every tensor on the device that Python can still reach.
        keep: takes graphs that end in a decode step. torch-xla's end in `sync`, so that it is not called.
    """

    def __init__(self, live: Callable[[], list[torch.Tensor]], keep: Callable[[TracedGraph], None]) -> None:
        self.live = live

    def value_of(self, tensor: torch.Tensor) -> Hashable:
        """What tells apart the values of two tensors that are there at the same time."""
        return lazy_tensor(tensor).number

    def pending_graph(self) -> TracedGraph | None:
        """The graph of all values that were traced and not computed. None: there are none."""
        tensors, lazy = defaultdict(list), {}
        for tensor in self.live():
            state = lazy_tensor(tensor)
            tensors[state.number].append(tensor)
            lazy.setdefault(state.number, state)
        # sorted by age, as `torch_xla.sync` sorts them, so that the graph is the same each time
        pending = [state for _, state in sorted(lazy.items()) if state.pending]
        if not pending:
            return None
        hlo, read = graph_of([tensors[state.number][0] for state in pending])
        overwritten = {state.overwrites for state in pending}
        live = [state for state in lazy.values() if not state.pending or state.overwrites in read]
        live_bytes = sum(state.bytes_per_device for state in live)
        donated = [i for i, number in enumerate(read) if number in overwritten]
        return TracedGraph(
            Graph("", hlo, donated, 1, live_bytes), {state.number: tensors[state.number] for state in pending}
        )

    def traced_once(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A decode step that is traced in its first call; every later call returns the results of the first."""
        results: list[Any] = []

        def traced_step(*args: Any) -> Any:
            if not results:
                sync()  # otherwise what is pending now would become part of the step's graph
                tensors = tensors_in(args)
                shardings = [sharding_of(tensor) for tensor in tensors]
                outputs = list(step(*args))
                changed = torch_xla._XLAC._check_tensor_need_materialization(tensors)
                if has_mesh():  # results get the sharding of what they replace, as `runtime/compiled.py` does it
                    replaced = list(zip(outputs, shardings, strict=False))
                    replaced += [(t, old) for t, old, new in zip(tensors, shardings, changed, strict=True) if new]
                    for tensor, sharding in replaced:
                        lay(tensor, sharding)
                results.append(tuple(outputs))
                sync()
            return results[0]

        return traced_step
