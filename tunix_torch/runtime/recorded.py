"""A step of fixed shapes as a CUDA graph: the host launches one graph a token in place of thousands of kernels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import compiled, device


class RecordedStep:
    """Records a step when it is given new tensors, and replays it as long as it is given the same ones.

    A graph knows tensors by their addresses, so results are written over the first arguments, which they follow, and
    what else the step reads, such as weights, must stay where it is.

    Args:
        step: takes tensors and lists of tensors, on CUDA, and returns tensors that are no views of them. It may change
            arguments in place, if to do so twice is as good as once. It draws no random numbers, and the host never
            waits in it.
    """

    def __init__(self, step: Callable[..., Sequence[Tensor]]) -> None:
        self.step = step
        self.replay: Callable[[], None] | None = None
        self.places: list[tuple[int, torch.Size]] = []  # where the tensors lie for which it was recorded

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        places = [(tensor.data_ptr(), tensor.shape) for tensor in compiled.tensors_in(args)]
        if places != self.places:
            device.wait()  # for what replays the old graph
            self.replay = None
            self.num_results, self.replay = record(lambda: self.step(*args), args)
            self.places = places
        self.replay()
        return args[: self.num_results]


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """The one on which steps are recorded: cuBLAS keeps memory for each that it sees."""
    return torch.cuda.Stream()


def record(step: Callable[[], Sequence[Tensor]], args: Sequence[Any]) -> tuple[int, Callable[[], None]]:
    """How many results `step` has, and a function that does it again and writes them over the first of `args`."""
    main, side = torch.cuda.current_stream(), _side_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):  # libraries set themselves up, which can't be recorded
        step()
    main.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):  # nothing is computed in here
        num_results = write_over(step(), args)
    return num_results, graph.replay


def write_over(results: Sequence[Tensor], args: Sequence[Any]) -> int:
    """Copy results over the first of the arguments; returns how many there are."""
    for old, new in zip(args, results, strict=False):
        old.copy_(new)
    return len(results)
