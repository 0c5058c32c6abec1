"""Names of other libraries and systems, translated into this library's settings."""

from ..public import public_names

_HOMES = {
    "GRPOTrainingConfig": "agent_tunix",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
