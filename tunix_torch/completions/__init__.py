"""What the model wrote: completions of logged steps and answers of evaluations, kept as Parquet and shown as tables."""

from ..public import public_names

FOLDER = "completions"  # in a run's output_dir

_HOMES = {
    "KeepCompletions": "keeping",
    "StepRows": "rows",
}
__all__, __getattr__ = public_names(__name__, _HOMES)
