"""Linear layers whose weights are split over all devices of a mesh while rows are decoded.

A decode step is as slow as reading the weights, since each row has one token. Along `fsdp` weights are whole, so the
devices along it would read the same ones. Here each device reads a part of its own, and the few activations travel
instead: between the layers all rows are on all devices. The parts are copied out of the weights for each rollout, as a
compiler that may choose fetches a whole weight and takes the part then. Products of a LoRA are added before partial
sums are, so that they need no sum of their own.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import peft.tuners.lora
import torch
from torch import Tensor, nn

from ..runtime import device, mesh, sharding

Lora = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank), and the scaling
ALL = sharding.ALL_DEVICES
BY_OUTPUT, BY_INPUT = (ALL, None, None), (None, ALL, None)  # how parts of a weight lie, see the next two functions


def parts_by_output(matrix: Tensor) -> Tensor:
    """Split a weight (out, in) by outputs: (devices, out / devices, in), of which each device has its own."""
    return mesh.shard_activation(matrix.unflatten(0, (mesh.num_devices(), -1)), BY_OUTPUT)


def parts_by_input(matrix: Tensor) -> Tensor:
    """Split a weight (out, in), or rows (R, in), by inputs: (out, devices, in / devices)."""
    return mesh.shard_activation(matrix.unflatten(1, (mesh.num_devices(), -1)), BY_INPUT)


def split_by_output(x: Tensor, weight: Tensor, loras: Sequence[Lora]) -> Tensor:
    """Multiply rows, whole on every device, by a weight of which each device has a part of the outputs.

    Args:
        x: (..., in).
        weight: see `parts_by_output`.

    Returns:
        (..., out), split over all devices in its last dimension.
    """
    rows = mesh.shard_activation(x.flatten(0, -2), (None, None))  # (R, in)
    y = torch.einsum("rd,tod->rto", rows, weight)
    dtype = y.dtype
    for a, b, scaling in loras:
        y = y + torch.einsum("rk,tok->rto", rows.to(a.dtype) @ a.t(), parts_by_output(b)) * scaling
    y = mesh.shard_activation(y.to(dtype), (None, ALL, None))
    return y.reshape(*x.shape[:-1], -1)


def split_by_input(x: Tensor, weight: Tensor, loras: Sequence[Lora]) -> Tensor:
    """Multiply rows by a weight of which each device has a part of the inputs, and sum over the devices.

    Args:
        x: (..., in).
        weight: see `parts_by_input`.

    Returns:
        (..., out), whole on every device.
    """
    rows = parts_by_input(x.flatten(0, -2))
    y = torch.einsum("rti,oti->tro", rows, weight)
    dtype = y.dtype
    for a, b, scaling in loras:
        projected = torch.einsum("rti,kti->trk", rows.to(a.dtype), parts_by_input(a))
        y = y + torch.einsum("trk,ok->tro", projected, b) * scaling
    y = mesh.shard_activation(y.to(dtype), (ALL, None, None)).sum(dim=0)
    return y.reshape(*x.shape[:-1], -1)


class _Wide:
    """Takes the place of a layer's `forward` where rows are decoded. Other passes go on as before."""

    product = parts = axes = None  # functions of this file, and how the parts lie
    _parts: Tensor | None = None  # of the weight; None: a device's part is all that it holds

    @property
    def _own(self) -> nn.Linear:
        return self.base_layer if isinstance(self, peft.tuners.lora.Linear) else self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        loras = None if args or kwargs or not sharding.is_wide(x) else _loras_of(self)
        if loras is None:
            return super().forward(x, *args, **kwargs)
        weight = self.parts(self._own.weight) if self._parts is None else self._parts
        return self.product(x, weight, loras)

    @torch.no_grad()
    def prepare(self) -> None:
        """Copy this device's part of the weight, which must not change until `end`."""
        if mesh.axis_size("fsdp") > 1:
            self._parts = self.parts(self._own.weight.detach()).clone()  # not a view, which no plan can hold
            mesh.shard(self._parts, self.axes)

    def end(self) -> None:
        """Free the memory of the part."""
        self._parts = None


class _ByOutput(_Wide):
    product, parts, axes = staticmethod(split_by_output), staticmethod(parts_by_output), BY_OUTPUT


class _ByInput(_Wide):
    product, parts, axes = staticmethod(split_by_input), staticmethod(parts_by_input), BY_INPUT


class WideOutput(_ByOutput, nn.Linear):
    pass


class WideInput(_ByInput, nn.Linear):
    pass


class WideOutputLora(_ByOutput, peft.tuners.lora.Linear):
    pass


class WideInputLora(_ByInput, peft.tuners.lora.Linear):
    pass


WIDE = {
    (nn.Linear, True): WideOutput,
    (nn.Linear, False): WideInput,
    (peft.tuners.lora.Linear, True): WideOutputLora,
    (peft.tuners.lora.Linear, False): WideInputLora,
}


def _loras_of(layer: nn.Module) -> list[Lora] | None:
    """Return what the active adapters add to a layer's weight. None: they do more than that."""
    if type(layer) in (WideOutput, WideInput) or layer.disable_adapters or layer.merged:
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
        if name in layer.lora_variant or layer.lora_bias[name] or drops:
            return None
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]


def _wide_class(name: str, module: nn.Module) -> type | None:
    """Return the class of a module's wide form, by its last name. None: it has none, or has taken it already."""
    own = module.base_layer if type(module) is peft.tuners.lora.Linear else module
    axis = sharding.WIDE_LAYERS.get(name.rpartition(".")[2])
    if axis is None or type(own) is not nn.Linear or own.bias is not None:
        return None
    divides = sharding.divides_widely(own.weight.shape[axis])
    return WIDE.get((type(module), axis == 0)) if divides else None


@contextlib.contextmanager
def wide_layers(model: nn.Module) -> Iterator[None]:
    """Within this context, layers that read the most weights read them split over all devices, where rows are decoded.

    Without a mesh nothing changes.
    """
    changed = []
    if mesh.has_mesh():
        for name, module in model.named_modules():
            wide = _wide_class(name, module)
            if wide is not None:
                changed.append((module, type(module)))
                module.__class__ = wide
                module.prepare()
        device.sync()  # the parts are inputs of the step
    try:
        with sharding.decoding_wide():
            yield
    finally:
        for module, own_class in changed:
            module.end()
            module.__class__ = own_class
