"""A run's folder: its settings, checkpoints, metrics and curves, and what an earlier run left there."""

import dataclasses
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from transformers.trainer_pt_utils import AcceleratorConfig

from . import tiny
from .callbacks import METRICS_FILE
from .checkpoint import is_whole, newest_checkpoint
from .config import SYSTEM_MESSAGE, DataConfig, GRPOConfig, ModelConfig
from .model import base_model_name, resolve_model_name

CONFIG_FILE = "config.json"
CURVES_FILE = "training_curves.png"
# What a run writes into its output_dir, besides checkpoint-N.
RUN_FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "batches",
    "chat_template.jinja",
    CONFIG_FILE,
    "metrics.jsonl",
    "runs",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
    CURVES_FILE,
)

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


# What a run may be resumed with, although it began otherwise: how long, how often, where, in what portions, what else
# happens, and other words for the same.
MAY_CHANGE = (
    "output_dir",
    "device",
    "mesh_shape",
    "mesh_axes",
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
    "profile_step",
    "logging_steps",
    "logging_strategy",
    "report_to",
    "reward_timeout",
    "reward_processes",
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
    "num_tpu_cores",
)
# Likewise, but from or to None only: the best value of one metric means nothing for another.
MAY_BE_ADDED = ("metric_for_best_model", "greater_is_better")

# Not a setting of the job: where this process runs, or what to do once.
NOT_SAVED = (
    "local_rank",
    "resume_from_checkpoint",
    "logging_dir",
    "use_cpu",
    "dataloader_pin_memory",
    "hub_token",
    "debug",
    "do_eval",
    "disable_tqdm",
)


# ---- settings ----


def _default_of(field: dataclasses.Field) -> Any:
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if field.name == "accelerator_config":  # what becomes of None
        resolved = AcceleratorConfig(dispatch_batches=False).to_dict()
        resolved.pop("use_configured_state")
        return resolved
    return getattr(default, "value", default)  # of an enumeration


def settings_of(*configs: Any) -> dict[str, Any]:
    """What a config file holds of a `ModelConfig`, a `DataConfig` and a `GRPOConfig`: every field of our own, those of
    `transformers.TrainingArguments` that people commonly set, and the others where they are not the default."""
    settings: dict[str, Any] = {}
    for config in configs:
        own = list(type(config).__dict__.get("__annotations__", {}))
        values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
        inherited = [field for field in dataclasses.fields(config) if field.init and field.name not in own]
        shown = [f.name for f in inherited if f.name in COMMON_FIELDS or values[f.name] != _default_of(f)]
        settings |= {name: values[name] for name in [*own, *shown] if name not in NOT_SAVED}
    return settings


def save_config(settings: dict[str, Any], path: str | Path) -> None:
    Path(path).write_text(json.dumps(settings, indent=2) + "\n")


def check_same_run(settings: dict[str, Any], checkpoint: str | Path) -> None:
    """Settings that are resumed with must be those of the run, but for `MAY_CHANGE`. One that either side lacks is its
    field's default.

    Raises:
        ValueError: one differs.
    """
    path = Path(checkpoint).parent / CONFIG_FILE
    if not path.is_file():  # not written by `train`
        return
    fields = [field for config in (ModelConfig, DataConfig, GRPOConfig) for field in dataclasses.fields(config)]
    defaults = {field.name: _default_of(field) for field in fields if field.init}
    earlier = defaults | json.loads(path.read_text())
    now = defaults | json.loads(json.dumps(settings))
    for name in sorted(defaults.keys() - {*MAY_CHANGE, *NOT_SAVED}):
        added = name in MAY_BE_ADDED and None in (now[name], earlier[name])
        if now[name] != earlier[name] and not added:
            raise ValueError(
                f"{name}={now[name]!r}: the run that would be resumed from {checkpoint} has {earlier[name]!r}; "
                "give that, or begin a new run with resume_from_checkpoint=false (and "
                f"model_name={checkpoint} to train this adapter further)"
            )


# ---- the folder ----


def get_latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a run's folder, or None."""
    checkpoint = newest_checkpoint(output_dir)
    return None if checkpoint is None else str(checkpoint)


def names_folder(resume_from_checkpoint: str | None) -> bool:
    """Whether `--resume_from_checkpoint` names a folder, rather than asks for the newest checkpoint."""
    return str(resume_from_checkpoint).lower() not in ("auto", "latest", "true", "false", "none")


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` means: a folder, "latest" / "true", or "auto".

    "auto" is "latest" where there is a whole checkpoint, and None, a new run, where there is none.

    Raises:
        ValueError: there is none, or it is not whole.
    """
    if resume_from_checkpoint is None or str(resume_from_checkpoint).lower() == "false":
        return None
    if str(resume_from_checkpoint).lower() == "auto":
        return get_latest_checkpoint(output_dir)
    if str(resume_from_checkpoint).lower() in ("latest", "true"):
        checkpoint = get_latest_checkpoint(output_dir)
        if checkpoint is None:
            raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r}: no whole checkpoint in {output_dir}")
        return checkpoint
    if not is_whole(Path(resume_from_checkpoint)):
        raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r}: not a whole checkpoint folder")
    return str(resume_from_checkpoint)


def check_output_dir(output_dir: str | Path) -> None:
    """See that a run may be written there; creates nothing.

    Raises:
        ValueError: it is a file, lies below one, may not be written, or holds a whole model, which is no run's.
    """
    output_dir = Path(output_dir)
    there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir={str(output_dir)!r}: {there} may not be written")
    if list(output_dir.glob("model*.safetensors")) or list(output_dir.glob("pytorch_model*.bin")):
        raise ValueError(f"output_dir={str(output_dir)!r}: holds a model; give another folder, a run would mix with it")


def set_aside_previous_run(output_dir: str | Path) -> None:
    """Move what an earlier run left in this folder to `previous/TIME/` inside it: nothing is overwritten.

    Files that are not a run's stay where they are.
    """
    output_dir = Path(output_dir)
    left = [output_dir / name for name in RUN_FILES if (output_dir / name).exists()]
    left += [folder for folder in output_dir.glob("checkpoint-*") if folder.is_dir()]
    if not left:
        return
    target = output_dir / "previous" / time.strftime("%Y%m%d-%H%M%S")
    target.mkdir(parents=True)
    for item in left:
        shutil.move(item, target / item.name)
    print(f"An earlier run was in {output_dir}; it is now in {target}")


def newest_run(outputs: str | Path = "./outputs") -> str | None:
    """The folder up to three levels under `outputs`, or itself, whose final adapter is the newest, or None."""
    folders = [path.parent for depth in range(4) for path in Path(outputs).glob("*/" * depth + "adapter_config.json")]
    finished = [f for f in folders if "previous" not in f.parts and not f.name.startswith("checkpoint-")]
    return str(max(finished, key=lambda folder: (folder / "adapter_config.json").stat().st_mtime)) if finished else None


def find_system_message(model_path: str) -> str:
    """The instruction that the model was trained with: that of the run's config.json; none for the tiny model."""
    for folder in (Path(model_path), Path(model_path).parent):
        if (folder / "config.json").is_file():
            message = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("system_message")
            if message is not None:
                return message
    base = Path(resolve_model_name(base_model_name(model_path)))
    return "" if base.name.startswith(tiny.FOLDER_PREFIX) else SYSTEM_MESSAGE


# ---- metrics ----


def load_metrics(output_dir: str | Path) -> list[dict[str, float]]:
    """The rows of a run's metrics.jsonl."""
    path = Path(output_dir) / METRICS_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot_training_curves(output_dir: str | Path) -> Path:
    """Draw loss, reward, KL, completion length and evaluation accuracy of a run; writes CURVES_FILE."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = load_metrics(output_dir)
    panels = {
        "accuracy": [name for name in ("eval_accuracy", *sorted({k for r in rows for k in r if "mean@" in k}))],
        "reward": ["reward", "reward_std"],
        "loss": ["loss"],
        "KL from the reference": ["kl"],
        "entropy": ["entropy"],
        "completion length": ["completions/mean_length"],
    }
    panels = {title: [n for n in names if any(n in row for row in rows)] for title, names in panels.items()}
    panels = {title: names for title, names in panels.items() if names} or {"no metrics": []}
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.5 * columns, 3 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            marker = "o" if name.startswith("eval_") else None
            axis.plot(*zip(*points, strict=True), label=name.removeprefix("eval_"), marker=marker)
        axis.set(title=title, xlabel="step")
        if len(names) > 1:
            axis.legend()
    figure.tight_layout()
    path = Path(output_dir) / CURVES_FILE
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
