"""The policy that is trained: a model on this process's device, and the one LoRA of it that learns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..config.grpo import GRPOConfig
from ..config.model import ModelConfig
from ..config.saved import settings_of
from ..runtime import together
from .adapter import adapter_weights, choose_adapter, has_new_embeddings, make_trainable
from .checks import check_head, check_peft_config, check_tokenizer
from .forward import base_model, recompute_layers
from .loading import add_lora, load_model, lora_config, place


@dataclass
class Policy:
    """A model with a LoRA."""

    model: PeftModel
    adapter: str  # the name of the LoRA that learns
    has_new_embeddings: bool  # the embeddings are not those of the base model's folder, so they are saved too


def make_policy(
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: LoraConfig | None,
    args: GRPOConfig,
    facts: dict[str, Any],
) -> Policy:
    """Load what is a name, put a LoRA on what has none, and move the model to this process's device.

    Switches `args.gradient_checkpointing` on where the model has it already.

    Args:
        peft_config: of the LoRA for a model that has none; None: rank 16 on all projections.
        facts: what else must be the same on all hosts, besides settings, model and code, by name.

    Raises:
        ValueError: the tokenizer can neither pad nor end, the LoRA can't be trained or loaded again, the model's logits
            are not its head's, or the hosts of a mesh differ.
    """
    if isinstance(model, str | Path):
        model = load_model(str(model))
    check_tokenizer(tokenizer, model)
    set_seed(args.seed)  # before the LoRA draws its first weights
    if not isinstance(model, PeftModel):
        check_peft_config(peft_config)  # before it changes the model
        model = add_lora(model, peft_config or lora_config(ModelConfig()))
    elif peft_config is not None:
        raise ValueError("peft_config: the model has a LoRA already; leave peft_config out, or give the base model")
    adapter = choose_adapter(model)
    check_peft_config(model.peft_config[adapter])
    make_trainable(adapter_weights(model, adapter))
    if base_model(model).is_gradient_checkpointing:  # switched on by the user, or by an earlier trainer
        args.gradient_checkpointing = True
    new_embeddings = together.decided_by_first(lambda: has_new_embeddings(model))  # while it is not on the device
    together.check_same(lambda: settings_of(args) | together.surroundings() | _facts(model) | facts)
    place(model)
    if args.gradient_checkpointing:
        recompute_layers(model, args.gradient_checkpointing_kwargs)
    together.keep_frozen_out_of_ddp(model)
    check_head(model)
    return Policy(model, adapter, new_embeddings)


def check_trainable(model: PeftModel) -> None:
    """Raises ValueError where something other than LoRA matrices would learn, or nothing at all."""
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    other = [name for name in trainable if "lora_" not in name]
    if other or not trainable:
        raise ValueError(f"peft_config: only LoRA matrices can be trained, but {other[:1] or 'nothing'} is trainable")


def _facts(model: PeftModel) -> dict[str, Any]:
    """What all hosts of a mesh must have alike of the model."""

    def but_for_paths(config: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in config.items() if not name.endswith("name_or_path")}

    return {
        "weights of the model": together.digest(model.parameters()),
        "the model's config": but_for_paths(base_model(model).config.to_dict()),
        "the LoRA's config": {name: but_for_paths(config.to_dict()) for name, config in model.peft_config.items()},
    }
