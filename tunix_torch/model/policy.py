"""Makes the policy that is trained: a model on this process's device, of which a LoRA learns, or all weights."""

import logging
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..config.fsdp import check_optimizer
from ..config.grpo import GRPOConfig
from ..config.model import TINY_NAME, ModelConfig
from ..config.saved import settings_of
from ..runtime import tensor_parallel, together
from .attention import use_own_attention
from .checks import check_head, check_peft_config, check_tokenizer, has_dropout
from .fingerprint import fingerprint_of
from .forward import base_model, recompute_layers
from .loading import add_lora, load_model, lora_config, place
from .memory import check_lengths, check_rank
from .policies import AdapterPolicy, Policy, WholePolicy

logger = logging.getLogger(__name__)


def make_policy(
    model: str | Path | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    peft_config: LoraConfig | None,
    args: GRPOConfig,
    facts: dict[str, Any],
    full: bool = False,
) -> Policy:
    """Load what is a name, put a LoRA on what has none, and move the model to this process's device.

    Switches `args.gradient_checkpointing` on where the model has it already. With `full` the model's config gets the
    run's `system_message`, so that a saved model is asked as it was trained.

    Args:
        peft_config: of the LoRA for a model that has none; None: rank 16 on all projections.
        facts: what else must be the same on all hosts, besides settings, model and code, by name.
        full: train all weights of the text model, without a LoRA.

    Raises:
        ValueError: the tokenizer can neither pad nor end, the LoRA can't be trained or loaded again, the LoRA or a
            rollout can't fit into the memory, a LoRA and `full` are both given, the model's logits are not its head's,
            a mesh of processes can't split the model or draw its dropout, or the hosts of a mesh differ.
    """
    if isinstance(model, str | Path):
        if str(model) == TINY_NAME and args.system_message and together.is_first():
            logger.warning(
                "system_message=%.40r: model_name='tiny' has seen no instructions and answers worse with one; give ''",
                args.system_message,
            )
        model = load_model(str(model))
    check_lengths(model, args)
    check_tokenizer(tokenizer, model)
    set_seed(args.seed)  # before the LoRA draws its first weights
    policy = _whole(model, peft_config, args) if full else _adapter(model, peft_config)
    policy.check_trainable()
    model = policy.model
    if args.needs_reference:
        policy.check_reference(args.reference)
    if base_model(model).is_gradient_checkpointing:  # switched on by the user, or by an earlier trainer
        args.gradient_checkpointing = True
    together.check_same(lambda: settings_of(args) | together.surroundings() | _facts(model) | facts)
    if tensor_parallel.is_split_along_tp() and has_dropout(model) and not args.disable_dropout:
        raise ValueError("mesh_shape: along tp dropout would not be drawn alike; set lora_dropout 0 or disable_dropout")
    policy.base_weights = fingerprint_of(model, policy.to_save().values())
    place(model, args.splitting, list(policy.weights().values()) if policy.has_base else [])
    if args.gradient_checkpointing:
        recompute_layers(model, args.gradient_checkpointing_kwargs)
    if args.splitting is None and not tensor_parallel.is_split_along_tp():
        together.keep_frozen_out_of_ddp(model)
    else:
        model._is_accelerate_prepared = True  # else Accelerate would wrap it in DDP
    use_own_attention(base_model(model))
    check_head(model)
    return policy


def _adapter(model: PreTrainedModel | PeftModel, peft_config: LoraConfig | None) -> AdapterPolicy:
    if not isinstance(model, PeftModel):
        check_peft_config(peft_config)  # before it changes the model
        peft_config = peft_config or lora_config(ModelConfig())
        check_rank(model, peft_config)
        model = add_lora(model, peft_config)
    elif peft_config is not None:
        raise ValueError("peft_config: the model has a LoRA already; leave peft_config out, or give the base model")
    return AdapterPolicy(model)


def _whole(model: PreTrainedModel | PeftModel, peft_config: LoraConfig | None, args: GRPOConfig) -> WholePolicy:
    if peft_config is not None:
        raise ValueError("full=True: all weights are trained, without a LoRA; leave peft_config out, or full")
    if isinstance(model, PeftModel):
        raise ValueError("full=True: the model has a LoRA; merge it first (tunix-torch export), or leave full out")
    check_optimizer(args)
    if args.save_batches:
        raise ValueError(
            f"save_batches={args.save_batches}: records are replayed with a LoRA, and here all weights are trained"
        )
    # Commands that ask the model look for these in its config, to ask it as it was trained.
    model.config.system_message = args.system_message
    if not args.wrap_prompts:
        model.config.wrap_prompts = False
    if args.chat_template_kwargs:
        model.config.chat_template_kwargs = dict(args.chat_template_kwargs)
    return WholePolicy(model)


def _facts(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """What all hosts of a mesh must have alike of the model."""

    def but_for_paths(config: dict[str, Any]) -> dict[str, Any]:
        ordered = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        return {name: value for name, value in ordered.items() if not name.endswith("name_or_path")}

    return {
        "weights of the model": together.digest(model.parameters()),
        "the model's config": but_for_paths(base_model(model).config.to_dict()),
        "the LoRA's config": {name: but_for_paths(config.to_dict()) for name, config in _adapters(model).items()},
    }


def _adapters(model: PreTrainedModel | PeftModel) -> dict[str, LoraConfig]:
    return model.peft_config if isinstance(model, PeftModel) else {}
