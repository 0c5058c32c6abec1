"""Sampling completions: choosing tokens, and the rows that are decoded."""

from ..public import public_names

_HOMES = {
    "Sampler": "sampler",
    "SamplingParams": "tokens",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
