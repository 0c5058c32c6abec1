"""Evaluation: sampled answers to questions whose answers are known, pass@k with intervals, and results on disk."""

from ..public import public_names

_HOMES = {
    "Answers": "answers",
    "evaluate_policy": "evaluation",
    "summarize": "results",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
