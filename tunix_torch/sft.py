"""Supervised fine-tuning: the data set's completions as a batch, and their loss at evaluation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from . import device
from .batch import TrainBatch
from .data import Collator, Row
from .logprobs import token_logps


def sft_batch(inputs: dict[str, Any], num_tokens: int) -> TrainBatch:
    """What `Collator` made of rows with completions, on the device: one completion a prompt (G = 1, B = N).

    The loss is -sum(logps * token_weights): every token weighs the same, those of prompts nothing. It is the mean over
    `num_tokens`: all that are learnt from in this step, those of other processes too.
    """
    tensors = {name: value.to(device.torch_device()) for name, value in inputs.items() if name != "rows"}
    mask = tensors["completion_mask"]
    weights = mask.float() / max(num_tokens, 1)
    return TrainBatch(**tensors, advantages=torch.zeros(len(mask), device=mask.device), token_weights=weights)


@torch.no_grad()
def completion_loss(model: nn.Module, rows: Sequence[Row], collator: Collator, batch_size: int) -> tuple[float, int]:
    """The loss of all completion tokens of rows (from `prepare_rows`, with completions): its sum in nats, and their
    number."""
    model.eval()
    total, tokens = 0.0, 0
    for start in range(0, len(rows), batch_size):
        part = list(rows[start : start + batch_size])
        batch = sft_batch(collator(part + [part[-1]] * (batch_size - len(part))), 1)  # one shape for all
        logps, _ = token_logps(model, batch)
        total -= float(logps[: len(part)].sum())
        tokens += int(batch.completion_mask[: len(part)].sum())
    return total, tokens
