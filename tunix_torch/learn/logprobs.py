"""Log-probabilities of completions, (B, C), without ever holding (B, C, vocabulary) logits."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..model.attention import attention_masks, continuation_masks, prompt_positions, segment_masks
from ..model.caches import PrefixCache
from ..model.forward import base_model, hidden_states, logits, prefill, text_config
from ..runtime import device, mesh
from .passes import Block, Pass

LOGITS_AT_ONCE = 2**25  # numbers in one chunk of logits, which take 128 MiB in float32


def token_logps(
    model: nn.Module, rows: Pass, temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of every completion token under softmax(logits / temperature), differentiable.

    The head is applied to chunks of tokens, see `in_chunks`.

    Args:
        rows: a micro-batch and how it is laid out, which changes the results by rounding only.
        temperature: > 0; the sampling temperature (google-tunix scales old, reference and policy alike).
        entropy_gradient: the entropy has a gradient too, which an entropy bonus needs.

    Returns:
        logps (B, C) float32, 0 where masked; entropy (B, C) float32 in nats, 0 where masked.
    """
    hidden, ids = token_states(model, rows)

    def score(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return scores_of(torch.log_softmax(logits(model, hidden) / temperature, dim=-1), ids, entropy_gradient)

    logps, entropy = in_chunks(model, rows, score, (hidden, ids))
    return logps, entropy if entropy_gradient else entropy.detach()


def scores_of(logps: Tensor, ids: Tensor, entropy_gradient: bool) -> tuple[Tensor, Tensor]:
    """Of the log-probabilities of all tokens, (..., V), those of the tokens `ids`, (...), and the entropy, (...)."""
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, ids[..., None])[..., 0], entropy


def in_chunks(
    model: nn.Module, rows: Pass, score: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], num_heads: int = 1
) -> list[Tensor]:
    """Call `score` for one chunk of tokens after the other, so that few logits are held at a time.

    Where there is a gradient, chunks are computed again in the backward pass.

    Args:
        inputs: tensors of a pass from `token_states`, hidden states (R, W, D) and at last the tokens (R, W).
        score: gets a chunk of each of the inputs, and returns tensors that are shaped as the tokens.
        num_heads: how many logits of a token it holds at a time.

    Returns:
        what `score` returned, each (B, C) in the places of the tokens, and 0 where masked.
    """
    *hidden, ids = inputs
    vocabulary = base_model(model).get_output_embeddings().weight.shape[0]
    # A chunk has whole columns, so that on a mesh each device keeps its rows. It is spread over all devices.
    at_once = LOGITS_AT_ONCE // num_heads * mesh.axis_size("fsdp") * mesh.axis_size("tp")
    columns = max(1, at_once // (len(ids) * vocabulary))
    parts = zip(*(states.split(columns, 1) for states in hidden), ids.split(columns, 1), strict=True)
    chunks = []
    for *states, tokens in parts:
        chunk = *(part.contiguous() for part in states), tokens
        chunks.append(device.recomputed(score, *chunk) if torch.is_grad_enabled() else score(*chunk))
    results = [torch.cat(of_chunks, dim=1) for of_chunks in zip(*chunks, strict=True)]
    return [rows.in_place(result).masked_fill(~rows.batch.completion_mask, 0.0) for result in results]


def token_states(model: nn.Module, rows: Pass) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the tokens of a pass, and those tokens.

    Returns:
        states (R, W, D) and ids (R, W) of a block that is kept whole; else those that are kept, of all blocks, as one
        row: (1, K, D) and (1, K).
    """
    batch, states, ids = rows.batch, [], []
    prefilled = prefill(model, batch.prompt_ids, batch.prompt_mask) if rows.shares_prompts else None
    for block in rows.blocks:
        of_block = rows.ids_of(block)
        if block.segments is not None and prefilled is None:
            hidden = _states_of_packs(model, block, of_block)
        elif prefilled is None:
            hidden = _states_of_rows(model, rows, block, of_block)
        else:
            hidden = _states_after(model, rows, block, of_block, *prefilled)
        if block.kept is None:
            assert len(rows.blocks) == 1, "of several blocks it must be said which tokens are kept"
            return hidden, of_block
        states.append(hidden.flatten(0, 1)[block.kept])
        ids.append(of_block.flatten()[block.kept])
    return torch.cat(states)[None], torch.cat(ids)[None]


def _states_of_rows(model: nn.Module, rows: Pass, block: Block, ids: Tensor) -> Tensor:
    """The hidden states that predict the tokens `ids` (R, W) of a block whose rows hold their prompts: (R, W, D)."""
    prompt_mask = block.by_row(rows.batch.prompt_mask)  # (R, P)
    inputs = torch.cat((block.by_row(rows.batch.prompt_ids), ids), dim=1)  # (R, P + W)
    mask = nn.functional.pad(prompt_mask, (0, ids.shape[1]), value=True)
    slots = torch.arange(inputs.shape[1], device=ids.device)
    masks = attention_masks(text_config(model), mask, slots, base_model(model).dtype)
    hidden = hidden_states(model, inputs, masks, prompt_positions(mask), cache=None)
    return hidden[:, prompt_mask.shape[1] - 1 : -1]


def _states_of_packs(model: nn.Module, block: Block, ids: Tensor) -> Tensor:
    """The hidden states that predict the tokens `ids` (R, W) of a block whose rows hold whole texts: (R, W, D).

    Nothing predicts the first token of a text. What stands there belongs to another text, and has no weight.
    """
    masks = segment_masks(text_config(model), block.segments, base_model(model).dtype)
    hidden = hidden_states(model, ids, masks, block.offsets, cache=None)
    return torch.cat((hidden[:, :1], hidden[:, :-1]), dim=1)


def _states_after(
    model: nn.Module, rows: Pass, block: Block, ids: Tensor, last_hidden: Tensor, prefix: PrefixCache
) -> Tensor:
    """The hidden states that predict the tokens `ids` (R, W) of a block whose rows continue a KV cache: (R, W, D).

    Args:
        last_hidden, prefix: what `prefill` returned for the N prompts.
    """
    first = block.by_row(last_hidden)[:, None]  # (R, 1, D), which predicts the first token of a completion
    inputs = ids[:, :-1]  # the last token predicts nothing that is asked for
    if inputs.shape[1] == 0:
        return first
    prompts, segments, offsets = block.prompts, block.segments, block.offsets
    cache = prefix.expand(prompts) if isinstance(prompts, int) else prefix.take(prompts)
    prompt_mask = block.by_row(rows.batch.prompt_mask)  # (R, P)
    if segments is None:
        places = torch.arange(inputs.shape[1], device=ids.device)
    else:
        places, segments = offsets[:, :-1], segments[:, :-1]
    masks = continuation_masks(text_config(model), prompt_mask, places, segments, base_model(model).dtype)
    positions = prompt_mask.sum(-1, keepdim=True) + places
    hidden = torch.cat((first, hidden_states(model, inputs, masks, positions, cache)), dim=1)
    return hidden if segments is None else torch.where((offsets == 0)[..., None], first, hidden)
