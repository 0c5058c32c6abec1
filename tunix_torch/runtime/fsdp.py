"""Weights that are split over processes by PyTorch's FSDP2, for a model that does not fit one GPU.

Each process holds a part of every weight, which is a DTensor. Layers are gathered one by one: the weights of a layer
are whole while it computes, forward or backward, and only the parts are left afterwards. What lies outside of the
layers, such as the embeddings, is gathered when a pass needs it and stays whole until the pass is over. So within
`gathered_as_needed` and `gathered_to_decode` a parameter may be a plain tensor, and outside of them it is a DTensor.

Gathering takes all processes: they must run the same passes in the same order, equally often.

Models and tensors that are not split pass through all functions here as they are.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from . import device, together

# A rollout gathers all weights where they take at most this share of the memory that is free when it begins, since
# keys, values and logits come on top.
MOST_FOR_WEIGHTS = 0.5


@dataclass(frozen=True)
class Splitting:
    """How the weights of a run are split.

    Attributes:
        reshard_after_forward: whether only the parts of a layer are left between its forward and its backward pass.
        gather_for_rollout: whether a rollout gathers all weights once, or layer by layer for each token; None: the
            former where they fit.
    """

    reshard_after_forward: bool
    gather_for_rollout: bool | None


@dataclass
class _Split:
    """What is kept of a model whose weights are split."""

    splitting: Splitting
    units: list[FSDPModule]  # what is gathered at a time, the model itself among them
    layers: list[FSDPModule]  # those units of which only parts are left after their forward pass
    depth: int = 0  # how many contexts use the weights now


ON_A_MESH = "on XLA a mesh splits weights: mesh_shape"


def why_not() -> str | None:
    """Why the weights can't be split over processes on this device, with what to do instead; None: they can."""
    return {"xla": ON_A_MESH, "tpu": "through torch_tpu the axis tp of a mesh splits weights: mesh_shape"}.get(
        device.KIND
    )


_NAME = "_split_over_processes"  # the attribute of a model that holds its `_Split`, and goes with it


def _split_of(root: nn.Module) -> _Split | None:
    return vars(root).get(_NAME)


@functools.cache
def _mesh() -> DeviceMesh:
    if together.processes() is not None:
        return together.processes()[together.ROWS]
    return init_device_mesh(device.KIND, (together.count(),))


# ---- models ----


def split(
    root: nn.Module,
    units: Sequence[nn.Module],
    unused: Sequence[nn.Module],
    whole: Sequence[nn.Parameter],
    splitting: Splitting,
) -> None:
    """Split the weights of a model over the processes, and move each process's parts to its device.

    The weights may lie on the CPU: on the device only those of one unit at a time are whole. All processes must hold
    the same weights, though parameters that stay whole get the values of the first process.

    The first pass of the model must be its own `forward`: by it FSDP2 finds out that `root` is the outermost unit.

    Args:
        root: the model. Weights that units share, as tied embeddings, are gathered with it.
        units: its modules that are gathered when they run, inner ones before those that they are in.
        unused: modules that no pass needs, such as those that see. They are split and not gathered.
        whole: parameters that every process keeps. Their gradients are summed by `together.sum_gradients`.
    """
    for parameter in whole:
        if not is_part(parameter):  # along tp
            parameter.data = parameter.data.to(device.torch_device())
        torch.distributed.broadcast(own_part(parameter), group=_mesh().get_group(), group_src=0)
    parts = (*unused, *units)
    shared, inner, layers = _shared(root, parts), set(parts), []
    for unit in (*parts, root):
        is_innermost = not any(module in inner for module in unit.modules() if module is not unit)
        reshards = splitting.reshard_after_forward and is_innermost
        ignored = set(whole) | (set() if unit is root else shared)
        fully_shard(unit, mesh=_mesh(), reshard_after_forward=reshards, ignored_params=ignored)
        unit.set_gradient_divide_factor(1.0)  # the sum of gradients, not their mean
        unit.set_force_sum_reduction_for_comms(True)
        layers += [unit] if reshards and unit in units else []
    setattr(root, _NAME, _Split(splitting, [*units, root], layers))


def _shared(root: nn.Module, units: Sequence[nn.Module]) -> set[nn.Parameter]:
    """The parameters that modules of different units hold."""
    unit_of: dict[nn.Module, nn.Module] = {}
    for unit in (*units, root):
        for module in unit.modules():
            unit_of.setdefault(module, unit)
    found: dict[nn.Parameter, nn.Module] = {}
    shared = set()
    for module, unit in unit_of.items():
        for parameter in module.parameters(recurse=False):
            if found.setdefault(parameter, unit) is not unit:
                shared.add(parameter)
    return shared


def is_split(root: nn.Module) -> bool:
    """Whether the weights of a model are split over processes."""
    return isinstance(root, FSDPModule)


def splitting_of(root: nn.Module) -> Splitting | None:
    """How the weights of a model are split; None: they are not."""
    kept = _split_of(root)
    return None if kept is None else kept.splitting


def own_class(module: nn.Module) -> type:
    """The class of a module without what FSDP2 has added to it."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def gather_outer(root: nn.Module) -> None:
    """Gather what lies outside of the units of a model, until the pass is over. Does nothing where it is there.

    `torch.compile` can trace this for a model that is not split.
    """
    if isinstance(root, FSDPModule):
        root.unshard()


@contextlib.contextmanager
def gathered_as_needed(root: nn.Module) -> Iterator[None]:
    """Within this context a model may compute. Only parts are left when it ends. Contexts may be nested."""
    kept = _split_of(root)
    if kept is None:
        yield
        return
    kept.depth += 1
    try:
        yield
    finally:
        kept.depth -= 1
        if kept.depth == 0:
            for unit in kept.units:
                unit.reshard()


@contextlib.contextmanager
def gathered_to_decode(root: nn.Module) -> Iterator[bool]:
    """Within this context a model may decode, without gradients. Weights are gathered as `gather_for_rollout` says.

    Yields:
        whether all processes must run equally many passes, since each gathers the layers anew.
    """
    kept = _split_of(root)
    with gathered_as_needed(root):
        if kept is None or not _gathers_all(root, kept):
            yield kept is not None
            return
        for unit in kept.units:
            unit.unshard()
        try:
            for layer in kept.layers:
                layer.set_reshard_after_forward(False, recurse=False)
            yield False
        finally:
            for layer in kept.layers:
                layer.set_reshard_after_forward(True, recurse=False)


def _gathers_all(root: nn.Module, kept: _Split) -> bool:
    """Whether a rollout that begins now gathers all weights. All processes decide alike."""
    if kept.splitting.gather_for_rollout is not None:
        return kept.splitting.gather_for_rollout
    needed = sum(parameter.numel() * parameter.element_size() for parameter in root.parameters())
    return not together.anyone(needed > MOST_FOR_WEIGHTS * device.free_memory_bytes())


# ---- tensors ----


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is split, so that this process holds a part of it."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; a tensor that is not split as it is."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes, without gradient. All of them must call this."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Of a tensor that all processes hold, the part that this process holds of a weight of the same shape."""
    if not isinstance(weight, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)
