"""Learning from a batch: passes, log-probabilities, the learning step, supervised fine-tuning, a step's numbers."""

from ..public import public_names

_HOMES = {
    "logps_without_gradient": "step",
    "token_logps": "logprobs",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
