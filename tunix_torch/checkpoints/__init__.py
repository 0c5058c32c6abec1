"""What a run leaves to go on from: checkpoints, and what a resumed run takes from them."""

from ..public import public_names

_HOMES = {
    "AdapterTrainer": "adapter_trainer",
    "newest_checkpoint": "files",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
