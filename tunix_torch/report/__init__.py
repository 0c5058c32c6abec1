"""What a run left on disk, read and explained: a page of HTML that needs no network, and a diagnosis of the curves."""

from ..public import public_names

_HOMES = {
    "diagnose": "diagnosis",
    "read_run": "record",
    "write_comparison": "page",
    "write_report": "page",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
