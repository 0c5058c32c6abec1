"""Batches whose loss or gradient was not finite, on disk: `python -m tunix_torch.replay` says what is wrong in one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..config.saved import settings_of
from ..model.forward import base_model
from ..model.policies import Policy
from ..runtime import fsdp, together
from .guard import Decided
from .pairs import pair_batch
from .record import Record
from .sft import LAYOUT, sft_batch

FOLDER = "bad_batches"  # in a run's output_dir
MAX_FILES = 20  # the newest files are kept, so that a run that goes on for weeks does not fill the disk


@dataclass
class BadBatch(Record):
    """A batch that was not learned from, and all that computing with it again takes."""

    layout: dict[str, Tensor]  # of packed rows, see `learn_completions`; else empty
    weights: dict[str, Tensor]  # the adapter, by parameter name; empty where all weights of a model learn
    kind: str  # "grpo", "sft" or "pairs"
    step: int  # the optimizer step, from 1
    norm: float  # of the gradient of the whole step
    loss: float  # of the whole step
    base_model: str  # a hub id or a folder
    model_dtype: str  # of the base weights
    adapter: str  # the config of the LoRA as JSON; "" where all weights learn
    settings: str  # of the run, as JSON

    def __post_init__(self) -> None:
        self.step, self.norm, self.loss = int(self.step), float(self.norm), float(self.loss)


def kind_of(args: GRPOConfig) -> str:
    """What a run with these settings learns from."""
    return "grpo" if args.use_grpo else "sft" if args.preference_loss is None else "pairs"


def save_bad_batches(skipped: Decided, policy: Policy, args: GRPOConfig) -> list[Path]:
    """Write the batches of a step that was not taken into the run's folder: a file for each. All hosts take part.

    Returns:
        the files.
    """
    folder, kind = Path(args.output_dir) / FOLDER, kind_of(args)
    writes = together.is_first_peer()
    model = policy.model
    config = model.peft_config[model.active_adapter].to_dict() if isinstance(model, PeftModel) else None
    weights = (
        {name: fsdp.whole(w).detach().cpu().clone() for name, w in policy.weights().items()} if policy.has_base else {}
    )
    base = base_model(model)
    paths = []
    for number, given in enumerate(skipped.batches, 1):
        batch, layout = _as_batch(given, kind)
        record = BadBatch(
            batch=batch,
            layout=layout,
            weights=weights,
            kind=kind,
            step=skipped.step,
            norm=skipped.norm,
            loss=skipped.loss,
            base_model=base.name_or_path,
            model_dtype=str(base.dtype).removeprefix("torch."),
            adapter="" if config is None else json.dumps(config, default=_as_json),
            settings=json.dumps(settings_of(args), default=str),
        )
        more = f"-{number}" if len(skipped.batches) > 1 else ""
        more += f"-process-{together.index()}" if together.count() > 1 else ""
        paths.append(folder / f"step-{skipped.step:04}{more}.safetensors")
        if writes:
            record.save(paths[-1])
    if writes:
        _keep_newest(folder, paths)
    return paths


def _as_batch(given: TrainBatch | dict[str, Any], kind: str) -> tuple[TrainBatch, dict[str, Tensor]]:
    """What a step was to learn from, in main memory, and the layout of packed rows."""
    layout, memory = {}, torch.device("cpu")  # on the device something would be compiled
    if isinstance(given, TrainBatch):
        batch = given
    elif kind == "pairs":
        batch = pair_batch(given, len(given["prompt_ids"]), place=memory)
    else:
        batch = sft_batch(given, int(given["learned_mask"].sum()), memory)
        layout = {name: given[name].cpu() for name in LAYOUT if name in given}
    return batch.in_main_memory(), layout


def _as_json(value: Any) -> Any:
    """Sets, as a LoRA's target modules are, as lists; enumerations and the like as their text."""
    return sorted(value) if isinstance(value, set | frozenset) else getattr(value, "value", str(value))


def _keep_newest(folder: Path, newest: Sequence[Path]) -> None:
    """Delete the oldest files beyond `MAX_FILES`, but none of the newest step."""
    files = sorted(folder.glob("step-*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for path in files[: max(0, len(files) - MAX_FILES)]:
        if path not in newest:
            path.unlink(missing_ok=True)


def load_bad_batch(path: Path) -> BadBatch:
    """Read a file that `save_bad_batches` wrote.

    Raises:
        ValueError: it is another file.
    """
    if not path.is_file():
        raise ValueError(f"FILE={str(path)!r}: no such file; runs write them to {FOLDER}/ in their output_dir")
    return BadBatch.load(path)
