"""Scores completions: calls reward functions and judges with their columns, time limits and worker processes."""

from ..public import public_names

_HOMES = {
    "Questions": "questions",
    "Scorer": "scorer",
    "score_completions": "scoring",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
