"""Supervised fine-tuning: the data set's completions as a batch, learning from them, and their loss at evaluation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..data.prompts import Collator
from ..data.rows import Row
from ..runtime import device, processes
from .logprobs import token_logps
from .step import micro_batches


def sft_batch(inputs: dict[str, Any], num_tokens: int) -> TrainBatch:
    """What `Collator` made of rows with completions, on the device: one completion a prompt (G = 1, B = N).

    The loss is -sum(logps * token_weights): every token weighs the same, those of prompts nothing. It is this batch's
    share of the mean over `num_tokens`: all that the optimizer step learns from, in accumulated batches and in other
    processes too.
    """
    tensors = {name: value.to(device.torch_device()) for name, value in inputs.items() if name != "rows"}
    mask = tensors["completion_mask"]
    weights = mask.float() / max(num_tokens, 1)
    return TrainBatch(**tensors, advantages=torch.zeros(len(mask), device=mask.device), token_weights=weights)


def learn_completions(
    model: nn.Module, batch: TrainBatch, args: GRPOConfig, backward: Callable[[Tensor], None]
) -> Tensor:
    """Forward and backward of each micro-batch of an `sft_batch`; `backward` as for `learn`. Returns the loss, ()."""
    total = torch.zeros((), device=args.device)
    for part in micro_batches(batch, args):
        logps, _ = token_logps(model, part, share_prefix=not args.gradient_checkpointing)
        loss = -(logps * part.token_weights).sum()
        backward(loss)
        total += loss.detach()
        device.sync()
    return total


@torch.no_grad()
def completion_loss(model: nn.Module, rows: Sequence[Row], collator: Collator, batch_size: int) -> float:
    """The mean loss, in nats, of all completion tokens of rows (from `prepare_rows`, with completions).

    Each process takes a part of the rows; all of them get the mean over all rows.
    """
    model.eval()
    total, tokens = 0.0, 0
    mine = rows[processes.own_part(len(rows))]
    for start in range(0, len(mine), batch_size):
        part = list(mine[start : start + batch_size])
        batch = sft_batch(collator(part + [part[-1]] * (batch_size - len(part))), 1)  # one shape for all
        logps, _ = token_logps(model, batch)
        total -= float(logps[: len(part)].sum())
        tokens += int(batch.completion_mask[: len(part)].sum())
    return sum(processes.gather(total)) / sum(processes.gather(tokens))
