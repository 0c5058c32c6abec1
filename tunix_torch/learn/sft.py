"""Supervised fine-tuning: the data set's completions as a batch, learning from them, and their loss at evaluation."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import TrainBatch, completion_lengths
from ..config.grpo import GRPOConfig
from ..data.batches import Collator
from ..data.rows import Row
from ..model.decoding import with_fast_layers
from ..model.forward import base_model
from ..runtime import device, fsdp, together
from ..runtime.profiling import span
from .logprobs import token_logps
from .passes import Pass, in_passes, lay_out_packs, plain_rows, shared_prompts

LAYOUT = ("segments", "offsets")  # what a batch of packs has besides the fields of a `TrainBatch`


def sft_batch(inputs: dict[str, Any], num_tokens: int, place: torch.device | None = None) -> TrainBatch:
    """Make a batch of what `Collator` made of rows: each prompt has one completion (G = 1, B = N).

    The loss is -sum(logps * token_weights): every token that is learned weighs the same, and those of prompts and of
    other people's turns weigh nothing. It is this batch's share of the mean over `num_tokens`, which counts all tokens
    that the optimizer step learns: those of accumulated batches and of other processes too.

    Args:
        place: where its tensors are; None: on this process's device.
    """
    place = device.torch_device() if place is None else place
    lengths = completion_lengths(inputs["completion_mask"])
    others = ("rows", *LAYOUT)
    tensors = {name: value.to(place) for name, value in inputs.items() if name not in others}
    learned = tensors.pop("learned_mask")
    weights, none = learned.float() / max(num_tokens, 1), torch.zeros(len(learned), device=learned.device)
    return TrainBatch(**tensors, advantages=none, token_weights=weights, lengths=lengths)


@with_fast_layers
def learn_completions(
    model: nn.Module,
    batch: TrainBatch,
    args: GRPOConfig,
    backward: Callable[[Tensor], None],
    layout: dict[str, Tensor] | None = None,
) -> Tensor:
    """Run an `sft_batch` forward and backward in micro-batches, with `backward` as in `learn`; return the loss, ().

    Args:
        layout: `segments` and `offsets` of a batch of packs, (N, W) on the device; None: the rows are not packed.
    """
    total = torch.zeros((), device=args.device)

    def learn_pass(part: Pass) -> None:
        nonlocal total
        logps, _ = token_logps(model, part)
        loss = -(logps * part.batch.token_weights).sum()
        backward(loss)
        total += loss.detach()
        device.sync()

    if layout:
        for part in lay_out_packs(batch, **layout, rows_per_pass=args.micro_batch_size or None):
            learn_pass(part)
    else:
        in_passes(batch, args, learn_pass)
    return total


@with_fast_layers
@torch.no_grad()
def completion_loss(model: nn.Module, rows: Sequence[Row], collator: Collator, batch_size: int) -> float:
    """The mean loss, in nats, of all learned tokens of rows (from `prepare_rows`, with completions).

    Each process takes a part of the rows, and all of them return the mean over all rows.
    """
    model.eval()
    total, tokens = 0.0, 0
    lay_out = plain_rows if fsdp.is_split(base_model(model)) else shared_prompts
    for some in together.own_batches(len(rows), batch_size):
        part = list(rows[some])
        filled = part + [(part or rows)[-1]] * (batch_size - len(part))  # so that all have one shape
        batch = sft_batch(collator(filled), 1)
        logps, _ = token_logps(model, lay_out(batch))
        total -= float((logps * batch.token_weights)[: len(part)].sum())
        tokens += int(batch.token_weights[: len(part)].sum())
    return sum(together.gather(total)) / sum(together.gather(tokens))


def learn_rows(
    model: nn.Module,
    inputs: dict[str, Any],
    together_with: Sequence[dict[str, Any]],
    args: GRPOConfig,
    backward: Callable[[Tensor], None],
    sum_gradients: Callable[[], None],
) -> tuple[Tensor, dict[str, float]]:
    """Run one batch of rows with completions forward and backward.

    Args:
        inputs: what `Collator` made of the rows, or `PackCollator` of packs.
        together_with: all batches of the same optimizer step, this one among them.
        backward: as in `learn`.
        sum_gradients: is called when the batch has been learned from.

    Returns:
        the batch's share of the step's loss, (), scaled so that the mean over processes is the loss; and metrics.
    """
    started = time.perf_counter()
    with span("learning"):
        model.train()
        counts = {"step": sum(int(batch["learned_mask"].sum()) for batch in together_with)}
        tokens = together.sum_numbers(counts | {"batch": int(inputs["completion_mask"].sum())})
        layout = {name: inputs[name].to(device.torch_device()) for name in LAYOUT if name in inputs}
        loss = learn_completions(model, sft_batch(inputs, tokens["step"]), args, backward, layout)
        sum_gradients()
        device.wait()  # so that the seconds of learning are those that it takes
    seconds = time.perf_counter() - started
    return loss * together.count(), {"learning_tokens_per_second": tokens["batch"] / seconds}
