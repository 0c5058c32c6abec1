"""By which method a job's settings make a model learn: GRPO or a variant, distillation, preferences, or SFT."""

from collections.abc import Mapping
from typing import Any

_NAMES = {"distillation": "on-policy distillation", "dr_grpo": "Dr. GRPO", "simpo": "SimPO"}  # the others: in capitals


def method_of(settings: Mapping[str, Any]) -> str:
    """The method, as one word: an `algorithm`, "distillation", a `preference_loss`, or "sft".

    Args:
        settings: those of a run as its config file has them. What is missing has its default.
    """
    if settings.get("use_grpo", True):
        return "distillation" if settings.get("teacher") else settings.get("algorithm", "grpo")
    return settings.get("preference_loss") or "sft"


def method_name(settings: Mapping[str, Any]) -> str:
    """What a reader calls the method, such as GRPO, Dr. GRPO, on-policy distillation, DPO or SFT. See `method_of`."""
    method = method_of(settings)
    return _NAMES.get(method, method.upper())
