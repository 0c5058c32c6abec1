"""The shapes of published Gemma models, so that a job can be planned without downloading its model.

The values come from each model's config.json on huggingface.co (google/gemma-2-*, google/gemma-3-*). Only those that
decide a shape or an operation are here.
"""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoConfig, Gemma2Config, Gemma3TextConfig, PretrainedConfig

from ..model import tiny

CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA2 = {"vocab_size": 256_000, "sliding_window": 4096, **CAPS}
GEMMA3 = {"vocab_size": 262_144, "sliding_window": 512, "num_attention_heads": 4, "num_key_value_heads": 1}
GEMMA3_WITH_VISION = {"vocab_size": 262_208, "sliding_window": 1024}


def _sizes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, scale: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scale,
    }


SHAPES: dict[str, tuple[type[PretrainedConfig], dict]] = {
    "gemma-2-2b": (Gemma2Config, GEMMA2 | _sizes(2304, 9216, 26, 8, 4, 256, 256)),
    "gemma-2-9b": (Gemma2Config, GEMMA2 | _sizes(3584, 14336, 42, 16, 8, 256, 256)),
    "gemma-2-27b": (Gemma2Config, GEMMA2 | _sizes(4608, 36864, 46, 32, 16, 128, 144)),
    "gemma-3-270m": (Gemma3TextConfig, GEMMA3 | _sizes(640, 2048, 18, 4, 1, 256, 256)),
    "gemma-3-1b": (Gemma3TextConfig, GEMMA3 | _sizes(1152, 6912, 26, 4, 1, 256, 256)),
    "gemma-3-4b": (Gemma3TextConfig, GEMMA3_WITH_VISION | _sizes(2560, 10240, 34, 8, 4, 256, 256)),
    "gemma-3-12b": (Gemma3TextConfig, GEMMA3_WITH_VISION | _sizes(3840, 15360, 48, 16, 8, 256, 256)),
    "gemma-3-27b": (Gemma3TextConfig, GEMMA3_WITH_VISION | _sizes(5376, 21504, 62, 32, 16, 128, 168)),
}
# Gemma 3 models of 4B and more are loaded with a vision tower (SigLIP, 27 layers, 1152 wide) and a projector. No graph
# of a text job reads these weights, but every chip holds them.
VISION_PARAMETERS, VISION_HIDDEN = 416_866_032, 1152
MODELS_WITH_VISION = ("gemma-3-4b", "gemma-3-12b", "gemma-3-27b")


def known_name(model_name: str) -> str | None:
    """Return the key of `SHAPES` for a hub id, such as gemma-3-1b for google/gemma-3-1b-it; None when there is none."""
    name = model_name.removeprefix("google/").removesuffix("-it").removesuffix("-pt")
    return name if name in SHAPES else None


def model_config(model_name: str) -> PretrainedConfig:
    """Return the config of a model's text decoder, without loading its weights.

    Args:
        model_name: a hub id of `SHAPES`, a folder with a config.json, or "tiny".

    Raises:
        ValueError: the model's shapes are not known here.
    """
    if model_name == tiny.NAME:
        return tiny.make_model(tiny.make_tokenizer()).config
    if (Path(model_name) / "config.json").is_file():
        return AutoConfig.from_pretrained(model_name, trust_remote_code=False).get_text_config()
    known = known_name(model_name)
    if known is None:
        raise ValueError(
            f"model_name={model_name!r}: its shapes are not known here; give a folder with its config.json, tiny, or "
            f"one of {', '.join(f'google/{name}' for name in SHAPES)}"
        )
    config_class, values = SHAPES[known]
    return config_class(**values)


def vision_parameters(model_name: str) -> int:
    """Return the number of parameters that are loaded with the model and that no graph of a text job reads."""
    if known_name(model_name) not in MODELS_WITH_VISION:
        return 0
    return VISION_PARAMETERS + VISION_HIDDEN * (1 + model_config(model_name).hidden_size)


def kinds_of_layers(config: PretrainedConfig) -> list[str]:
    """Return the kinds of layers of a model, such as "sliding_attention", in the order in which they first occur."""
    return list(dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]))


def with_depth(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """Return the config of the same model with another number of layers, whose kinds alternate."""
    if num_layers == config.num_hidden_layers:
        return config
    kinds = kinds_of_layers(config)
    return with_layers(config, [kinds[i % len(kinds)] for i in range(num_layers)])


def with_layers(config: PretrainedConfig, kinds: Sequence[str]) -> PretrainedConfig:
    """Return the config of the same model with layers of the given kinds, in the given order."""
    values = config.to_dict() | {"num_hidden_layers": len(kinds)}
    if values.get("layer_types") is not None:
        values["layer_types"] = list(kinds)
    return type(config).from_dict(values)
