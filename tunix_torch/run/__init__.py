"""A whole job: its folder, callbacks, curves and export."""

from ..public import public_names

_HOMES = {
    "export_merged": "export",
    "train": "job",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
