"""Checks of a model, its LoRA and its tokenizer before training: what can't work is an error of one line."""

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from ..runtime import fsdp
from .adapter import copied_embeddings
from .attention import attention_masks
from .forward import base_model, logits, text_config
from .loading import eos_token_ids

# Values of `init_lora_weights` that leave the base weights as they are.
KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Values that change the base weights. Only these two change them in the same way again when the adapter is loaded; what
# the others (pissa_niter, corda, loftq, lora_ga) do depends on chance or on data.
CHANGES_BASE_AGAIN = ("pissa", "olora")
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of logits, in units of their standard deviation
PROBE_WIDTH = 4  # tokens


def check_peft_config(config: PeftConfig | None) -> None:
    """See that the adapter is a LoRA, and one that loading the saved files restores.

    Raises:
        ValueError: it is another kind, or its initialisation changes the base weights by chance or by data.
    """
    if config is None:
        return
    if not isinstance(config, LoraConfig):
        raise ValueError(f"peft_config: a {type(config).__name__}, and only a LoRA can be trained; give a LoraConfig")
    for name, instead in (
        ("trainable_token_indices", "name the embeddings in modules_to_save, and all of their rows learn"),
        ("ensure_weight_tying", "copies of tied layers learn apart here; leave it out"),
    ):
        if getattr(config, name):
            raise ValueError(f"peft_config: {name}={getattr(config, name)!r}: not supported; {instead}")
    if config.bias != "none":
        raise ValueError(f"peft_config: bias={config.bias!r}: only the LoRA learns; leave it out")
    init = config.init_lora_weights
    if init not in (*KEEPS_BASE, *CHANGES_BASE_AGAIN):
        raise ValueError(
            f"peft_config: init_lora_weights={init!r} changes the base weights in a way that loading the saved adapter "
            f"can't repeat; choose one of {', '.join(map(repr, (*KEEPS_BASE, *CHANGES_BASE_AGAIN)))}"
        )


def check_directions(weights: dict[str, nn.Parameter]) -> None:
    """See that DoRA can divide the rows of the weights by their norms.

    Raises:
        ValueError: a row is 0, as the embedding of a padding token often is.
    """
    for name, weight in weights.items():
        layer, is_magnitude, _ = name.partition(".lora_magnitude_vector")
        if is_magnitude and float(weight.detach().abs().min()) == 0:
            raise ValueError(
                f"peft_config: use_dora=True: {layer} has a row of zeros, which has no direction; leave it out of "
                "target_modules"
            )


def check_modules_to_save(model: PeftModel, config: LoraConfig, new_embeddings: bool) -> None:
    """See that the copies of layers that learn beside the LoRA can learn, and be saved.

    Args:
        new_embeddings: the embeddings are not those in the base model's folder.

    Raises:
        ValueError: the base weights are not float32, which the copies are; or new embeddings could not be saved.
    """
    if not config.modules_to_save:
        return
    given, dtype = f"peft_config: modules_to_save={sorted(config.modules_to_save)!r}", base_model(model).dtype
    if dtype != torch.float32:
        raise ValueError(f"{given}: the copies learn in float32, and the base weights are {dtype}; load these so too")
    if new_embeddings and any(copied_embeddings(model)) and not all(copied_embeddings(model)):
        raise ValueError(f"{given}: the embeddings were resized or set, so name both them and the head, or neither")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """See that a padding token and an EOS token exist. A missing padding token becomes the EOS token.

    Raises:
        ValueError: one of them is missing.
    """
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError("processing_class: the tokenizer has neither a padding nor an EOS token; set its pad_token")
    if not eos_token_ids(model, tokenizer):
        raise ValueError(
            "processing_class: neither the tokenizer nor the model's generation config has an EOS token, so no "
            "completion would ever end; set the tokenizer's eos_token"
        )


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Compare the logits that the library computes from hidden states with those of the model's own forward.

    Random hidden states take the place of the decoder's own, so that nothing but the head is compared.

    Raises:
        ValueError: they differ: the model does something to its logits that is not known here, as Granite and Cohere,
            which scale them.
    """
    base, config = base_model(model), text_config(model)
    decoder, place, dtype = base.get_decoder(), base.device, base.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PROBE_WIDTH, config.hidden_size, generator=generator).to(place, dtype)
    ids = torch.zeros(1, PROBE_WIDTH, dtype=torch.int64, device=place)
    slots = torch.arange(PROBE_WIDTH, device=place)
    masks = attention_masks(config, torch.ones_like(ids, dtype=torch.bool), slots, dtype)

    def replace(module: nn.Module, inputs: Any, output: ModelOutput) -> ModelOutput:
        output.last_hidden_state = hidden
        return output

    hook = decoder.register_forward_hook(replace)
    try:
        with fsdp.gathered_as_needed(base):
            own = base(input_ids=ids, attention_mask=masks, position_ids=slots[None], use_cache=False).logits
            own, expected = own.float().cpu(), logits(model, hidden).cpu()
    finally:
        hook.remove()
    difference, spread = float((own - expected).abs().max()), float(own.std())
    if not difference <= HEAD_TOLERANCE.get(dtype, 0.1) * spread:
        raise ValueError(
            f"model_type={config.model_type!r}: the logits of its own forward differ from those of its head by up to "
            f"{difference:.2g}, so log-probabilities would be wrong; take a model without a scale on its logits"
        )


def remove_dropout(model: nn.Module) -> None:
    """Switch off all dropout of a model: that of its LoRA, of its layers and of its attention."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), int | float):
            module.attention_dropout = 0.0


def has_dropout(model: nn.Module) -> bool:
    """Whether any module of the model has a dropout that acts in training mode."""

    def share(module: nn.Module) -> float:
        share = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        return share if isinstance(share, int | float) else 0.0  # an attention may hold a layer of dropout by that name

    return any(share(module) > 0 for module in model.modules())
