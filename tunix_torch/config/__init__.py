"""Every setting, once: fields with their help, aliases, checks, and how settings are kept with a run."""

from ..public import public_names

_HOMES = {
    "DataConfig": "data",
    "GRPOConfig": "grpo",
    "ModelConfig": "model",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
