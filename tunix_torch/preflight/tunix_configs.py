"""Say in Google Tunix's words what a Hugging Face config of a Gemma 2 or Gemma 3 text model says."""

import contextlib
from unittest import mock

import jax.numpy as jnp
from transformers import PretrainedConfig
from tunix.models.gemma import model as gemma2
from tunix.models.gemma3 import model as gemma3


def sizes_of(config: PretrainedConfig) -> dict[str, int]:
    """Return the sizes of a model by the names that Tunix's configs of all Gemma models have for them."""
    return {
        "num_layers": config.num_hidden_layers,
        "num_embed": config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "num_kv_heads": config.num_key_value_heads,
        "sliding_window_size": config.sliding_window,
    }


def attention_types(module: object, config: PretrainedConfig) -> tuple:
    """Return the kind of each layer's attention, in the words of Tunix's module of the model."""
    kinds = {"full_attention": module.AttentionType.GLOBAL, "sliding_attention": module.AttentionType.LOCAL_SLIDING}
    return tuple(kinds[name] for name in config.layer_types)


def gemma2_config(config: PretrainedConfig) -> gemma2.ModelConfig:
    """Return Tunix's config of a Gemma 2.

    Raises:
        ValueError: Tunix's model has no such scale of queries, or no such wavelength.
    """
    if config.query_pre_attn_scalar != config.head_dim or config.rope_parameters["rope_theta"] != 10_000:
        raise ValueError("Tunix's Gemma 2 has query_pre_attn_scalar = head_dim and rope_theta = 10000 only")
    return gemma2.ModelConfig(
        **sizes_of(config),
        final_logit_softcap=config.final_logit_softcapping,
        attn_logits_soft_cap=config.attn_logit_softcapping,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=attention_types(gemma2, config),
    )


def gemma3_config(config: PretrainedConfig, dtype: jnp.dtype) -> gemma3.ModelConfig:
    """Return Tunix's config of a Gemma 3 text model whose weights have the given dtype.

    The model must be made within `gemma3_layers`.

    Raises:
        ValueError: Tunix's model has no such scale of queries.
    """
    scales = {config.head_dim: 1, config.hidden_size // config.num_attention_heads: 2}  # the only two in Tunix
    if config.query_pre_attn_scalar not in scales:
        raise ValueError(f"Tunix's Gemma 3 has no query_pre_attn_scalar = {config.query_pre_attn_scalar}")
    local, full = config.rope_parameters["sliding_attention"], config.rope_parameters["full_attention"]
    return gemma3.ModelConfig(
        **sizes_of(config),
        local_base_frequency=local["rope_theta"],
        global_base_frequency=full["rope_theta"],
        local_scale_factor=local.get("factor", 1.0),
        global_scale_factor=full.get("factor", 1.0),
        query_pre_attn_norm=gemma3.QueryPreAttentionNormalisation(scales[config.query_pre_attn_scalar]),
        param_dtype=dtype,
    )


def gemma3_layers(config: PretrainedConfig) -> contextlib.AbstractContextManager:
    """Within this context Tunix makes a Gemma 3 with the kinds of layers that a config names.

    Their order is a constant of Tunix's module, and no setting.
    """
    return mock.patch.object(gemma3, "GEMMA3_ATTENTION_PATTERN", attention_types(gemma3, config))
