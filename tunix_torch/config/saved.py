"""A job's settings as a config file holds them, and which of them a resumed run may change."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from .data import DataConfig
from .files import load_config, write_whole
from .grpo import GRPOConfig
from .model import ModelConfig

GROUPS = (ModelConfig, DataConfig, GRPOConfig)  # the dataclasses of a job's settings

CONFIG_FILE = "config.json"
# Where a run that trains a whole model keeps its settings, since `config.json` is that of the model.
WHOLE_CONFIG_FILE = "run_config.json"
# In a checkpoint's folder: the settings, and what else a run that goes on from it must have in common with it.
RUN_FILE = "run.json"
BASE_WEIGHTS, ARE_MESSAGES = "base_weights", "questions_are_messages"  # facts in it

# Fields of transformers.TrainingArguments that people set; all fields of our own come on top.
COMMON_FIELDS = (
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "seed",
)


# Settings that a resumed run may change, since they do not change what is learned: how long, how often, where, in what
# portions, what else happens, and other words for the same setting.
MAY_CHANGE = (
    "output_dir",
    "device",
    "mesh_shape",
    "mesh_axes",
    "fsdp",
    "fsdp_config",
    "gather_for_rollout",
    "max_steps",
    "num_train_epochs",
    "micro_batch_size",
    "gradient_checkpointing",
    "stop_check_interval",
    "per_device_eval_batch_size",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "num_eval_completions",
    "num_eval_rows",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "save_batches",
    "completions_max_mb",
    "log_completions",
    "log_completions_steps",
    "num_completions_to_print",
    "log_unique_prompts",
    "profile_step",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "reward_timeout",
    "on_reward_error",
    "max_reward_errors",
    "reward_processes",
    "max_skipped_steps",
    "early_stopping_patience",
    "load_best_model_at_end",
    "restore_callback_states_from_checkpoint",
    "save_only_model",
    "eval_delay",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "batch_eval_metrics",
    "prediction_loss_only",
    "include_for_metrics",
    "label_names",
    "gradient_checkpointing_kwargs",
    "torch_empty_cache_steps",
    "use_cache",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "ddp_backend",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "ddp_timeout",
    "do_train",
    "do_predict",
    "skip_memory_metrics",
    "enable_jit_checkpoint",
    "save_on_each_node",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "logging_first_step",
    "logging_nan_inf_filter",
    "include_num_input_tokens_seen",
    "run_name",
    "project",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
    "push_to_hub",
    "hub_always_push",
    "hub_model_id",
    "hub_private_repo",
    "hub_revision",
    "hub_strategy",
    "model_size",  # sets model_name
    "max_length",  # sets max_prompt_length
    "warmup_ratio",  # sets warmup_steps
    "generation_kwargs",  # sets generation_top_k and the like
    "num_tpu_cores",
)
# Settings that may be added or removed, but not replaced: the best value of one metric means nothing for another.
MAY_BE_ADDED = ("metric_for_best_model", "greater_is_better")

# Settings that are not part of a job: they say where this process runs, or what it does once.
NOT_SAVED = (
    "local_rank",
    "resume_from_checkpoint",
    "allow_changes",
    "logging_dir",
    "use_cpu",
    "dataloader_pin_memory",
    "hub_token",
    "debug",
    "do_eval",
    "disable_tqdm",
)


# ---- settings ----


def default_of(field: dataclasses.Field) -> Any:
    """The default of a setting, as `settings_of` gives its value."""
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if field.name == "accelerator_config":  # None becomes this
        resolved = AcceleratorConfig(dispatch_batches=False).to_dict()
        resolved.pop("use_configured_state")
        return resolved
    if field.name == "report_to":  # one name becomes a list of it
        return [default]
    return getattr(default, "value", default)  # the word of an enumeration's member


def settings_of(*configs: Any) -> dict[str, Any]:
    """Return what a config file holds of a `ModelConfig`, a `DataConfig` and a `GRPOConfig`.

    These are all fields of our own, those of `transformers.TrainingArguments` that people commonly set, and its other
    fields where they are not the default.
    """
    settings: dict[str, Any] = {}
    for config in configs:
        own = list(type(config).__dict__.get("__annotations__", {}))
        values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
        inherited = [field for field in dataclasses.fields(config) if field.init and field.name not in own]
        shown = [f.name for f in inherited if f.name in COMMON_FIELDS or values[f.name] != default_of(f)]
        settings |= {name: values[name] for name in [*own, *shown] if name not in NOT_SAVED}
    return settings


def config_file(folder: str | Path) -> Path:
    """The file in a run's folder that holds its settings. It need not be there."""
    whole = Path(folder) / WHOLE_CONFIG_FILE
    return whole if whole.is_file() else Path(folder) / CONFIG_FILE


def is_folder_of_run(folder: str | Path) -> bool:
    """Whether a folder has the settings of a run. A folder with the config of a whole model alone has none.

    Raises:
        ValueError: the file can't be read.
    """
    file = config_file(folder)
    return file.is_file() and "learning_rate" in load_config(file)


def save_config(settings: dict[str, Any], path: str | Path) -> None:
    """Write settings as a config file, which is never there in part."""
    write_whole(path, json.dumps(settings, indent=2) + "\n")


def saved_settings(checkpoint: str | Path) -> dict[str, Any] | None:
    """The settings of the run that left a checkpoint: those in the checkpoint, or else those of the run's folder.

    None: neither has any, since an early version of `TunixTrainer` without `train` wrote it.

    Raises:
        ValueError: the file can't be read.
    """
    own, others = Path(checkpoint) / RUN_FILE, config_file(Path(checkpoint).parent)
    if own.is_file():
        settings = load_config(own).get("settings")
        if not isinstance(settings, dict):
            raise ValueError(f"{own} is not what a run writes: settings={settings!r:.60}")
        return settings
    settings = load_config(others) if others.is_file() else {}
    return settings if "learning_rate" in settings else None  # else it is the config of a whole model


def differing_settings(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of two jobs that differ, each with both values, in the order of the dataclasses.

    A setting that is missing on one side has its default there. Those of NOT_SAVED are not compared.
    """
    one, other, differing = _as_json(one), _as_json(other), {}
    for field in (field for config in GROUPS for field in dataclasses.fields(config) if field.init):
        default = _as_json(default_of(field))
        values = one.get(field.name, default), other.get(field.name, default)
        if values[0] != values[1] and field.name not in NOT_SAVED:
            differing[field.name] = values
    return differing


def changed_from_defaults(settings: dict[str, Any], taken: dict[str, Any] | None = None) -> dict[str, tuple[Any, Any]]:
    """The settings of a job that are not at their defaults, each as (value, default), in the order of the dataclasses.

    An `eval_strategy` that follows from `eval_steps` is none of them.

    Args:
        taken: what a command takes for some settings in place of the defaults of the dataclasses.
    """
    given = set(settings)
    if settings.get("eval_strategy") == "steps" and settings.get("eval_steps") is not None:
        given.remove("eval_strategy")
    return {name: values for name, values in differing_settings(settings, taken or {}).items() if name in given}


def changed_settings(now: dict[str, Any], earlier: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that differ in what changes what is learned, each as (now, earlier).

    A group of settings of which one side has none at all is not compared: who makes a `TunixTrainer` gives no
    `ModelConfig` and no `DataConfig`.
    """
    names = {config: set(config.__dict__["__annotations__"]) for config in GROUPS}
    groups = [config for config in GROUPS if names[config] & now.keys() and names[config] & earlier.keys()]
    compared = {field.name for config in groups for field in dataclasses.fields(config)} - {*MAY_CHANGE}
    return {
        name: values
        for name, values in sorted(differing_settings(now, earlier).items())
        if name in compared and not (name in MAY_BE_ADDED and None in values)
    }


def _as_json(value: Any) -> Any:
    """A value as a config file that was written and read again has it."""
    return json.loads(json.dumps(value, default=str))


def refuse_changes(changed: dict[str, tuple[Any, Any]], checkpoint: str | Path, allowed: Sequence[str] | None) -> None:
    """Refuse what a resumed run would change of what is learned, unless the user has allowed it by name.

    Args:
        changed: each as (now, earlier).
        allowed: the setting `allow_changes`.

    Raises:
        ValueError: something that is not allowed would change.
    """
    for name, (now, earlier) in changed.items():
        if name not in (allowed or ()):
            raise ValueError(
                f"{name}={now!r}: the run that would be resumed from {checkpoint} has {earlier!r}; give that, go on "
                f"with the change by allow_changes={name}, or begin a new run with resume_from_checkpoint=false (and "
                f"model_name={checkpoint} to train it further)"
            )


def check_same_run(settings: dict[str, Any], checkpoint: str | Path, allowed: Sequence[str] | None = None) -> None:
    """Check that a resumed run has the settings with which it began, except those in `MAY_CHANGE`.

    A setting that is missing on either side has its default.

    Args:
        allowed: settings that may differ all the same.

    Raises:
        ValueError: a setting differs, or the file with the earlier ones can't be read.
    """
    earlier = saved_settings(checkpoint)
    if earlier is not None:
        refuse_changes(changed_settings(settings, earlier), checkpoint, allowed)
