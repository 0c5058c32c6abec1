"""Finds what a run left in its folder: checkpoints, files to set aside, the newest adapter, its instruction."""

import logging
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from ..checkpoints.files import newest_checkpoint, why_not_whole
from ..checkpoints.manifest import CHECKSUM_FILE, MANIFEST_FILE
from ..checkpoints.publishing import UPLOADING
from ..checkpoints.whole import UNFINISHED
from ..completions import FOLDER as COMPLETIONS
from ..config.files import load_config
from ..config.grpo import SYSTEM_MESSAGE
from ..config.mappings import check_template_kwargs
from ..config.saved import ARE_MESSAGES, CONFIG_FILE, RUN_FILE, WHOLE_CONFIG_FILE
from ..model import tiny
from ..model.loading import base_model_name, resolve_model_name
from ..report.metrics import METRICS_FILE
from ..report.page import COMPARISON_FILE, REPORT_FILE
from ..report.record import CROSSCHECK_FILE
from ..report.starts import STARTS_FILE
from .curves import CURVES_FILE

logger = logging.getLogger(__name__)

# The files and folders that a run writes into its output_dir, besides checkpoint-N.
RUN_FILES = (
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "bad_batches",
    "batches",
    "chat_template.jinja",
    COMPLETIONS,
    CONFIG_FILE,
    "generation_config.json",
    MANIFEST_FILE,
    CHECKSUM_FILE,
    METRICS_FILE,
    "model.safetensors",
    "model.safetensors.index.json",
    RUN_FILE,
    "runs",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
    WHOLE_CONFIG_FILE,
    UNFINISHED,
    UPLOADING,
    CURVES_FILE,
    STARTS_FILE,
    REPORT_FILE,
    COMPARISON_FILE,
    CROSSCHECK_FILE,
)


def get_latest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint in a run's folder, or None. Those that are damaged are passed over with a warning."""

    def passed_over(folder: Path, reason: str) -> None:
        logger.warning("%s is passed over: %s", folder, reason)

    checkpoint = newest_checkpoint(output_dir, passed_over)
    return None if checkpoint is None else str(checkpoint)


def names_folder(resume_from_checkpoint: str | None) -> bool:
    """Whether the setting names a folder, and does not ask for the newest checkpoint or for none."""
    return str(resume_from_checkpoint).lower() not in ("auto", "latest", "true", "false", "none")


def resolve_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` asks for, or None for a new run.

    Args:
        resume_from_checkpoint: a folder; "latest" or "true" for the newest whole checkpoint in `output_dir`; "auto" for
            that one if there is one and otherwise a new run; "false" or None for a new run.

    Raises:
        ValueError: "latest", and there is no whole checkpoint; or the folder is not a whole checkpoint.
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
    reason = why_not_whole(resume_from_checkpoint)
    if reason is not None:
        raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r}: not a whole checkpoint folder: {reason}")
    return str(resume_from_checkpoint)


def check_output_dir(output_dir: str | Path, model_name: str | None = None) -> None:
    """See that a run can be written into this folder. Nothing is created.

    Args:
        model_name: the model that is trained.

    Raises:
        ValueError: it is a file or lies below one, it may not be written, or it holds a whole model that no run has
            trained, or that is the one to train.
    """
    output_dir = Path(output_dir)
    there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir={str(output_dir)!r}: {there} may not be written")
    of_a_run = (output_dir / WHOLE_CONFIG_FILE).is_file() and not _is_same_folder(output_dir, model_name)
    if not of_a_run and any(any(output_dir.glob(files)) for files in ("model*.safetensors", "pytorch_model*.bin")):
        raise ValueError(f"output_dir={str(output_dir)!r}: holds a model; give another folder, a run would mix with it")


def _is_same_folder(folder: Path, name: str | None) -> bool:
    return name is not None and Path(name).is_dir() and folder.is_dir() and folder.samefile(name)


def set_aside_previous_run(output_dir: str | Path) -> None:
    """Move the files that an earlier run left in this folder to `previous/TIME/` inside it. Nothing is overwritten.

    Files that no run writes stay where they are.
    """
    output_dir = Path(output_dir)
    left = [output_dir / name for name in RUN_FILES if (output_dir / name).exists()]
    left += [folder for folder in output_dir.glob("checkpoint-*") if folder.is_dir()]
    left += list(output_dir.glob("model-?????-of-?????.safetensors"))
    if not left:
        return
    target = output_dir / "previous" / time.strftime("%Y%m%d-%H%M%S")
    target.mkdir(parents=True)
    for item in left:
        shutil.move(item, target / item.name)
    print(f"An earlier run was in {output_dir}; it is now in {target}")


def newest_run(outputs: str | Path = "./outputs") -> str | None:
    """The folder with the newest final adapter, or the newest whole model that a run has trained: `outputs`, or one up
    to three levels below. None: there is none."""
    files = [
        path
        for depth in range(4)
        for name in ("adapter_config.json", WHOLE_CONFIG_FILE)
        for path in Path(outputs).glob("*/" * depth + name)
        if "previous" not in path.parent.parts and not path.parent.name.startswith("checkpoint-")
    ]
    # the settings are there before the model is, whose config is written with it
    files = [path if path.name != WHOLE_CONFIG_FILE else path.with_name(CONFIG_FILE) for path in files]
    files = [path for path in files if path.is_file()]
    return str(max(files, key=lambda path: path.stat().st_mtime).parent) if files else None


def newest_model() -> str | None:
    """What `newest_run` finds or, where no run has ended, the newest whole checkpoint in ./outputs. None: nothing."""
    return newest_run() or get_latest_checkpoint("./outputs")


def settings_near(model_path: str) -> dict[str, Any]:
    """The settings that a model's prompts follow: those in the run.json or config.json of its folder, or else of the
    run that the folder belongs to; the first that has a `system_message`, as a merged model's config.json does.

    Raises:
        ValueError: the file can't be read.
    """
    near = (Path(model_path), Path(model_path).parent) if Path(model_path).is_dir() else ()
    for folder in near:
        for file in (folder / RUN_FILE, folder / CONFIG_FILE):
            found = load_config(file) if file.is_file() else {}
            settings = found.get("settings", {}) if file.name == RUN_FILE else found
            if not isinstance(settings, dict) or settings.get("system_message") is None:
                continue
            message, wraps = settings["system_message"], settings.get("wrap_prompts", True)
            if not isinstance(message, str) or not isinstance(wraps, bool):
                raise ValueError(f"{file}: system_message or wrap_prompts is not what a run wrote")
            if settings.get("chat_template_kwargs") is not None:
                check_template_kwargs(settings["chat_template_kwargs"])
            return settings | {"wrap_prompts": wraps or found.get(ARE_MESSAGES) is True}
    return {}


def find_system_message(model_path: str) -> str:
    """The instruction that a model was trained with: that of its run's config.json, else that of its base model."""
    settings = settings_near(model_path)
    if settings:
        return settings["system_message"]
    base = Path(resolve_model_name(base_model_name(model_path)))
    return "" if base.name.startswith(tiny.FOLDER_PREFIX) else SYSTEM_MESSAGE


def warn_of_other_prompts(model_path: str, system_message: str) -> None:
    """Say so where a model is to be trained further with another instruction than it was trained with."""
    before = settings_near(model_path).get("system_message")
    if before is not None and before != system_message:
        logger.warning(
            "system_message=%.40r: %s was trained with %.40r and may answer worse now; it is asked as before with "
            "--system_message %s",
            system_message,
            model_path,
            before,
            shlex.quote(before),
        )


def find_prompt_settings(model_path: str) -> dict[str, Any]:
    """The settings `chat_template_kwargs` and `wrap_prompts` that a model was trained with, where they are no default.

    They are arguments of `prepare_rows` and `render_prompt`. A model whose questions were messages is asked by its chat
    template.
    """
    settings = settings_near(model_path)
    found = {"chat_template_kwargs": settings.get("chat_template_kwargs") or {}}
    found |= {"wrap_prompts": settings.get("wrap_prompts", True)}
    return {name: value for name, value in found.items() if value not in ({}, True)}
