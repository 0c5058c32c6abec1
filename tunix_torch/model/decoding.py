"""Faster forms of a model's layers, put in place for a while: `fast_layers` to learn, `decode_weights` to decode."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..runtime import device, mesh
from .fast_layers import FAST, FastDecoderLayer
from .merged_lora import MergedLinear, faster_lora


@contextlib.contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Within this context layers compute in the form that is fastest here, and equal up to rounding in float32.

    These are LoRA layers that multiply once and, on the CPU, the norms and decoder layers of Gemma 2 and 3. A backward
    pass must be within the context too, as layers under gradient checkpointing are computed again there. When it ends
    every module has the class that it had. What a layer has computed from its weights stays with it for the next time.
    Contexts may be nested.
    """
    changed = []
    for module in _modules(model):
        faster = _faster_class(module)
        if faster is not None:
            changed.append((module, type(module)))
            object.__setattr__(module, "__class__", faster)  # nn.Module's own does the same, and takes longer
    try:
        yield
    finally:
        for module, own_class in changed:
            object.__setattr__(module, "__class__", own_class)


@contextlib.contextmanager
def decode_weights(model: nn.Module) -> Iterator[None]:
    """Within this context a model is at its fastest for decoding on this machine. It includes `fast_layers`.

    The weights are laid out once for all steps, so none of them may change, nor what adapter is active. When it ends
    the model is exactly what it was. Call it without gradient. On the CPU tensors made in it are inference tensors:
    autograd takes only results computed from them after its end.
    """
    eager = device.step_kind() == "eager"  # then inference mode saves a tenth of the time of a step
    with fast_layers(model), torch.inference_mode() if eager else contextlib.nullcontext():
        kind = MergedLinear if device.step_kind() == "compiled" else FastDecoderLayer
        layers = [module for module in _modules(model) if isinstance(module, kind)]
        try:
            for layer in layers:
                layer.pack()
            yield
        finally:
            for layer in layers:
                layer.unpack()


def with_fast_layers(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called within `fast_layers` of its first argument, a model."""

    @functools.wraps(function)
    def wrapped(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with fast_layers(model):
            return function(model, *args, **kwargs)

    return wrapped


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, each perhaps several times. `model.modules()` takes five times as long."""
    found, stack = [], [model]
    while stack:
        module = stack.pop()
        if module is not None:
            found.append(module)
            stack.extend(module._modules.values())
    return found


def _faster_class(module: nn.Module) -> type | None:
    """The class of the faster form of a module on this machine; None: there is none, or the module has it already."""
    if device.KIND == "cpu" and type(module) in FAST and torch.backends.mkldnn.is_available():
        return FAST[type(module)]
    return faster_lora(module) if mesh.merges_lora() else None
