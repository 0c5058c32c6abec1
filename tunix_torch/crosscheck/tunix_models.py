"""Load Google Tunix's Gemma models, on JAX, with the weights of a Hugging Face model, for the cross-check."""

import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig
from tunix.models.gemma import model as gemma2
from tunix.models.gemma import params_safetensors as gemma2_loader
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import params_safetensors as gemma3_loader
from tunix.models.gemma4 import model as gemma4
from tunix.models.gemma4 import params_safetensors as gemma4_loader


def load_tunix_model(folder: Path, config: PretrainedConfig) -> nnx.Module:
    """Return Tunix's own model with the weights that `save_pretrained` wrote into a folder, in float32.

    Raises:
        ValueError: Tunix has no such model.
    """
    if config.model_type not in ("gemma2", "gemma3_text", "gemma4_text"):
        raise ValueError(f"model type {config.model_type!r}: the cross-check knows gemma2, gemma3_text and gemma4_text")
    sizes = {
        "num_layers": config.num_hidden_layers,
        "num_embed": config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "num_kv_heads": config.num_key_value_heads,
        "sliding_window_size": config.sliding_window,
    }
    load = {"gemma2": _load_gemma2, "gemma3_text": _load_gemma3, "gemma4_text": _load_gemma4}[config.model_type]
    return load(folder, config, sizes)


def _attention_types(module: object, config: PretrainedConfig) -> tuple:
    kinds = {"full_attention": module.AttentionType.GLOBAL, "sliding_attention": module.AttentionType.LOCAL_SLIDING}
    return tuple(kinds[name] for name in config.layer_types)


def _load_gemma2(folder: Path, config: PretrainedConfig, sizes: dict[str, int]) -> nnx.Module:
    tunix_config = gemma2.ModelConfig(
        **sizes,
        final_logit_softcap=config.final_logit_softcapping,
        attn_logits_soft_cap=config.attn_logit_softcapping,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=_attention_types(gemma2, config),
    )
    if config.query_pre_attn_scalar != config.head_dim or config.rope_parameters["rope_theta"] != 10_000:
        raise ValueError("Tunix's Gemma 2 has query_pre_attn_scalar = head_dim and rope_theta = 10000 only")
    return gemma2_loader.create_model_from_safe_tensors(str(folder), tunix_config, dtype=jnp.float32)


def _load_gemma3(folder: Path, config: PretrainedConfig, sizes: dict[str, int]) -> nnx.Module:
    scales = {config.head_dim: 1, config.hidden_size // config.num_attention_heads: 2}  # the only two in Tunix
    if config.query_pre_attn_scalar not in scales:
        raise ValueError(f"Tunix's Gemma 3 has no query_pre_attn_scalar = {config.query_pre_attn_scalar}")
    local, full = config.rope_parameters["sliding_attention"], config.rope_parameters["full_attention"]
    tunix_config = gemma3.ModelConfig(
        **sizes,
        local_base_frequency=local["rope_theta"],
        global_base_frequency=full["rope_theta"],
        local_scale_factor=local.get("factor", 1.0),
        global_scale_factor=full.get("factor", 1.0),
        query_pre_attn_norm=gemma3.QueryPreAttentionNormalisation(scales[config.query_pre_attn_scalar]),
        param_dtype=jnp.float32,
    )
    # The order of sliding and full layers is a constant of Tunix's module, and no setting.
    with mock.patch.object(gemma3, "GEMMA3_ATTENTION_PATTERN", _attention_types(gemma3, config)):
        return gemma3_loader.create_model_from_safe_tensors(str(folder), tunix_config, dtype=jnp.float32)


def _load_gemma4(folder: Path, config: PretrainedConfig, sizes: dict[str, int]) -> nnx.Module:
    if config.num_kv_shared_layers:
        raise ValueError(
            f"num_kv_shared_layers={config.num_kv_shared_layers}: Tunix 0.1.7 wants K and V weights of every layer, "
            "which Hugging Face does not save for Gemma 4's layers that share them"
        )
    full = config.rope_parameters["full_attention"]
    tunix_config = gemma4.ModelConfig(
        **sizes,
        final_logit_softcap=config.final_logit_softcapping,
        per_layer_input_dim=config.hidden_size_per_layer_input,
        num_global_kv_heads=config.num_global_key_value_heads,
        global_key_size=config.global_head_dim,
        attention_pattern=_attention_types(gemma4, config),
        global_rope_proportion=full.get("partial_rotary_factor", 1.0),
        local_base_frequency=config.rope_parameters["sliding_attention"]["rope_theta"],
        global_base_frequency=full["rope_theta"],
        k_eq_v_global=config.attention_k_eq_v,
    )
    # Tunix's loader expects the names that the text model's weights have inside the multimodal model.
    with tempfile.TemporaryDirectory() as renamed:
        weights = {}
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
        if not any("language_model" in name for name in weights):
            weights = {name.replace("model.", "model.language_model.", 1): w for name, w in weights.items()}
        save_file(weights, Path(renamed) / "model.safetensors")
        shutil.copy(folder / "config.json", renamed)
        return gemma4_loader.create_model_from_safe_tensors(renamed, tunix_config, dtype=jnp.float32)
