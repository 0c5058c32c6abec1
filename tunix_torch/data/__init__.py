"""Questions on their way to the model: rows are read from files and hubs, understood, tokenised and padded."""

from ..public import public_names

_HOMES = {
    "load_data": "sources",
    "prepare_rows": "prompts",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
