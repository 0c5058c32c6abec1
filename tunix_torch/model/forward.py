"""Runs the parts of a Hugging Face model: the decoder, the head, a pass over prompts, and the reference policy."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..runtime import device, fsdp
from ..runtime.products import float32_scores
from .attention import attention_masks, prompt_positions
from .caches import PrefixCache


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model without PEFT's wrapper. It still holds the layers of the adapters."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def own_layer(layer: nn.Module) -> nn.Module:
    """The layer of the model itself that PEFT has wrapped, for a LoRA or for a copy that learns; else the layer."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        return layer.original_module
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def adapters_in_use(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are switched on. There are none where all are off, merged or missing."""
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return () if layer is None or layer.disable_adapters or layer.merged else tuple(layer.active_adapters)


def recompute_layers(model: nn.Module, settings: dict[str, Any] | None = None) -> None:
    """Switch gradient checkpointing on: a layer keeps its input only, and the backward pass computes the layer again.

    It has an effect in training mode only.

    Args:
        settings: see `device.recomputed`.

    Raises:
        ValueError: on XLA, where settings are given, or the layers of the model share keys and values.
    """
    base = base_model(model)
    if device.recomputes_reentrantly():
        if settings:
            raise ValueError(f"gradient_checkpointing_kwargs={settings!r}: XLA takes none, leave it out")
        if getattr(
            text_config(model), "num_kv_shared_layers", 0
        ):  # a shared key or value would reach later layers without a gradient
            raise ValueError(
                "gradient_checkpointing=True: on XLA not for a model whose layers share keys and values; "
                "take a smaller micro_batch_size"
            )
    base.gradient_checkpointing_enable()
    recompute = functools.partial(device.recomputed, **settings or {})
    base._set_gradient_checkpointing(gradient_checkpointing_func=recompute)


def text_config(model: nn.Module) -> PretrainedConfig:
    """The config of the text decoder."""
    return base_model(model).config.get_text_config()


@contextlib.contextmanager
def reference_policy(model: nn.Module, start: dict[str, Tensor] | None = None) -> Iterator[None]:
    """Within this context the model is the reference policy, without gradient.

    Args:
        start: the values of the weights that learn, by parameter name, as they were when the run began; None: the
            adapter is off.
    """
    has_reference = start or isinstance(model, PeftModel)
    assert has_reference, "the reference policy is the model without its adapter, and there is none"
    parameters = dict(model.named_parameters())
    learning = {name: parameter.requires_grad for name, parameter in parameters.items()}
    # What lies in parts is gathered from its own memory, so other values must be written there.
    now = {n: w.clone() if fsdp.is_part(w) else w for n in start or {} for w in [parameters[n].data]}
    try:
        with torch.no_grad(), contextlib.nullcontext() if start else model.disable_adapter():
            _give_values(parameters, start or {})
            yield
    finally:
        _give_values(parameters, now)
        for name, learns in learning.items():  # PEFT lets all matrices of an adapter learn that is switched on
            parameters[name].requires_grad_(learns)


def _give_values(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if fsdp.is_part(value):
            fsdp.own_part(parameters[name]).copy_(fsdp.own_part(value))
        else:
            parameters[name].data = value


def hidden_states(
    model: nn.Module, ids: Tensor, masks: dict[str, Tensor] | Tensor, position_ids: Tensor, cache: object | None
) -> Tensor:
    """The decoder's last hidden states, (R, Q, D), for ids and position_ids (R, Q) int64 and ready masks."""
    fsdp.gather_outer(base_model(model))
    decoder = base_model(model).get_decoder()
    return decoder(
        input_ids=ids,
        attention_mask=masks,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The head, with Gemma's soft-cap where the model has one: (..., D) -> (..., V) float32."""
    fsdp.gather_outer(base_model(model))
    scores = float32_scores(base_model(model).get_output_embeddings(), hidden)
    cap = getattr(text_config(model), "final_logit_softcapping", None)
    return scores if cap is None else torch.tanh(scores / cap) * cap


def prefill(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, PrefixCache]:
    """One pass over the prompts, (N, P): the hidden state of each prompt's last token, (N, D), and the KV cache."""
    cache = PrefixCache()
    slots = torch.arange(prompt_ids.shape[1], device=prompt_ids.device)
    masks = attention_masks(text_config(model), prompt_mask, slots, base_model(model).dtype)
    hidden = hidden_states(model, prompt_ids, masks, prompt_positions(prompt_mask), cache)
    return hidden[:, -1], cache
