"""A step of fixed shapes as CUDA graphs: the host launches one graph a token in place of thousands of kernels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import device
from .arguments import tensors_in


class RecordedStep:
    """Records a step when it is given tensors at new addresses, and replays it whenever it is given these again.

    A graph knows tensors by their addresses. Therefore results are written over the first arguments, which they
    follow; who wants to replay a graph later must keep the tensors that it was recorded with.

    Args:
        step: takes tensors and lists of tensors, on CUDA, and returns tensors that are no views of them. It may change
            arguments in place, if to do so twice is as good as once. It draws no random numbers, and the host never
            waits in it.
        model: whose tensors the step reads: parameters, buffers and other attributes of its modules. Their values may
            change. Whoever may have moved one to another address calls `forget_moved` before the next call.
    """

    def __init__(self, step: Callable[..., Sequence[Tensor]], model: nn.Module) -> None:
        self.step, self.model = step, model
        self.graphs: dict[tuple[Any, ...], tuple[int, Callable[[], None]]] = {}  # by where the arguments lie
        self.weights: list[int] = []  # addresses of the model's tensors, as they are in all graphs
        self.pool: Any = None  # memory that the graphs share: none of them needs what another one left there

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        places = tuple((x.data_ptr(), x.shape, x.stride()) for x in tensors_in(args))
        if places not in self.graphs:
            if not self.graphs:
                self.weights = _addresses(self.model)
                self.pool = new_pool()
            self.graphs[places] = record(lambda: self.step(*args), args, self.pool)
        num_results, replay = self.graphs[places]
        replay()
        return args[:num_results]

    def forget_moved(self) -> None:
        """Forget all graphs if a tensor of the model has moved since they were recorded. Looks at every module."""
        if self.graphs and self.weights != _addresses(self.model):
            self.forget()

    def forget(self) -> None:
        """Forget all graphs, once the device has done what was started."""
        device.wait()
        self.graphs.clear()
        self.pool = None


def _addresses(model: nn.Module) -> list[int]:
    """Where the tensors of a model's modules lie."""
    return [
        tensor.data_ptr()
        for module in model.modules()
        for tensors in (module._parameters, module._buffers, vars(module))
        for tensor in tensors.values()
        if isinstance(tensor, Tensor)
    ]


def new_pool() -> Any:
    """A memory pool for the intermediate results of graphs."""
    return torch.cuda.graph_pool_handle()


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """The only stream on which steps are recorded, since cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


def record(step: Callable[[], Sequence[Tensor]], args: Sequence[Any], pool: Any) -> tuple[int, Callable[[], None]]:
    """Record a step. Returns how many results it has, and a function that replays it and writes them over `args`."""
    main, side = torch.cuda.current_stream(), _side_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):  # libraries set themselves up, which can't be recorded
        step()
    main.wait_stream(side)
    _make_room()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):  # computes nothing
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            num_results = write_over(step(), args)
        finally:
            graph.capture_end()
    return num_results, graph.replay


def _make_room() -> None:
    """Give back memory that PyTorch keeps unused, if the device has little else: a graph can't take it from there.

    `torch.cuda.graph` does so every time, and waits for the device, which makes the next learning pass allocate anew.
    """
    free, total = torch.cuda.mem_get_info()
    if free < total // 8:
        torch.cuda.empty_cache()


def write_over(results: Sequence[Tensor], args: Sequence[Any]) -> int:
    """Copy results over the first of the arguments; returns how many there are."""
    for old, new in zip(args, results, strict=False):
        old.copy_(new)
    return len(results)
