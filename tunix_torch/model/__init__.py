"""Models: loading, the LoRA and the reference policy, the forward pass in parts, attention and its caches."""

from ..public import public_names

_HOMES = {
    "decode_weights": "decoding",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "make_policy": "policy",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
