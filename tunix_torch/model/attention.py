"""What a Hugging Face model's attention gets from us: masks and position ids for left-padded prompts, KV caches, and
functions that compute attention.

A *slot* is a column of the key axis. Prompts are left-padded and completions start at slot P, so the distance of two
tokens in slots equals their distance in positions, and both causality and the sliding window can be read off slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..runtime import device

# The names by which models take the two forms of attention, and that of this process.
GROUPED = "tunix_grouped"
SDPA = "tunix_sdpa"
ATTENTION = GROUPED if device.KIND == "xla" else SDPA


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
    return _as_taken(config, full, distance, dtype)


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
    return _as_taken(config, full, torch.cat((from_prompt, between), dim=2)[:, None], dtype)


def _as_taken(
    config: PretrainedConfig, full: Tensor, distance: Tensor, dtype: torch.dtype
) -> dict[str, Tensor] | Tensor:
    """What the model's layers take, from the mask without windows and the distance of each query from each key."""
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
    """Of each layer, the most tokens that a token may look at, itself included; None: all before it."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def kept_tokens(window: int | None, num_prompt: int, num_own: int) -> tuple[int, int]:
    """How many of a prompt's tokens, and of a completion's own, a layer keeps while completions are decoded."""
    return (num_prompt, num_own) if window is None else (min(num_prompt, max(1, window - 1)), min(num_own, window))


def _for_last(attention_mask: Tensor, num_keys: int) -> Tensor:
    """A mask for the last of its keys: a layer with a sliding window keeps no others."""
    return attention_mask if attention_mask.shape[-1] == num_keys else attention_mask[..., -num_keys:]


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
    scores = torch.einsum("rhgqd,rhkd->rhgqk", grouped, key) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.float().masked_fill(~attention_mask[:, :, None], torch.finfo(torch.float32).min)
    weights = nn.functional.dropout(scores.softmax(dim=-1).to(query.dtype), dropout, module.training)
    mixed = torch.einsum("rhgqk,rhkd->rhgqd", weights, value)
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
    """Transformers' sdpa, but where that can't do it: with a soft-cap, and with a `SharedPrefixKV`."""
    assert kwargs.get("s_aux") is None, "attention sinks are not computed here"
    if softcap is not None or isinstance(key, SharedPrefixKV):
        return grouped_attention(module, query, key, value, attention_mask, scaling, dropout, softcap)
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def shared_prefix_attention(
    query: Tensor, kv: "SharedPrefixKV", attention_mask: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """One query a row, (R, heads, 1, D), looks at its prompt's keys, which its group shares, and at the row's own.

    `attention_mask`: (R, 1, 1, P + K or more), as if each row had its prompt's keys before its own; the last count.
    Returns (R, 1, heads, D).
    """
    rows, heads, _, head_dim = query.shape
    grouped = query.reshape(rows, kv.own_keys.shape[1], -1, head_dim)  # (R, KV heads, heads / KV heads, D)
    scores = kv.scores(grouped) * scaling  # (R, KV heads, heads / KV heads, P + K)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = _for_last(attention_mask, scores.shape[-1])
    scores = scores.float().masked_fill_(~mask, torch.finfo(torch.float32).min)
    weights = scores.softmax(dim=-1).to(query.dtype)
    return kv.mix(weights).reshape(rows, 1, heads, -1)


def _whole_mask(*args: object, **kwargs: object) -> Tensor:
    """Transformers' mask for calls that bring none of their own, written out even where it is plainly causal."""
    return sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})


for _name, _function in ((GROUPED, grouped_attention), (SDPA, attention_by_sdpa)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, _whole_mask)


class PrefixCache:
    """Keys and values that follow a prefix: `update` returns prefix and new ones joined, differentiable throughout.

    Without a prefix it records what one pass over the prompts computes. `layers[i]` is that layer's (key, value),
    each (rows, KV heads, tokens, head dim); layers that share another layer's KV (Gemma 4) do not occur.
    """

    def __init__(self, prefix: dict[int, tuple[Tensor, Tensor]] | None = None) -> None:
        self.layers = dict(prefix or {})

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if layer_idx in self.layers:
            past_key, past_value = self.layers[layer_idx]
            key, value = torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2)
        self.layers[layer_idx] = (key, value)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx][0].shape[2] if layer_idx in self.layers else 0

    @property
    def num_rows(self) -> int:
        """Rows that it holds."""
        return next(iter(self.layers.values()))[0].shape[0]

    def forget(self, windows: Sequence[int | None]) -> None:
        """Drop what no token after it looks at: all but the last tokens of a window (see `kept_tokens`)."""
        for i, (key, value) in self.layers.items():
            num_kept, _ = kept_tokens(windows[i], key.shape[2], 0)
            if num_kept < key.shape[2]:
                self.layers[i] = (key[:, :, -num_kept:].contiguous(), value[:, :, -num_kept:].contiguous())

    def expand(self, num_copies: int) -> "PrefixCache":
        """Each row `num_copies` times, copies side by side: (N, ...) -> (N * num_copies, ...)."""
        layers = {
            i: (k.repeat_interleave(num_copies, dim=0), v.repeat_interleave(num_copies, dim=0))
            for i, (k, v) in self.layers.items()
        }
        return PrefixCache(layers)

    def take(self, rows: Tensor) -> "PrefixCache":
        """Some rows, or a row several times: (N, ...) -> (len(rows), ...), `rows` int64."""
        return PrefixCache({i: (k.index_select(0, rows), v.index_select(0, rows)) for i, (k, v) in self.layers.items()})


@dataclass
class SharedPrefixKV:
    """One layer's keys and values, while rows are decoded: those of N prompts, once each, and those of R rows.

    prompt_keys, prompt_values: (N, KV heads, P, D); own_keys, own_values: (R, KV heads, K, D).
    `places`: (R,) int64, the place of each row where every prompt has `group_size` rows; None: rows fill all of them.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    own_keys: Tensor
    own_values: Tensor
    places: Tensor | None
    group_size: int

    def to(self, place: torch.device) -> "SharedPrefixKV":
        """Itself, as all is on one device: Gemma 4 asks for it, where layers share keys and values."""
        assert self.own_keys.device == place, place
        return self

    def scores(self, query: Tensor) -> Tensor:
        """Products of M queries a row and KV head with all keys: (R, KV heads, M, D) -> (R, KV heads, M, P + K)."""
        if self.prompt_keys.shape[2] == 0:  # the window has left the prompt
            return query @ self.own_keys.mT
        if device.KIND == "xla":  # no two dimensions become one: on a mesh each may be split, see `grouped_attention`
            in_groups = query.unflatten(0, (-1, self.group_size))
            of_prompt = torch.einsum("nghmd,nhpd->nghmp", in_groups, self.prompt_keys).flatten(0, 1)
            of_row = torch.einsum("rhkd,rhmd->rhkm", self.own_keys, query).mT  # in this order the CPU needn't turn keys
        else:  # einsum would be slower
            of_prompt = self.by_row(self.by_prompt(query) @ self.prompt_keys.mT)
            of_row = query @ self.own_keys.mT
        return torch.cat((of_prompt, of_row), dim=-1)

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of all values, weighted: (R, KV heads, M, P + K) -> (R, KV heads, M, D)."""
        if self.prompt_keys.shape[2] == 0:
            return weights @ self.own_values
        of_prompt, of_row = weights.tensor_split([self.prompt_keys.shape[2]], dim=-1)
        if device.KIND == "xla":
            in_groups = of_prompt.unflatten(0, (-1, self.group_size))
            mixed = torch.einsum("nghmp,nhpd->nghmd", in_groups, self.prompt_values).flatten(0, 1)
            return mixed + torch.einsum("rhmk,rhkd->rhmd", of_row, self.own_values)
        return self.by_row(self.by_prompt(of_prompt) @ self.prompt_values) + of_row @ self.own_values

    def by_prompt(self, x: Tensor) -> Tensor:
        """Rows of a prompt side by side, zeros where one is missing: (R, KV heads, M, E) -> (N, KV heads, G * M, E)."""
        _, heads, m, e = x.shape
        num_prompts = len(self.prompt_keys)
        if self.places is not None:
            x = x.new_zeros(num_prompts * self.group_size, heads, m, e).index_copy_(0, self.places, x)
        return x.view(num_prompts, self.group_size, heads, m, e).transpose(1, 2).reshape(num_prompts, heads, -1, e)

    def by_row(self, x: Tensor) -> Tensor:
        """Back again: (N, KV heads, G * M, E) -> (R, KV heads, M, E)."""
        num_prompts, heads, _, e = x.shape
        x = x.view(num_prompts, heads, self.group_size, -1, e).transpose(1, 2)
        x = x.reshape(num_prompts * self.group_size, heads, -1, e)
        return x if self.places is None else x.index_select(0, self.places)


class SharedPrefixCache:
    """A KV cache for groups of rows that leave: each step appends one token to every row that is still there.

    The keys and values of a prompt are kept and read once for its group. Room for `capacity` tokens a row is set aside;
    in layers with a sliding window for no more than the window: there the newest token takes the place of the oldest.

    Args:
        prefix: of N prompts; emptied.
        group_size: rows a prompt, side by side.
        windows: see `layer_windows`.
    """

    def __init__(self, prefix: PrefixCache, group_size: int, capacity: int, windows: Sequence[int | None]) -> None:
        self.prompts, self.windows = dict(prefix.layers), windows
        prefix.layers.clear()
        self.own, self.used = {}, 0  # used: tokens of a row before the step that is running
        for i, (key, value) in self.prompts.items():
            num_prompts, heads, width, _ = key.shape
            room = (num_prompts * group_size, heads, kept_tokens(windows[i], width, capacity)[1])
            self.own[i] = (key.new_empty(*room, key.shape[3]), value.new_empty(*room, value.shape[3]))
        self.num_prompts = num_prompts
        self.prompt_of = torch.arange(num_prompts, device=key.device).repeat_interleave(group_size)  # (R,)
        self.places, self.group_size = None, group_size

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[SharedPrefixKV, SharedPrefixKV]:
        assert key.shape[2] == 1, key.shape
        keys, values = self.own[layer_idx]
        slot = self.used % keys.shape[2]
        keys[:, :, slot] = key[:, :, 0]
        values[:, :, slot] = value[:, :, 0]
        own = (x[:, :, : self.used + 1] for x in (keys, values))
        prompt, window = self.prompts[layer_idx], self.windows[layer_idx]
        if window is not None:
            left = max(0, window - self.used - 1)  # of the window, for the prompt's last tokens
            prompt = (x[:, :, max(0, x.shape[2] - left) :] for x in prompt)
        both = SharedPrefixKV(*prompt, *own, self.places, self.group_size)
        return both, both

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prompts[layer_idx][0].shape[2] + self.used

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows, (fewer,) int64, in their order. Prompts without rows leave too."""
        for i, (key, value) in self.own.items():  # one after the other: only one is there twice at a time
            self.own[i] = (key[rows], value[rows])
        prompts, self.prompt_of, counts = self.prompt_of[rows].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        if len(prompts) < self.num_prompts:
            self.num_prompts = len(prompts)
            self.prompts = {i: (key[prompts], value[prompts]) for i, (key, value) in self.prompts.items()}
        self.group_size = int(counts.max())
        first = counts.cumsum(0) - counts  # row of each prompt
        place_in_group = torch.arange(len(rows), device=rows.device) - first[self.prompt_of]
        self.places = self.prompt_of * self.group_size + place_in_group


class SlotCache:
    """What a `SharedPrefixCache` is, with static shapes for a compiled or recorded step.

    Rows stay, and a tensor says where tokens go.

    Args:
        layer_ids: the layers that have a cache of their own. Of each of the four lists the i-th tensor is the i-th's.
        windows: of all layers, see `layer_windows`.
        prompt_keys, prompt_values: (N, KV heads, P or, after `PrefixCache.forget`, fewer, head dim).
        own_keys, own_values: (B, KV heads, K, head dim), written in place. With a window K is at most the window.
        step: (1,) int64, how many tokens a row has before the one that is written.
    """

    def __init__(
        self,
        layer_ids: Sequence[int],
        windows: Sequence[int | None],
        prompt_keys: list[Tensor],
        prompt_values: list[Tensor],
        own_keys: list[Tensor],
        own_values: list[Tensor],
        step: Tensor,
    ) -> None:
        layers = zip(prompt_keys, prompt_values, own_keys, own_values, strict=True)
        self.layers = dict(zip(layer_ids, layers, strict=True))
        self.group_size = len(own_keys[0]) // len(prompt_keys[0])
        self.windows, self.step = windows, step

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[SharedPrefixKV, SharedPrefixKV]:
        prompt_keys, prompt_values, keys, values = self.layers[layer_idx]
        slot = self.step if self.windows[layer_idx] is None else self.step % keys.shape[2]
        keys.index_copy_(2, slot, key.to(keys.dtype))
        values.index_copy_(2, slot, value.to(values.dtype))
        kv = SharedPrefixKV(prompt_keys, prompt_values, keys, values, None, self.group_size)
        return kv, kv

    def masks(self, config: PretrainedConfig, prompt_mask: Tensor) -> dict[str, Tensor] | Tensor:
        """As `attention_masks`, bool, for what each kind of layer keeps: (B, 1, 1, its P + its K).

        `prompt_mask` is (B, P), False at padding.
        """
        width, kinds = prompt_mask.shape[1], getattr(config, "layer_types", None)
        distance = width + self.step - torch.arange(width, device=prompt_mask.device)  # (P,)

        def mask_of(layer: int) -> Tensor:
            prompt_keys, _, keys, _ = self.layers[layer]
            window, num_own = self.windows[layer], keys.shape[2]
            seen = prompt_mask if window is None else prompt_mask & (distance < window)
            own = torch.arange(num_own, device=prompt_mask.device) <= self.step  # all, once the window is full
            seen = torch.cat((_for_last(seen, prompt_keys.shape[2]), own.expand(len(seen), -1)), dim=1)
            return seen[:, None, None]

        if kinds is None:
            return mask_of(0)
        return {kinds[layer]: mask_of(layer) for layer in reversed(self.layers)}  # of the first layer of each kind

    def get_seq_length(self, layer_idx: int = 0) -> int:
        prompt_keys, _, keys, _ = self.layers[layer_idx]
        return prompt_keys.shape[2] + keys.shape[2]
