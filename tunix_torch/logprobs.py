"""Log-probabilities of completions, (B, C), without ever holding (B, C, vocabulary) logits."""

import torch
from torch import Tensor, nn

from . import device
from .attention import PrefixCache, attention_masks, prompt_positions
from .batch import TrainBatch
from .model import base_model, hidden_states, logits, prefill, text_config

LOGITS_AT_ONCE = 2**25  # numbers of one chunk of logits: 128 MiB in float32


def token_logps(
    model: nn.Module, batch: TrainBatch, temperature: float = 1.0, share_prefix: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probability of every completion token under softmax(logits / temperature), differentiable.

    Each prompt is computed once and its KV cache expanded to the group, which is exact, gradients included.
    The head is applied to chunks of tokens and recomputed in the backward pass.

    Args:
        batch: its ids and masks are read.
        temperature: > 0; the sampling temperature (google-tunix scales old, reference and policy alike).
        share_prefix: False computes every row's prompt and completion in one plain pass, without a cache.

    Returns:
        logps (B, C) float32, 0 where masked; entropy (B, C) float32 in nats, without gradient, 0 where masked.
    """
    completion_states = _shared_prefix_states if share_prefix else _plain_states
    hidden = completion_states(model, batch)  # (B, C, D)
    num_rows = batch.completion_ids.shape[0]
    vocabulary = base_model(model).get_output_embeddings().weight.shape[0]
    # Whole columns, so that on a mesh each device keeps its rows; a chunk is spread over all devices.
    columns = max(1, LOGITS_AT_ONCE * device.axis_size("fsdp") * device.axis_size("tp") // (num_rows * vocabulary))

    def score(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logps = torch.log_softmax(logits(model, hidden) / temperature, dim=-1)  # (B, columns, V)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, ids[..., None])[..., 0], entropy

    chunks = [
        device.checkpoint(score, h.contiguous(), i) if torch.is_grad_enabled() else score(h.contiguous(), i)
        for h, i in zip(hidden.split(columns, 1), batch.completion_ids.split(columns, 1), strict=True)
    ]
    logps, entropy = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))  # (B, C)
    mask = batch.completion_mask
    return logps.masked_fill(~mask, 0.0), entropy.detach().masked_fill(~mask, 0.0)


def _shared_prefix_states(model: nn.Module, batch: TrainBatch) -> Tensor:
    """Hidden states that predict each completion token, (B, C, D): one pass over N prompts, one over B completions."""
    group_size = batch.completion_ids.shape[0] // batch.prompt_ids.shape[0]
    last_hidden, prefix = prefill(model, batch.prompt_ids, batch.prompt_mask)
    first = last_hidden.repeat_interleave(group_size, dim=0)[:, None]  # predicts the first completion token
    inputs = batch.completion_ids[:, :-1]  # the last token predicts nothing that is asked for
    if inputs.shape[1] == 0:
        return first
    prompt_mask = batch.prompt_mask.repeat_interleave(group_size, dim=0)
    prompt_width = prompt_mask.shape[1]
    key_mask = nn.functional.pad(prompt_mask, (0, inputs.shape[1]), value=True)
    offsets = torch.arange(inputs.shape[1], device=inputs.device)
    masks = attention_masks(text_config(model), key_mask, prompt_width + offsets, base_model(model).dtype)
    positions = prompt_mask.sum(-1, keepdim=True) + offsets
    hidden = hidden_states(model, inputs, masks, positions, prefix.expand(group_size))
    return torch.cat((first, hidden), dim=1)


def _plain_states(model: nn.Module, batch: TrainBatch) -> Tensor:
    """The same in one pass over whole rows, prompt and completion; needed by gradient checkpointing of layers."""
    group_size = batch.completion_ids.shape[0] // batch.prompt_ids.shape[0]
    prompt_ids = batch.prompt_ids.repeat_interleave(group_size, dim=0)
    prompt_mask = batch.prompt_mask.repeat_interleave(group_size, dim=0)
    ids = torch.cat((prompt_ids, batch.completion_ids), dim=1)
    mask = nn.functional.pad(prompt_mask, (0, batch.completion_ids.shape[1]), value=True)
    slots = torch.arange(ids.shape[1], device=ids.device)
    masks = attention_masks(text_config(model), mask, slots, base_model(model).dtype)
    hidden = hidden_states(model, ids, masks, prompt_positions(mask), PrefixCache())
    return hidden[:, prompt_ids.shape[1] - 1 : -1]
