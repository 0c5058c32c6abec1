"""Records of learning steps on disk, which another implementation can replay: `python -m crosscheck` does."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..batch import TrainBatch, completion_lengths
from ..config.grpo import GRPOConfig

FOLDER = "batches"  # the folder of the records, in a run's output_dir


@dataclass
class Record:
    """A batch, and what belongs to it. Subclasses say what. All tensors lie in main memory."""

    batch: TrainBatch

    def save(self, path: Path) -> None:
        """Write a safetensors file: tensors under `field` or `field.name`, the other fields in its metadata."""
        tensors, words = {}, {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, TrainBatch):
                value = {f.name: getattr(value, f.name) for f in fields(value)}
            if isinstance(value, dict):
                tensors |= {f"{field.name}.{name}": v.contiguous() for name, v in value.items() if v is not None}
            elif isinstance(value, Tensor):
                tensors[field.name] = value.contiguous()
            else:
                words[field.name] = str(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        save_file(tensors, beside, words)
        os.replace(beside, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote. Fields that are no tensors are text.

        Raises:
            ValueError: the file is not such a record.
        """
        # a dict without tensors has left nothing in the file
        values: dict[str, Any] = {field.name: {} for field in fields(cls) if field.type == dict[str, Tensor]}
        try:
            with safe_open(path, framework="pt") as file:
                values |= file.metadata() or {}
                for name in file.keys():
                    field, dot, key = name.partition(".")
                    if dot:
                        values.setdefault(field, {})[key] = file.get_tensor(name)
                    else:
                        values[field] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
        missing = {field.name for field in fields(cls)} - set(values)
        if missing:
            raise ValueError(f"{path}: not a {cls.__name__}: it lacks {', '.join(sorted(missing))}")
        batch = values["batch"]
        batch.setdefault("lengths", completion_lengths(batch["completion_mask"]))  # early versions did not write them
        values["batch"] = TrainBatch(**batch)
        return cls(**{field.name: values[field.name] for field in fields(cls)})


@dataclass
class StepRecord(Record):
    """What went into a learning step, and what came out of its first pass."""

    lora: dict[str, Tensor]  # the adapter before the step, by parameter name
    logps: Tensor  # (B, C) float32, the policy's, 0 where masked
    loss: Tensor  # () float32: policy_loss + beta * kl_loss
    policy_loss: Tensor  # () float32
    kl_loss: Tensor  # () float32, without beta
    gradients: dict[str, Tensor]  # of the loss, before clipping, by parameter name
    learning_rate: float
    model_dtype: str  # of the base weights: "float32" or "bfloat16"

    def __post_init__(self) -> None:
        self.learning_rate = float(self.learning_rate)


def keep_step(
    model: nn.Module,
    batch: TrainBatch,
    parts: Sequence[dict[str, Tensor]],
    step: int,
    learning_rate: float,
    args: GRPOConfig,
) -> None:
    """Write the record of an optimizer step, from 1, into the run's folder; `parts` as for `record_step`."""
    record = record_step(model, batch, parts, learning_rate)
    if args.should_save:
        record.save(Path(args.output_dir) / FOLDER / f"step-{step:04}.safetensors")


def record_step(
    model: nn.Module, batch: TrainBatch, parts: Sequence[dict[str, Tensor]], learning_rate: float
) -> StepRecord:
    """Gather a step's record after a learning pass and before the optimizer steps.

    Args:
        parts: what `learn` returned.
    """
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}  # a vision tower has no gradients
    return StepRecord(
        batch=batch.in_main_memory(),
        lora={name: p.detach().cpu().clone() for name, p in trained.items()},
        logps=torch.cat([part["logps"] for part in parts]).cpu(),
        loss=sum(part["loss"].cpu() for part in parts),
        policy_loss=sum(part["policy_loss"].cpu() for part in parts),
        kl_loss=sum(part["kl_loss"].cpu() for part in parts),
        gradients={name: p.grad.cpu().clone() for name, p in trained.items()},
        learning_rate=learning_rate,
        model_dtype=str(next(p.dtype for p in model.parameters() if not p.requires_grad)).removeprefix("torch."),
    )
