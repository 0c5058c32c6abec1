"""Says in words what a run trained on what, where and for how long."""

from collections.abc import Sequence
from typing import Any

from ..data.visible import visible
from .metrics import keys_of, series
from .record import RunRecord


def facts_of(run: RunRecord) -> list[tuple[str, str]]:
    """What was trained, on what, for how long and where, as (name, text). What is not known is left out."""
    settings = run.settings
    facts = [("model", _model(settings)), ("method", run.method), ("data", _data(run)), ("rewards", _rewards(run))]
    facts += [("steps", _steps(run)), ("computed on", _machine(run.starts)), ("time", _time(run))]
    return [(name, visible(text)) for name, text in facts if text]


def _model(settings: dict[str, Any]) -> str:
    if not settings.get("model_name"):
        return ""
    rank = settings.get("lora_rank")
    how = "all weights" if rank == 0 else f"LoRA of rank {rank}" if rank else ""
    name = "tiny, the embedded Gemma" if settings["model_name"] == "tiny" else settings["model_name"]
    return f"{name}, {how}" if how else str(name)


def _data(run: RunRecord) -> str:
    settings, start = run.settings, run.starts[-1] if run.starts else {}
    name = settings.get("data_path") or settings.get("dataset")
    if not name and not start and "num_eval_rows" not in settings:
        return ""
    counts = [(start.get("training_rows"), "to learn from"), (start.get("evaluation_rows"), "held out")]
    sizes = ", ".join(f"{count:,} {what}" for count, what in counts if count)
    return f"{name or 'generated arithmetic'}{f': {sizes}' if sizes else ''}"


def _rewards(run: RunRecord) -> str:
    keys = [key for key in keys_of(run.rows) if key.startswith("rewards/") and key.endswith("/mean")]
    names = [key.removeprefix("rewards/").removesuffix("/mean") for key in keys]
    weights = run.settings.get("reward_weights")
    if weights and len(weights) == len(names):
        names = [f"{weight:g} × {name}" for weight, name in zip(weights, names, strict=True)]
    return " + ".join(names)


def _steps(run: RunRecord) -> str:
    planned = run.settings.get("max_steps")
    of = f" of {planned}" if isinstance(planned, int) and planned > run.last_step else ""
    size, group = (run.settings.get(k) for k in ("per_device_train_batch_size", "num_completions_per_prompt"))
    each = ""
    if size and run.settings.get("use_grpo"):
        each = (
            f", each of {size * (run.settings.get('gradient_accumulation_steps') or 1)} prompts × {group} completions"
        )
    return f"{run.last_step}{of}{each}"


def _machine(starts: Sequence[dict[str, Any]]) -> str:
    return str(starts[-1].get("device", "")) if starts else ""


def _time(run: RunRecord) -> str:
    ran = series(run.rows, "train_runtime")
    times = [visible(str(start.get("time", "")))[:10] for start in run.starts]
    when = f", begun on {times[0]}" if times and times[0] else ""
    resumed = f", resumed {len(times) - 1} time{'s' * (len(times) > 2)}" if len(times) > 1 else ""
    if not ran:
        return (when + resumed).removeprefix(", ")
    seconds = ran[-1][1]
    long = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
    return f"{long} of training{' since it was resumed' if resumed else ''}{when}{resumed}"
