"""Configuration, checkpoint, metrics and device helpers by the names that other systems' documents use.

Each stands in the library, which chooses the device when its own parts are imported; so a name is looked up when it is
first used: `utils.load_metrics` is `tunix_torch.report.metrics.load_metrics`.
"""

import importlib
from typing import Any

HOMES = {
    "check_output_dir": "run.folder",
    "check_output_file": "cli.script",
    "check_tpu_host": "cli.tpu_host",
    "choose_device": "cli.script",
    "fail": "cli.script",
    "find_system_message": "run.folder",
    "get_latest_checkpoint": "run.folder",
    "load_config": "config.files",
    "load_metrics": "report.metrics",
    "memory_summary": "runtime.device",
    "newest_run": "run.folder",
    "plot_training_curves": "run.curves",
    "resolve_checkpoint": "run.folder",
    "run_script": "cli.script",
    "save_config": "config.saved",
    "set_aside_previous_run": "run.folder",
    "settings_of": "config.saved",
    "tpu_backend": "runtime.choice",
    "verify_tpu_setup": "cli.tpu_host",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'utils' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tunix_torch.{HOMES[name]}"), name)
