"""Masks and position ids for left-padded prompts, and the attention functions that Hugging Face models call here.

A *slot* is a column of the key axis. Prompts are left-padded and completions start at slot P, so the distance of two
tokens in slots equals their distance in positions, and both causality and the sliding window can be read off slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..runtime import device
from ..runtime.products import float32_product

# The names by which models take the two forms of attention, and that of this process.
GROUPED = "tunix_grouped"
SDPA = "tunix_sdpa"
ATTENTION = GROUPED if device.traces_graphs() else SDPA


def use_own_attention(model: PreTrainedModel) -> None:
    """Have a Hugging Face model compute attention by the functions of this file.

    Raises:
        ValueError: it has an attention of its own.
    """
    model.set_attn_implementation(ATTENTION)
    config = model.config.get_text_config()
    if config._attn_implementation != ATTENTION:
        raise ValueError(
            f"model_type={config.model_type!r}: its attention can't take the form that sampling needs; use a Gemma, "
            "or another model on Transformers' AttentionInterface"
        )


def prompt_positions(prompt_mask: Tensor) -> Tensor:
    """Position ids of left-padded prompts: 0 at the first real token (and at padding). (N, P) bool -> (N, P) int64."""
    return (prompt_mask.long().cumsum(-1) - 1).clamp(min=0)


def attention_masks(
    config: PretrainedConfig, key_mask: Tensor, query_slots: Tensor, dtype: torch.dtype
) -> dict[str, Tensor] | Tensor:
    """Masks in the form that a Hugging Face decoder takes without computing its own (which would sync the host).

    Args:
        config: the text model's config; `layer_types`, `sliding_window` and `_attn_implementation` are read.
        key_mask: (R, K) bool, False at padding.
        query_slots: (Q,) int64, the slot of each query.
        dtype: of the additive mask, used with eager attention.

    Returns:
        `{"full_attention": m, "sliding_attention": s}` for models with layer types, else one mask. Each (R, 1, Q, K):
        bool (True: may look), or, with eager attention, additive (0 or the smallest number of `dtype`).
        A token may always look at itself, so no row of the softmax is empty, not even at padding.
    """
    key_slots = torch.arange(key_mask.shape[1], device=key_mask.device)
    distance = query_slots[:, None] - key_slots[None, :]  # (Q, K)
    full = ((distance >= 0) & (key_mask[:, None, :] | (distance == 0)))[:, None]  # (R, 1, Q, K)
    return mask_per_layer_kind(config, full, distance, dtype)


def continuation_masks(
    config: PretrainedConfig, prompt_mask: Tensor, offsets: Tensor, segments: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor] | Tensor:
    """As `attention_masks`, for K tokens that follow a prompt whose keys are in a cache.

    Args:
        prompt_mask: (R, P) bool, False at padding.
        offsets: the place of each token in its completion: (K,) int64, or (R, K) with segments.
        segments: (R, K) int64, the completion of each token, where several lie in one row, one after the other; None:
            each row is one completion.

    Returns:
        masks (R, 1, K, P + K): a token may look at its prompt, at tokens of its own completion before it, and itself.
    """
    width = prompt_mask.shape[1]
    if segments is None:
        key_mask = nn.functional.pad(prompt_mask, (0, len(offsets)), value=True)
        return attention_masks(config, key_mask, width + offsets, dtype)
    slots = torch.arange(segments.shape[1], device=segments.device)
    between = (slots[:, None] - slots).expand(len(segments), -1, -1)  # (R, K, K)
    from_prompt = width + offsets[:, :, None] - torch.arange(width, device=segments.device)  # (R, K, P)
    own = (between >= 0) & (segments[:, :, None] == segments[:, None, :])
    full = torch.cat((prompt_mask[:, None].expand_as(from_prompt), own), dim=2)[:, None]
    return mask_per_layer_kind(config, full, torch.cat((from_prompt, between), dim=2)[:, None], dtype)


def segment_masks(config: PretrainedConfig, segments: Tensor, dtype: torch.dtype) -> dict[str, Tensor] | Tensor:
    """As `attention_masks`, for rows that hold several texts one after the other, with nothing before them.

    Args:
        segments: (R, K) int64, the text of each token.

    Returns:
        masks (R, 1, K, K): a token may look at the tokens of its own text before it, and itself.
    """
    slots = torch.arange(segments.shape[1], device=segments.device)
    between = slots[:, None] - slots  # (K, K)
    full = ((between >= 0) & (segments[:, :, None] == segments[:, None, :]))[:, None]
    return mask_per_layer_kind(config, full, between, dtype)


def mask_per_layer_kind(
    config: PretrainedConfig, full: Tensor, distance: Tensor, dtype: torch.dtype
) -> dict[str, Tensor] | Tensor:
    """The mask of each kind of layer, from the mask without windows and the distance of each query from each key."""
    window = getattr(config, "sliding_window", None)
    sliding = full if window is None else full & (distance < window)

    def finish(mask: Tensor) -> Tensor:
        if config._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    if getattr(config, "layer_types", None) is None:
        return finish(sliding)
    return {"full_attention": finish(full), "sliding_attention": finish(sliding)}


def layer_windows(config: PretrainedConfig) -> list[int | None]:
    """For each layer, how many tokens a token may attend to, itself included. None means all before it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def kept_tokens(window: int | None, num_prompt: int, num_own: int) -> tuple[int, int]:
    """How many of a prompt's tokens, and of a completion's own, a layer keeps while completions are decoded."""
    return (num_prompt, num_own) if window is None else (min(num_prompt, max(1, window - 1)), min(num_own, window))


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: "Tensor | SharedPrefixKV",
    value: "Tensor | SharedPrefixKV",
    attention_mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention in which the query heads of one KV head stay together: keys and values are not repeated for each.

    On a mesh it is also the form that XLA can split over rows and heads at once. The usual one flattens rows and heads
    into one dimension of a batched product, which has no such layout, so that whole KV caches were gathered.

    Args:
        query: (R, heads, Q, head dim); key, value: (R, KV heads, K, head dim), or see `shared_prefix_attention`.
        attention_mask: (R, 1, Q, K) bool, True: may look.
        softcap: scores s become tanh(s / softcap) * softcap (Gemma 2).

    Returns:
        (R, Q, heads, head dim) and None; the signature is that of Transformers' attention functions.
    """
    assert others.get("s_aux") is None, "attention sinks are not computed here"
    if isinstance(key, SharedPrefixKV):
        return shared_prefix_attention(query, key, attention_mask, scaling, softcap), None
    rows, heads, num_queries, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, num_queries, head_dim)  # (R, KV heads, heads / KV heads, Q, D)
    if device.traces_graphs() or query.dtype == torch.float32:
        scores = torch.einsum("rhgqd,rhkd->rhgqk", grouped.float(), key.float()) * scaling
    else:
        scores = float32_product(grouped.flatten(2, 3), key.mT).view(*grouped.shape[:4], -1) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(torch.float32).min)
    weights = nn.functional.dropout(scores.softmax(dim=-1), dropout, module.training)
    if device.traces_graphs() or query.dtype == torch.float32:
        mixed = torch.einsum("rhgqk,rhkd->rhgqd", weights.to(query.dtype), value)
    else:
        mixed = float32_product(weights.flatten(2, 3), value).to(query.dtype)
    return mixed.reshape(rows, heads, num_queries, head_dim).transpose(1, 2).contiguous(), None


def attention_by_sdpa(
    module: nn.Module,
    query: Tensor,
    key: "Tensor | SharedPrefixKV",
    value: "Tensor | SharedPrefixKV",
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Transformers' sdpa, except with a soft-cap or a `SharedPrefixKV`, which sdpa can't compute."""
    assert kwargs.get("s_aux") is None, "attention sinks are not computed here"
    if softcap is not None or isinstance(key, SharedPrefixKV):
        return grouped_attention(module, query, key, value, attention_mask, scaling, dropout, softcap)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def shared_prefix_attention(
    query: Tensor, kv: "SharedPrefixKV", attention_mask: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """One query a row, (R, heads, 1, D), looks at its prompt's keys, which its group shares, and at the row's own.

    `attention_mask`: (R, 1, 1, P + K), as if each row had its prompt's keys before its own. Returns (R, 1, heads, D).
    """
    rows, heads, _, head_dim = query.shape
    grouped = query.reshape(rows, kv.own_keys.shape[1], -1, head_dim)  # (R, KV heads, heads / KV heads, D)
    scores = kv.scores(grouped) * scaling  # (R, KV heads, heads / KV heads, P + K)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill_(~attention_mask, torch.finfo(torch.float32).min)
    return kv.mix(scores.softmax(dim=-1)).to(query.dtype).reshape(rows, 1, heads, -1)


def _whole_mask(*args: object, **kwargs: object) -> Tensor:
    """Transformers' mask for calls that bring none of their own, written out even where it is plainly causal."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


for _name, _function in ((GROUPED, grouped_attention), (SDPA, attention_by_sdpa)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _whole_mask)


@dataclass
class SharedPrefixKV:
    """One layer's keys and values, while rows are decoded: those of N prompts, once each, and those of R rows.

    prompt_keys, prompt_values: (N, KV heads, P, D); own_keys, own_values: (R, KV heads, K, D).
    `places`: (R,) int64, the place of each row where every prompt has `group_size` rows; None: rows fill all of them.
    `new_key`, `new_value`: (R, KV heads, 1, D) of the token itself; None: they are among the rows' own already.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor
    places: Tensor | None
    group_size: int
    new_key: Tensor | None = None
    new_value: Tensor | None = None

    def to(self, place: torch.device) -> "SharedPrefixKV":
        """Return itself. Gemma 4 calls this where layers share keys and values, which are on one device already."""
        assert self.own_keys.device == place, place
        return self

    def scores(self, query: Tensor) -> Tensor:
        """Products of M queries a row and KV head with all keys: (R, KV heads, M, D) -> (R, KV heads, M, P + K).

        They are float32. Where graphs are traced the compiler widens keys as it reads them, and keeps no wide copy.

        With a `new_key`, its products come last: (R, KV heads, M, P + K + 1).
        """
        if self.prompt_keys.shape[2] == 0:  # the window has left the prompt
            return float32_product(query, self.own_keys.mT)
        if device.traces_graphs():  # no dimensions are merged, since a mesh may split each (see `grouped_attention`)
            in_groups = query.unflatten(0, (-1, self.group_size))
            of_prompt = torch.einsum("nghmd,nhpd->nghmp", in_groups.float(), self.prompt_keys.float()).flatten(0, 1)
            of_row = torch.einsum(
                "rhkd,rhmd->rhkm", self.own_keys.float(), query.float()
            ).mT  # in this order XLA:CPU need not transpose keys
        else:  # where einsum would be slower
            of_prompt = self.by_row(float32_product(self.by_prompt(query), self.prompt_keys.mT))
            of_row = float32_product(query, self.own_keys.mT)
        if self.new_key is None:
            return torch.cat((of_prompt, of_row), dim=-1)
        return torch.cat(
            (of_prompt, of_row, torch.einsum("rhmd,rhkd->rhmk", query.float(), self.new_key.float())), dim=-1
        )

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of all values, weighted: (R, KV heads, M, P + K), see `scores` -> (R, KV heads, M, D) float32."""
        if self.prompt_keys.shape[2] == 0:
            return float32_product(weights, self.own_values)
        if self.new_value is not None:
            weights, of_new = weights.tensor_split([-1], dim=-1)
            return self._mix(weights) + of_new * self.new_value
        return self._mix(weights)

    def _mix(self, weights: Tensor) -> Tensor:
        of_prompt, of_row = weights.tensor_split([self.prompt_keys.shape[2]], dim=-1)
        if device.traces_graphs():
            in_groups = of_prompt.unflatten(0, (-1, self.group_size))
            mixed = torch.einsum("nghmp,nhpd->nghmd", in_groups, self.prompt_values.float()).flatten(0, 1)
            return mixed + torch.einsum("rhmk,rhkd->rhmd", of_row, self.own_values.float())
        of_prompt = self.by_row(float32_product(self.by_prompt(of_prompt), self.prompt_values))
        return of_prompt + float32_product(of_row, self.own_values)

    def by_prompt(self, x: Tensor) -> Tensor:
        """Rows of a prompt side by side, zeros where one is missing: (R, KV heads, M, E) -> (N, KV heads, G * M, E)."""
        _, heads, m, e = x.shape
        num_prompts = len(self.prompt_keys)
        if self.places is not None:
            x = x.new_zeros(num_prompts * self.group_size, heads, m, e).index_copy_(0, self.places, x)
        return x.view(num_prompts, self.group_size, heads, m, e).transpose(1, 2).reshape(num_prompts, heads, -1, e)

    def by_row(self, x: Tensor) -> Tensor:
        """Undo `by_prompt`: (N, KV heads, G * M, E) -> (R, KV heads, M, E)."""
        num_prompts, heads, _, e = x.shape
        x = x.view(num_prompts, heads, self.group_size, -1, e).transpose(1, 2)
        x = x.reshape(num_prompts * self.group_size, heads, -1, e)
        return x if self.places is None else x.index_select(0, self.places)
