"""Load Google Tunix's Gemma models, on JAX, with the weights of a Hugging Face model, for the cross-check."""

import shutil
import tempfile
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig
from tunix.models.gemma import params_safetensors as gemma2_loader
from tunix.models.gemma3 import params_safetensors as gemma3_loader
from tunix.models.gemma4 import model as gemma4
from tunix.models.gemma4 import params_safetensors as gemma4_loader

from ..preflight.tunix_configs import attention_types, gemma2_config, gemma3_config, gemma3_layers, sizes_of


def load_tunix_model(folder: Path, config: PretrainedConfig) -> nnx.Module:
    """Return Tunix's own model with the weights that `save_pretrained` wrote into a folder, in float32.

    Raises:
        ValueError: Tunix has no such model.
    """
    if config.model_type not in ("gemma2", "gemma3_text", "gemma4_text"):
        raise ValueError(f"model type {config.model_type!r}: the cross-check knows gemma2, gemma3_text and gemma4_text")
    load = {"gemma2": _load_gemma2, "gemma3_text": _load_gemma3, "gemma4_text": _load_gemma4}[config.model_type]
    return load(folder, config)


def _load_gemma2(folder: Path, config: PretrainedConfig) -> nnx.Module:
    return gemma2_loader.create_model_from_safe_tensors(str(folder), gemma2_config(config), dtype=jnp.float32)


def _load_gemma3(folder: Path, config: PretrainedConfig) -> nnx.Module:
    tunix_config = gemma3_config(config, jnp.float32)
    with gemma3_layers(config):
        return gemma3_loader.create_model_from_safe_tensors(str(folder), tunix_config, dtype=jnp.float32)


def _load_gemma4(folder: Path, config: PretrainedConfig) -> nnx.Module:
    if config.num_kv_shared_layers:
        raise ValueError(
            f"num_kv_shared_layers={config.num_kv_shared_layers}: Tunix 0.1.7 wants K and V weights of every layer, "
            "which Hugging Face does not save for Gemma 4's layers that share them"
        )
    full = config.rope_parameters["full_attention"]
    tunix_config = gemma4.ModelConfig(
        **sizes_of(config),
        final_logit_softcap=config.final_logit_softcapping,
        per_layer_input_dim=config.hidden_size_per_layer_input,
        num_global_kv_heads=config.num_global_key_value_heads,
        global_key_size=config.global_head_dim,
        attention_pattern=attention_types(gemma4, config),
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
