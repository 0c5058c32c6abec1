"""Full fine-tuning: which weights of a model learn, and its files in the layout of `save_pretrained`."""

import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime import fsdp
from .loading import NOT_TEXT


def make_float32(model: nn.Module) -> bool:
    """Bring all floating-point weights and buffers into float32. Returns whether any had another type.

    An optimizer's step is often smaller than the distance between two neighbours in bfloat16, and would be rounded
    away.
    """
    changed = False
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            tensor.data, changed = tensor.data.float(), True
    return changed


def learning_weights(model: nn.Module) -> frozenset[str]:
    """The names of the parameters that learn: those of the text model that require a gradient, or all of them if none
    does, as after some ways of loading."""
    text = {name: p for name, p in model.named_parameters() if not re.fullmatch(NOT_TEXT, name)}
    return frozenset(name for name, p in text.items() if p.requires_grad) or frozenset(text)


def record_attention(model: PreTrainedModel) -> None:
    """Make the config choose eager attention where attention scores have a soft-cap, which the default, sdpa, omits."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.config.attn_implementation = "eager"  # is written to config.json, and obeyed by from_pretrained


def save_whole(model: PreTrainedModel, weights: dict[str, Tensor], folder: str | Path) -> None:
    """Write a model's config, generation config and weights. `weights` are CPU tensors by their names in its state.

    Tied weights, which are one tensor under two names, are written once.
    """
    record_attention(model)
    model.save_pretrained(str(folder), state_dict=dict(weights))


@torch.no_grad()
def load_whole(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the weights that `save_whole` wrote into a model on any device, whose tensors stay the same objects.

    Raises:
        ValueError: the folder has no such weights, or weights of other shapes.
    """
    given = f"model: {folder} holds no weights of this {fsdp.own_class(model).__name__}"
    try:
        saved, found = fsdp.own_class(model).from_pretrained(str(folder), dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"{given}: {str(error).strip().splitlines()[0]}") from error
    state, values = model.state_dict(keep_vars=True), saved.state_dict()
    other = [name for name in state if name not in values or values[name].shape != state[name].shape]
    if found["missing_keys"] or other:
        raise ValueError(f"{given}: such as {min(found['missing_keys'] or other)}")
    for name, tensor in state.items():
        tensor.copy_(fsdp.like(values[name], tensor))
