"""Collectives for tensors on "tpu" that go through main memory and gloo: what stands for torch_tpu's own in tests.

torch_tpu's own collectives need the links between chips. A process group of PyTorch has one method for each collective;
only what this library and PyTorch's DTensor call is here.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future


def done(result: Any) -> dist.Work:
    """A handle of work that is finished."""
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


class HostGroup(dist.ProcessGroup):
    """Copies what is sent to main memory, lets gloo send it, and copies what comes back."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        for tensor in tensors:
            sent, how = tensor.detach().cpu(), dist.AllreduceOptions()
            mean = opts is not None and opts.reduceOp == dist.ReduceOp.AVG  # which gloo lacks
            how.reduceOp = dist.ReduceOp.SUM if opts is None or mean else opts.reduceOp
            self.gloo.allreduce([sent], how).wait()
            tensor.detach().copy_(sent / self.size() if mean else sent)
        return done(tensors)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        return self.allreduce(tensors, opts)

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> dist.Work:
        for tensor in tensors:
            sent = tensor.detach().cpu()
            self.gloo.broadcast([sent], opts).wait()
            tensor.detach().copy_(sent)
        return done(tensors)

    def _of_each(self, tensor: Tensor) -> list[Tensor]:
        sent = tensor.detach().cpu().contiguous()
        received = [torch.empty_like(sent) for _ in range(self.size())]
        self.gloo.allgather([received], [sent]).wait()
        return received

    def allgather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor], opts: Any = None) -> dist.Work:
        for places, sent in zip(outputs, inputs, strict=True):
            for place, received in zip(places, self._of_each(sent), strict=True):
                place.detach().copy_(received)
        return done(outputs)

    def _allgather_base(self, output: Tensor, sent: Tensor, opts: Any = None) -> dist.Work:
        output.detach().view(-1).copy_(torch.cat([part.reshape(-1) for part in self._of_each(sent)]))
        return done([output])

    def allgather_into_tensor_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        for output, sent in zip(outputs, inputs, strict=True):
            self._allgather_base(output, sent)
        return done(outputs)

    def _reduce_scatter_base(self, output: Tensor, sent: Tensor, opts: Any = None) -> dist.Work:
        whole = sent.detach().cpu().contiguous()
        self.gloo.allreduce([whole]).wait()
        own = whole.reshape(self.size(), -1)[self.rank()]
        mean = opts is not None and opts.reduceOp == dist.ReduceOp.AVG
        output.detach().view(-1).copy_(own / self.size() if mean else own)
        return done([output])

    def reduce_scatter_tensor_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None
    ) -> dist.Work:
        for output, sent in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, sent, opts)
        return done(outputs)

    def scatter(self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], opts: Any = None) -> dist.Work:
        received = [torch.empty_like(output, device="cpu") for output in outputs]
        sent = [[tensor.detach().cpu().contiguous() for tensor in tensors] for tensors in inputs]
        self.gloo.scatter(received, sent, opts).wait()
        for output, tensor in zip(outputs, received, strict=True):
            output.detach().copy_(tensor)
        return done(outputs)

    def barrier(self, opts: Any = None) -> dist.Work:
        self.gloo.barrier().wait()
        return done([])

    # PyTorch 2.13 calls the two collectives into one tensor by these names
    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base

    @property
    def pg_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    def getBackendName(self) -> str:
        return "tpu_dist"

    @property
    def supports_splitting(self) -> bool:
        return False


def create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> HostGroup:
    """In place of torch_tpu's `create_process_group`."""
    return HostGroup(store, rank, size, timeout)
