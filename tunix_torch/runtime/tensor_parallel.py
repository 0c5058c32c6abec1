"""Weights that are split along the axis tp of a mesh of processes, by PyTorch's DTensor.

Each process holds a part of the matrices that `sharding.WEIGHTS` names, and the part of the attention that belongs to
it: its heads, with their keys, values and caches. Processes along tp have the same rows. Hooks wrap what a layer of the
table takes as a DTensor and unwrap what it gives. So within the layer PyTorch finds out what is to be sent, forward and
backward, and everywhere else tensors are plain ones of this process: hidden states and logits are whole.

Every parameter of such a layer is a DTensor, also where it is whole, and so is every parameter that learns, since an
optimizer takes no mixture. A weight that is whole and meets a part of the numbers, as the matrix A of a LoRA before a
split B, gets a part of its gradient in each process; `together.sum_gradients` sums these.
"""

import re
from dataclasses import dataclass

import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from . import device, mesh, together
from .sharding import BY_OUTPUT, NORMS_OF_HEADS, WEIGHTS, axes_of

WHOLE = Replicate()
# Layers that give whole results though their weights are split by output: what follows needs the whole vocabulary.
GATHERED = ("embed_tokens", "lm_head")


def is_split_along_tp() -> bool:
    """Whether this process holds a part of the weights, and others along tp the rest."""
    return mesh.along_tp() > 1


def _mesh() -> DeviceMesh:
    return together.processes()[together.PEERS]


# ---- models ----


def split(root: nn.Module, unused: str) -> dict[nn.Parameter, nn.Parameter]:
    """Split the weights of a model along tp. Each matrix goes to the device for itself, and only in part.

    All processes must hold the same weights, though those that learn get the values of the first process along fsdp.

    Args:
        root: the model, with or without a LoRA, on the CPU or on the device.
        unused: a pattern of names of modules that no pass needs, such as those that see. They stay whole.

    Returns:
        the parameters that were replaced, each with the one that took its place.

    Raises:
        ValueError: tp does not divide the heads of attention or a dimension of a weight, or a layer can't be split.
    """
    used = {name: module for name, module in root.named_modules() if not re.search(unused, name)}
    _check(used)
    own_heads = {name: _own_heads(module) for name, module in used.items() if _is_attention(module)}
    new: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in used.items():
        parent, _, layer = name.rpartition(".")
        if layer in WEIGHTS and not _is_in_table(parent):
            _split_layer(layer, module, own_heads.get(parent), new)
    for name, module in used.items():  # what else learns
        learning = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in new]
        if learning:
            new |= {parameter: _part(parameter, (None,) * parameter.dim()) for parameter in learning}
            # In heads' norms, (rows, tokens, heads, head dim) or with heads before tokens, only the last dimension
            # matters, so that each process may take what it has for a part of any other.
            placement = Shard(1) if name.rpartition(".")[2] in NORMS_OF_HEADS else WHOLE
            _lay(module, placement, placement)
    for module in root.modules():
        module._parameters.update({name: new[p] for name, p in module._parameters.items() if p in new})
    for parameter in new.values():
        if parameter.requires_grad and together.count() > 1:  # as DDP does, which does not wrap such a model
            own, group = parameter.detach().to_local(), together.processes().get_group(together.ROWS)
            torch.distributed.broadcast(own, group=group, group_src=0)
    for name, heads in own_heads.items():
        used[name].num_key_value_groups = heads.num_queries // heads.num_kv
    return new


def _split_layer(layer: str, module: nn.Module, heads: "_Heads | None", new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Split a layer of the table `WEIGHTS`, with its LoRA, and add its parameters to the new ones.

    Args:
        heads: those of the attention that it is in; None: it is in none.
    """
    split_kv_heads = heads is None or heads.splits_kv
    for name, parameter in module.named_parameters():
        if parameter not in new:  # tied weights are in two layers
            new[parameter] = _part(parameter, axes_of(f"{layer}.{name}", parameter.dim(), split_kv_heads))
    if layer in ("k_proj", "v_proj") and not split_kv_heads:
        _lay(module, WHOLE, WHOLE, heads.own_kv)
    elif WEIGHTS[layer] == BY_OUTPUT:
        _lay(module, WHOLE, WHOLE if layer in GATHERED else Shard(-1))
    else:
        _lay(module, Shard(-1), WHOLE)
        _sum_in_loras(module)


def _is_in_table(name: str) -> bool:
    return any(part in WEIGHTS for part in name.split("."))


def _part(parameter: nn.Parameter, axes: tuple[str | None, ...]) -> nn.Parameter:
    """This process's part of a parameter, on its device and in memory of its own."""
    own, placement = parameter.detach(), WHOLE
    if "tp" in axes:
        dim = axes.index("tp")
        own, placement = own.chunk(mesh.along_tp(), dim)[_mesh().get_local_rank()].clone(), Shard(dim)
    own = DTensor.from_local(own.contiguous().to(device.torch_device()), _mesh(), [placement], run_check=False)
    return nn.Parameter(own, requires_grad=parameter.requires_grad)


def _lay(module: nn.Module, takes: Placement, gives: Placement, own_kv: slice | None = None) -> None:
    """Let a layer, whose parameters are DTensors, take and give plain tensors: parts, or whole ones.

    Args:
        own_kv: which columns of a whole result this process takes on with.
    """

    def take(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return DTensor.from_local(x, _mesh(), [_counted(takes, x.dim())], run_check=False), *inputs[1:]

    def give(module: nn.Module, inputs: tuple[Tensor, ...], output: DTensor) -> Tensor:
        placement = _counted(gives, output.dim())
        output = output.redistribute(placements=[placement])
        if own_kv is None:
            return output.to_local(grad_placements=[placement])
        # Each process's gradient is that of its own columns and 0 elsewhere, so their sum is that of the whole.
        return output.to_local(grad_placements=[Partial()])[..., own_kv]

    module.register_forward_pre_hook(take)
    module.register_forward_hook(give)


def _counted(placement: Placement, dims: int) -> Placement:
    """The placement with its dimension counted from the first: PyTorch takes a -1 of a gradient for another one."""
    return Shard(placement.dim % dims) if isinstance(placement, Shard) else placement


def _sum_in_loras(layer: nn.Module) -> None:
    """Sum the products of a LoRA's split A, which are small, so that B takes whole numbers."""
    for name, module in layer.named_modules():
        if "lora_A" in name.split(".")[:-1]:
            module.register_forward_hook(lambda module, inputs, output: output.redistribute(placements=[WHOLE]))


# ---- what a mesh must divide ----


@dataclass(frozen=True)
class _Heads:
    """The heads of an attention that one of the processes along tp has.

    Attributes:
        splits_kv: each process has KV heads of its own. If not, tp is a multiple of their number: all processes compute
            all keys and values, and each goes on with the one head that its query heads look at.
        own_kv: the columns of that head; None: this process has only columns of its own.
    """

    num_queries: int
    num_kv: int
    splits_kv: bool
    own_kv: slice | None


def _is_attention(module: nn.Module) -> bool:
    return isinstance(getattr(module, "q_proj", None), nn.Module)


def _heads(attention: nn.Module) -> tuple[int, int]:
    """How many heads of queries, and of keys and values, an attention has in all."""
    weight = next(parameter for parameter in attention.q_proj.parameters() if parameter.dim() == 2)
    num_queries = weight.shape[0] // attention.head_dim
    return num_queries, num_queries // attention.num_key_value_groups


def _own_heads(attention: nn.Module) -> _Heads:
    (queries, kv), tp, size = _heads(attention), mesh.along_tp(), attention.head_dim
    if kv % tp == 0:
        return _Heads(queries // tp, kv // tp, True, None)
    own = _mesh().get_local_rank() * kv // tp
    return _Heads(queries // tp, 1, False, slice(own * size, (own + 1) * size))


def _check(used: dict[str, nn.Module]) -> None:
    why = _why_not(used, mesh.along_tp())
    if why is not None:
        devices = mesh.along_tp() * together.count()
        fitting = [tp for tp in range(1, devices + 1) if devices % tp == 0 and _why_not(used, tp) is None]
        meshes = ", ".join(f"{devices // tp},{tp}" for tp in fitting)
        raise ValueError(f"mesh_shape: {why}; with as many devices, these meshes (fsdp,tp) fit: {meshes}")


def _why_not(used: dict[str, nn.Module], tp: int) -> str | None:
    """Why a model can't be split so often along tp; None: it can."""
    if tp == 1:
        return None
    for name, module in used.items():
        if _is_attention(module):
            queries, kv = _heads(module)
            if queries % tp or (kv % tp and tp % kv):
                return f"tp={tp} does not fit the {queries} heads and {kv} KV heads of {name}"
        if name.rpartition(".")[2] not in WEIGHTS or _is_in_table(name.rpartition(".")[0]):
            continue
        layer = name.rpartition(".")[2]
        for of_layer, parameter in module.named_parameters():
            if "lora_magnitude_vector" in of_layer or "lora_embedding" in of_layer:
                return f"tp={tp} can't split DoRA, nor a LoRA of the embeddings, such as {name}.{of_layer}"
            for size, axis in zip(parameter.shape, axes_of(f"{layer}.{of_layer}", parameter.dim()), strict=True):
                if axis == "tp" and size % tp and layer not in ("k_proj", "v_proj"):
                    return f"tp={tp} does not divide the {size} of {name}.{of_layer} {tuple(parameter.shape)}"
    return None
