"""Finds, row by row, the first quantity of a batch that is not finite when the batch is computed again."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import IN_MAIN_MEMORY, TrainBatch
from ..config.grpo import GRPOConfig
from ..model.forward import reference_policy
from ..model.teacher import Teacher
from .bad_batches import BadBatch
from .logprobs import token_logps
from .pairs import logps_of_pairs, pair_numbers
from .passes import Pass, lay_out_packs, plain_rows
from .step import learn_micro_batch

GIVEN = ("advantages", "token_weights", "old_per_token_logps", "ref_per_token_logps", "sampler_logps")


@dataclass
class Row:
    """What came of one row of a batch; of preference pairs, of the two rows of one pair."""

    number: int  # from 0
    first: str | None  # the first quantity that is not finite; None: all are
    loss: float  # its share of the batch's
    norm: float  # of its gradient


def look_at_rows(
    model: nn.Module, record: BadBatch, args: GRPOConfig, teacher: Teacher | None, device: torch.device
) -> Iterator[Row]:
    """Compute each row of a batch by itself, forward and backward, and watch every quantity on the way.

    Args:
        model: with the weights that it had before the step, on `device`.
        args: the settings of the run.

    Returns:
        rows, each as soon as it is computed. The gradients of the model are left empty.
    """
    for number, part in enumerate(_parts(record, device)):
        yield _look_at(model, part, record.kind, args, teacher, number)


def _parts(record: BadBatch, device: torch.device) -> list[Pass]:
    """One pass for each row of a batch; for preference pairs, for each pair."""
    columns = {name: value for name, value in vars(record.batch).items() if value is not None}
    batch = TrainBatch(**{name: v if name in IN_MAIN_MEMORY else v.to(device) for name, v in columns.items()})
    if record.layout:
        return lay_out_packs(batch, **{name: v.to(device) for name, v in record.layout.items()}, rows_per_pass=1)
    return [plain_rows(part) for part in batch.split(2 if record.kind == "pairs" else 1)]


def _look_at(model: nn.Module, part: Pass, kind: str, args: GRPOConfig, teacher: Teacher | None, number: int) -> Row:
    given = {name: getattr(part.batch, name) for name in GIVEN}
    found = [f"{name}, as given" for name, value in given.items() if value is not None and not _finite(value)]
    losses: list[Tensor] = []

    def backward(loss: Tensor) -> None:
        losses.append(loss.detach())
        if not _finite(loss):
            found.append("the loss")
        loss.backward()

    model.zero_grad()
    with _watched(model, found):
        logps = _compute(model, part, kind, args, teacher, backward)
    if found and found[0] == "the loss" and not _finite(logps):
        token = int((~torch.isfinite(logps)).flatten().int().argmax())
        found[0] = f"the log-probability of completion token {token % logps.shape[1]}"
    gradients = [p.grad.float().square().sum() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    norm = math.sqrt(float(sum(gradients, torch.zeros(())))) if gradients else 0.0
    return Row(number, found[0] if found else None, float(losses[0]), norm)


def _compute(
    model: nn.Module, part: Pass, kind: str, args: GRPOConfig, teacher: Teacher | None, backward: Any
) -> Tensor:
    """Forward and backward of one row. Returns its log-probabilities, (B, C)."""
    if kind == "pairs" and args.needs_reference:  # it is no part of the file
        with reference_policy(model):
            part.batch.ref_per_token_logps = logps_of_pairs(model, part.batch, args)
    model.train()
    if kind == "grpo":
        return learn_micro_batch(model, part, args, backward, teacher)["logps"]
    logps, _ = token_logps(model, part)
    loss = pair_numbers(logps, part.batch, args)[0] if kind == "pairs" else -(logps * part.batch.token_weights).sum()
    backward(loss)
    return logps.detach()


@contextlib.contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Within this context, add to `found` what is not finite: outputs of modules and gradients, as they come."""

    def watch_output(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(_finite(tensor) for tensor in _tensors(output)):
                found.append(f"the output of {name}")

        return look

    def watch_gradient(name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if not _finite(gradient):
                found.append(f"the gradient of {name}")

        return look

    hooks = [module.register_forward_hook(watch_output(name)) for name, module in model.named_modules() if name]
    hooks += [p.register_hook(watch_gradient(name)) for name, p in model.named_parameters() if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, tuple | list) else []


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach()).all())
