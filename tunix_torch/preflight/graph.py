"""A graph of a training step as a backend has traced it, ready to be compiled, whichever backend it comes from."""

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Graph:
    """One graph of a training step."""

    name: str
    program: bytes  # in the dialect below
    donated: list[int]  # indices of the arguments whose buffers the results may overwrite
    runs: int  # how often it runs in a training step
    live_bytes: int  # of one chip's memory, taken by all tensors when the graph starts, its arguments among them
    dialect: str = "hlo"  # "hlo": a serialized HloModuleProto with shardings; "stablehlo": a module as text

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.program + repr(self.donated).encode()).hexdigest()

    @property
    def multiplies_matrices(self) -> bool:
        """Whether the graph is one that is planned: the small graphs between those multiply no matrices."""
        return b"dot" in self.program


@dataclass
class TracedGraph:
    """A graph that ended while a trainer was traced, and the tensors that hold its results."""

    graph: Graph  # without its name, and run once
    results: dict[Hashable, list[Tensor]] = field(default_factory=dict)  # by their value; see `Reader.value_of`
