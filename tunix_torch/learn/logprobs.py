"""Log-probabilities of completions, (B, C), without ever holding (B, C, vocabulary) logits."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..batch import TrainBatch
from ..model.attention import PrefixCache, attention_masks, packed_masks, prompt_positions
from ..model.forward import base_model, hidden_states, logits, prefill, text_config
from ..runtime import device, mesh

_SHORT = 16  # tokens: shorter completions are not told apart
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
    shape, ids, places = batch.completion_ids.shape, batch.completion_ids, None
    if not share_prefix:
        assert batch.packing is None, "completions are packed beside a prompt that they share"
        hidden = _plain_states(model, batch)
    elif batch.packing is not None:
        hidden, ids = _packed_states(model, batch)
    else:
        hidden, places = _shared_prefix_states(model, batch)
        ids = ids if places is None else ids.flatten()[places][None]  # as hidden, but for D
    vocabulary = base_model(model).get_output_embeddings().weight.shape[0]
    # Whole columns, so that on a mesh each device keeps its rows; a chunk is spread over all devices.
    columns = max(1, LOGITS_AT_ONCE * mesh.axis_size("fsdp") * mesh.axis_size("tp") // (len(ids) * vocabulary))

    def score(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logps = torch.log_softmax(logits(model, hidden) / temperature, dim=-1)  # (B, columns, V)
        with torch.no_grad():
            entropy = -(logps.exp() * logps).sum(-1)
        return logps.gather(-1, ids[..., None])[..., 0], entropy

    chunks = [
        device.recomputed(score, h.contiguous(), i) if torch.is_grad_enabled() else score(h.contiguous(), i)
        for h, i in zip(hidden.split(columns, 1), ids.split(columns, 1), strict=True)
    ]
    values = [torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True)]  # logps and entropy, as ids
    if places is not None:
        values = [value.new_zeros(shape.numel()).index_put((places,), value[0]).view(shape) for value in values]
    if batch.packing is not None:
        values = [_unpacked(value, batch) for value in values]
    logps, entropy = (value.masked_fill(~batch.completion_mask, 0.0) for value in values)
    return logps, entropy.detach()


def _shared_prefix_states(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor | None]:
    """Hidden states that predict completion tokens: one pass over N prompts, then passes over completions.

    Returns:
        on XLA: states (B, C, D) of all tokens, and None. Elsewhere: those that the mask keeps, (1, T, D), computed for
        rows of similar length together, so that padding costs little, and (T,) int64, to which of the B * C tokens,
        counted row by row, each belongs.
    """
    (num_rows, width), num_prompts = batch.completion_ids.shape, batch.prompt_ids.shape[0]
    group_size = num_rows // num_prompts
    last_hidden, prefix = prefill(model, batch.prompt_ids, batch.prompt_mask)
    if device.KIND == "xla":
        first = last_hidden.repeat_interleave(group_size, dim=0)
        prompt_mask = batch.prompt_mask.repeat_interleave(group_size, dim=0)
        states = _states_after(model, first, prefix.expand(group_size), prompt_mask, batch.completion_ids)
        return states, None
    states, places = [], []
    ends = batch.completion_mask * torch.arange(1, width + 1, device=last_hidden.device)  # (B, C)
    for bucket, bucket_width in length_buckets(ends.amax(dim=1).tolist()):
        rows = torch.tensor(bucket, device=last_hidden.device)
        prompts = rows // group_size
        ids, mask = batch.completion_ids[rows, :bucket_width], batch.completion_mask[rows, :bucket_width]
        hidden = _states_after(model, last_hidden[prompts], prefix.take(prompts), batch.prompt_mask[prompts], ids)
        states.append(hidden[mask])
        places.append((rows[:, None] * width + torch.arange(bucket_width, device=rows.device))[mask])
    return torch.cat(states)[None], torch.cat(places)


def _packed_states(model: nn.Module, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """One pass over N prompts, then one over bins, in which several completions of a prompt follow each other.

    Returns:
        states (N * bins, C, D) and the ids that they predict, (N * bins, C).
    """
    num_prompts, width = batch.prompt_ids.shape[0], batch.completion_ids.shape[1]
    num_bins = len(batch.packing) // num_prompts
    offsets = batch.packing % width
    rows = batch.packing - offsets  # a number a completion; by division it would be rounded, as XLA divides floats
    in_group = batch.packing.clamp(min=0).view(num_prompts, -1)
    ids = batch.completion_ids.view(num_prompts, -1).gather(1, in_group).view_as(batch.packing)
    last_hidden, prefix = prefill(model, batch.prompt_ids, batch.prompt_mask)
    first = last_hidden.repeat_interleave(num_bins, dim=0)[:, None]  # (N * bins, 1, D)
    prompt_mask = batch.prompt_mask.repeat_interleave(num_bins, dim=0)
    masks = packed_masks(text_config(model), prompt_mask, rows[:, :-1], offsets[:, :-1], base_model(model).dtype)
    positions = prompt_mask.sum(-1, keepdim=True) + offsets[:, :-1]
    hidden = hidden_states(model, ids[:, :-1], masks, positions, prefix.expand(num_bins))
    return torch.where((offsets == 0)[..., None], first, torch.cat((first, hidden), dim=1)), ids


def _unpacked(values: Tensor, batch: TrainBatch) -> Tensor:
    """What belongs to the tokens in bins, (N * bins, C), row by row: (B, C). At padding anything."""
    num_prompts, width = batch.prompt_ids.shape[0], values.shape[1]
    places = batch.starts[:, None] + torch.arange(width, device=values.device)  # (B, C), in the group's bins
    in_bins = values.view(num_prompts, -1)
    places = places.clamp(max=in_bins.shape[1] - 1).view(num_prompts, -1)
    return in_bins.gather(1, places).view(-1, width)


def _states_after(model: nn.Module, first: Tensor, prefix: PrefixCache, prompt_mask: Tensor, ids: Tensor) -> Tensor:
    """Hidden states that predict the completion tokens `ids` (R, C): (R, C, D).

    `first` (R, D) are those of each prompt's last token, which predict the first; `prompt_mask` is (R, P).
    """
    inputs = ids[:, :-1]  # the last token predicts nothing that is asked for
    if inputs.shape[1] == 0:
        return first[:, None]
    key_mask = nn.functional.pad(prompt_mask, (0, inputs.shape[1]), value=True)
    offsets = torch.arange(inputs.shape[1], device=inputs.device)
    masks = attention_masks(text_config(model), key_mask, prompt_mask.shape[1] + offsets, base_model(model).dtype)
    positions = prompt_mask.sum(-1, keepdim=True) + offsets
    hidden = hidden_states(model, inputs, masks, positions, prefix)
    return torch.cat((first[:, None], hidden), dim=1)


def length_buckets(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Rows of similar length together: (rows, the longest of them) for each bucket, longest first.

    A bucket's shortest row has more than 3/4 of its longest's tokens, or the whole bucket is short.
    """
    buckets: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not buckets or max(lengths[row], _SHORT) * 4 <= 3 * buckets[-1][1]:
            buckets.append(([], max(1, lengths[row])))
        buckets[-1][0].append(row)
    return buckets


def _plain_states(model: nn.Module, batch: TrainBatch) -> Tensor:
    """The same in one pass over whole rows, prompt and completion; needed by gradient checkpointing of layers."""
    group_size = batch.completion_ids.shape[0] // batch.prompt_ids.shape[0]
    prompt_ids = batch.prompt_ids.repeat_interleave(group_size, dim=0)
    prompt_mask = batch.prompt_mask.repeat_interleave(group_size, dim=0)
    ids = torch.cat((prompt_ids, batch.completion_ids), dim=1)
    mask = nn.functional.pad(prompt_mask, (0, batch.completion_ids.shape[1]), value=True)
    slots = torch.arange(ids.shape[1], device=ids.device)
    masks = attention_masks(text_config(model), mask, slots, base_model(model).dtype)
    hidden = hidden_states(model, ids, masks, prompt_positions(mask), cache=None)
    return hidden[:, prompt_ids.shape[1] - 1 : -1]
