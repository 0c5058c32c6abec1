"""A run's folder: its settings, checkpoints, metrics and curves, and what an earlier run left there."""

import json
import os
import shutil
import time
from pathlib import Path

from ..checkpoints.files import is_whole, newest_checkpoint
from ..config.grpo import SYSTEM_MESSAGE
from ..config.saved import CONFIG_FILE
from ..model import tiny
from ..model.loading import base_model_name, resolve_model_name
from .curves import CURVES_FILE

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
