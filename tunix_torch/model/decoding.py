"""Puts faster forms of a model's layers in place for a while: `fast_layers` to learn, `decode_weights` to decode."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..runtime import device, fsdp, mesh, tensor_parallel
from .fast_layers import FAST, FastDecoderLayer
from .forward import base_model
from .merged_lora import MergedLinear, faster_lora
from .wide_layers import wide_layers


@contextlib.contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Within this context a model's layers have the form that is fastest on this machine.

    The faster forms compute the same up to rounding in float32. They are LoRA layers that multiply once and, where
    steps are eager, the norms and decoder layers of Gemma 2 and 3. The backward pass must be within the context too,
    since it computes layers under gradient checkpointing again. When the context ends, every module has its own class
    again, but keeps what it has computed from its weights for the next time. Contexts may be nested.

    Where weights are split over processes, layers keep their own forms and are gathered as they run.
    """
    if _has_parts(model):
        with fsdp.gathered_as_needed(base_model(model)):
            yield
        return
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
def decode_weights(model: nn.Module) -> Iterator[bool]:
    """Within this context a model decodes as fast as it can on this machine. It includes `fast_layers`, `wide_layers`.

    The weights are laid out once for all steps, so neither a weight nor the active adapter may change. When the
    context ends, the model is exactly what it was. It must be entered without gradients. Where steps are eager,
    tensors that are made within it are inference tensors, so autograd takes only results that are computed from them
    afterwards.

    Yields:
        whether all who take part must decode equally often, since their weights are gathered for each token.
    """
    if _has_parts(model):
        with fsdp.gathered_to_decode(base_model(model)) as in_step:
            yield in_step
        return
    eager = device.step_kind() == "eager"  # then inference mode saves a tenth of a step's time
    inference = torch.inference_mode() if eager else contextlib.nullcontext()
    with fast_layers(model), wide_layers(model), inference:
        kind = MergedLinear if device.step_kind() == "compiled" else FastDecoderLayer
        layers = [module for module in _modules(model) if isinstance(module, kind)]
        try:
            for layer in layers:
                layer.prepare_to_decode()
            yield False
        finally:
            for layer in layers:
                layer.end_decoding()


def with_fast_layers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that calls the function within `fast_layers` of its first argument, which is a model."""

    @functools.wraps(function)
    def wrapped(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with fast_layers(model):
            return function(model, *args, **kwargs)

    return wrapped


def _has_parts(model: nn.Module) -> bool:
    return fsdp.is_split(base_model(model)) or tensor_parallel.is_split_along_tp()


def _modules(model: nn.Module) -> list[nn.Module]:
    """All modules of a model, some of them perhaps twice.

    `model.modules()` prevents that and takes five times as long.
    """
    found, stack = [], [model]
    while stack:
        module = stack.pop()
        if module is not None:
            found.append(module)
            stack.extend(module._modules.values())
    return found


def _faster_class(module: nn.Module) -> type | None:
    """The class of a module's faster form on this machine. None: it has no faster form, or has taken it already."""
    if device.has_onednn() and type(module) in FAST:
        return FAST[type(module)]
    return faster_lora(module) if mesh.merges_lora() else None
