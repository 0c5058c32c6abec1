"""Which dimension of each tensor is split along which axis of the (fsdp, tp) mesh. XLA's partitioner does the rest.

`mesh.use_mesh` makes the mesh of the process before any tensor exists. Without a mesh nothing here has an effect. Where
a mesh is one of processes, `tensor_parallel.py` splits weights by the same table, `WEIGHTS`, and DTensor does the rest.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from . import mesh
from .device import is_tpu

logger = logging.getLogger(__name__)

BY_OUTPUT, BY_INPUT = ("tp", None), (None, "tp")
# The last part of a module's name -> the axes of its (out, in) weight. An embedding is (vocabulary, hidden).
WEIGHTS = {
    "embed_tokens": BY_OUTPUT,
    "lm_head": BY_OUTPUT,
    "q_proj": BY_OUTPUT,
    "k_proj": BY_OUTPUT,
    "v_proj": BY_OUTPUT,
    "gate_proj": BY_OUTPUT,
    "up_proj": BY_OUTPUT,
    "o_proj": BY_INPUT,
    "down_proj": BY_INPUT,
}
# Layers whose output is split along tp, in its last dimension.
SPLIT_OUTPUT = ("lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

# While rows are decoded, these layers are split over all devices, in the dimension of their (out, in) weight that is
# split along tp: a device's part lies within what it holds. Heads are not, as each device has the caches of its own.
ALL_DEVICES = ("tp", "fsdp")
WIDE_LAYERS = {"lm_head": 0, "gate_proj": 0, "up_proj": 0, "o_proj": 1, "down_proj": 1}
NORMS_OF_HEADS = ("q_norm", "k_norm", "v_norm")
# With more rows it takes longer to send their activations than to read the weights. By arithmetic for Gemma 2 2B on
# v5e:2x4, where 32 rows send 1.5 us in a layer and save reading 19 us.
MOST_WIDE_ROWS = 256
LANES = 128  # of a TPU: a part that is smaller takes as much memory as one of this size

_wide = False  # see `decoding_wide`


@contextlib.contextmanager
def decoding_wide() -> Iterator[None]:
    """Within this context, passes in which each of a few rows has one token are laid out as `WIDE_LAYERS` says."""
    global _wide
    before, _wide = _wide, mesh.has_mesh()
    try:
        yield
    finally:
        _wide = before


def is_wide(x: Tensor) -> bool:
    """Whether a layer's input or output, (rows, D) or (rows, tokens, D), is laid out as `WIDE_LAYERS` says."""
    return _wide and x.shape[0] <= MOST_WIDE_ROWS and (x.dim() == 2 or x.shape[1] == 1)


def divides_widely(size: int) -> bool:
    """Whether all devices together divide a dimension into parts that are not too small for them."""
    smallest = LANES if is_tpu() else 1
    return size % mesh.num_devices() == 0 and size // mesh.num_devices() >= smallest


def axes_of(name: str, dims: int, split_kv_heads: bool = True) -> tuple[str | None, ...]:
    """The axis along which each dimension of a parameter is split, by the parameter's name; None: it is not split.

    The matrices of a LoRA, A (rank, in) and B (out, rank), are split as their layer is where they meet it, and the rank
    is never split. Norms, biases and parameters of layers that `WEIGHTS` lacks lie whole on every device.
    """
    parts = name.split(".")
    layer = next((part for part in reversed(parts) if part in WEIGHTS), None)
    if layer is None or dims != 2:
        return (None,) * dims
    out, inner = WEIGHTS[layer]
    if layer in ("k_proj", "v_proj") and not split_kv_heads:
        out = None
    if "lora_A" in parts:
        out = None
    if "lora_B" in parts:
        inner = None
    return out, inner


def shard_model(model: nn.Module, num_kv_heads: int) -> None:
    """Lay every parameter on the mesh. Where tp does not divide the KV heads, their projections stay whole.

    Raises:
        ValueError: an axis does not divide a dimension. The message names the parameter and the meshes that would fit.
    """
    tp = mesh.axis_size("tp")
    split_kv_heads = num_kv_heads % tp == 0
    if not split_kv_heads:
        logger.warning(
            "The %d KV heads do not divide by tp=%d: every device along tp has all of them", num_kv_heads, tp
        )
    layout = [(n, p, axes_of(n, p.dim(), split_kv_heads)) for n, p in model.named_parameters()]
    check_divisible(layout, {axis: mesh.axis_size(axis) for axis in ("fsdp", "tp", None)})
    for _, parameter, axes in layout:
        mesh.shard(parameter.data, axes)
    constrain_activations(model, num_kv_heads)


def check_divisible(layout: Sequence[tuple[str, Tensor, tuple[str | None, ...]]], sizes: dict[str | None, int]) -> None:
    """Whether the mesh divides every parameter.

    Args:
        layout: name, parameter, and the axis of each of its dimensions.
        sizes: devices along "fsdp" and "tp"; 1 for None.

    Raises:
        ValueError: names the first parameter that it does not divide, and the meshes that would fit.
    """
    for name, parameter, axes in layout:
        for size, axis in zip(parameter.shape, axes, strict=True):
            if size % sizes[axis]:
                fitting = _meshes_that_fit(layout, sizes["fsdp"] * sizes["tp"])
                meshes = ", ".join(f"{fsdp},{tp}" for fsdp, tp in fitting) or "none"
                raise ValueError(
                    f"mesh_shape: {axis}={sizes[axis]} does not divide the {size} of {name} {tuple(parameter.shape)}; "
                    f"with as many devices, these meshes (fsdp,tp) fit: {meshes}"
                )


def constrain_activations(model: nn.Module, num_kv_heads: int) -> None:
    """Say how activations are split, since XLA's partitioner guesses badly.

    Rows are split along fsdp; heads, the MLP's inner dimension and the vocabulary along tp; hidden states are not split
    along tp. A gradient is split as the activation is that it belongs to. Where rows are decoded, see `WIDE_LAYERS`,
    only heads are split: hidden states are whole, and so are rows but in attention.

    Without this the decode step of Gemma 2 2B gathered whole KV caches (see `docs/tpu.md`).
    """
    split_kv_heads = num_kv_heads % mesh.axis_size("tp") == 0
    for name, module in model.named_modules():
        layer = name.rpartition(".")[2]
        if layer.endswith("norm") and layer not in NORMS_OF_HEADS:
            module.register_forward_pre_hook(lambda module, inputs: (_whole(inputs[0]), *inputs[1:]))
            module.register_forward_hook(lambda module, inputs, output: _whole(output))
        if layer == "o_proj":  # what attention mixes stays with the devices that have the caches
            module.register_forward_pre_hook(lambda module, inputs: (_of_heads(inputs[0]), *inputs[1:]))
        if layer in WEIGHTS:
            split = split_kv_heads or layer not in ("k_proj", "v_proj")
            axis = WEIGHTS[layer][0] if layer in SPLIT_OUTPUT and split else None
            is_wide_layer = layer in WIDE_LAYERS or layer == "embed_tokens"
            module.register_forward_hook(functools.partial(_lay_output, axis=axis, is_wide_layer=is_wide_layer))


def _lay_output(
    module: nn.Module, inputs: tuple[object, ...], output: Tensor, axis: str | None, is_wide_layer: bool
) -> Tensor:
    """Split a layer's output along an axis in its last dimension, and its rows along fsdp."""
    if is_wide_layer and is_wide(output):
        wide = ALL_DEVICES if axis is not None and divides_widely(output.shape[-1]) else axis
        return mesh.shard_activation(output, (*[None] * (output.dim() - 1), wide))
    rows = "fsdp" if output.shape[0] % mesh.axis_size("fsdp") == 0 else None
    return mesh.shard_activation(output, (rows, *[None] * (output.dim() - 2), axis))


def _whole(x: Tensor) -> Tensor:
    """Lay hidden states whole on every device where rows are decoded."""
    return mesh.shard_activation(x, (None,) * x.dim()) if is_wide(x) else x


def _of_heads(x: Tensor) -> Tensor:
    """Split the rows of what attention has mixed along fsdp, and its heads along tp, where rows are decoded."""
    rows = "fsdp" if x.shape[0] % mesh.axis_size("fsdp") == 0 else None
    return mesh.shard_activation(x, (rows, *[None] * (x.dim() - 2), "tp")) if is_wide(x) else x


def _meshes_that_fit(
    layout: Sequence[tuple[str, Tensor, tuple[str | None, ...]]], devices: int
) -> Iterator[tuple[int, int]]:
    for fsdp in range(1, devices + 1):
        sizes = {"fsdp": fsdp, "tp": devices // fsdp, None: 1}
        dimensions = [(size, axis) for _, p, axes in layout for size, axis in zip(p.shape, axes, strict=True)]
        if devices % fsdp == 0 and all(size % sizes[axis] == 0 for size, axis in dimensions):
            yield sizes["fsdp"], sizes["tp"]


def shard_rows(tensor: Tensor, heads_dim: int | None = None) -> Tensor:
    """Split the rows of a tensor along fsdp, and the heads of a KV cache along tp, where that is even. Returns it."""
    axes: list[str | None] = [None] * tensor.dim()
    for dim, axis in ((0, "fsdp"), (heads_dim, "tp")):
        if dim is not None and tensor.shape[dim] % mesh.axis_size(axis) == 0:
            axes[dim] = axis
    mesh.shard(tensor, axes)
    return tensor
