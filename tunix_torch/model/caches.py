"""Key-value caches for Hugging Face models: of prompts, and of completions that continue prompts they share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..runtime import device, mesh
from .attention import SharedPrefixKV, kept_tokens


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


@dataclass(frozen=True)
class RaggedGroups:
    """Says which row belongs to which prompt, where prompts have different numbers of rows.

    If every prompt had `group_size` rows, side by side, row r would be number `places[r]` of them; (R,) int64.
    """

    places: Tensor
    group_size: int


class SharedPrefixCache:
    """The KV cache of a decode step, in which each row appends one token. A group of rows shares its prompt's tokens.

    Nothing here depends on values, so that the step can be compiled, or recorded as a graph.

    Args:
        layer_ids: the layers that have a cache of their own. Of each of the four lists the i-th tensor is the i-th's.
        windows: of all layers, see `attention.layer_windows`.
        prompt_keys, prompt_values: (N, KV heads, P, head dim). A layer with a sliding window may have fewer than P
            tokens: the last ones, those that a row may still look at.
        own_keys, own_values: (R, KV heads, K, head dim), written in place. K is the same for all layers without a
            window. A layer with a window has at most the window's: then the newest token replaces the oldest.
        step: (1,) int64, how many tokens a row has before the one that is written; less than K.
        groups: None where every prompt has as many rows as the others, side by side.
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
        groups: RaggedGroups | None = None,
    ) -> None:
        layers = zip(prompt_keys, prompt_values, own_keys, own_values, strict=True)
        self.layers = dict(zip(layer_ids, layers, strict=True))
        self.places = None if groups is None else groups.places
        self.group_size = len(own_keys[0]) // len(prompt_keys[0]) if groups is None else groups.group_size
        self.windows, self.step = windows, step
        self._unwritten: list[tuple[Tensor, Tensor, Tensor]] = []  # (cache, slot, new key or value)
        self._slots: dict[int, Tensor] = {}  # where layers of a width with a window write, (1,)

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[SharedPrefixKV, SharedPrefixKV]:
        """Write each row's new key and value, (R, KV heads, 1, head dim); returns all that the layer looks at, twice.

        The signature is what Transformers' attention layers call.
        """
        prompt_keys, prompt_values, keys, values = self.layers[layer_idx]
        slot = self.step if self.windows[layer_idx] is None else self._slot_in_window(keys.shape[2])
        key, value = key.to(keys.dtype), value.to(values.dtype)
        rows = prompt_keys, prompt_values, keys, values, self.places, self.group_size
        if mesh.writes_caches_last():
            self._unwritten += [(keys, slot, key), (values, slot, value)]
            kv = SharedPrefixKV(*rows, key, value)
        else:
            keys.index_copy_(2, slot, key)
            values.index_copy_(2, slot, value)
            kv = SharedPrefixKV(*rows)
        return kv, kv

    def write(self, tokens: Tensor) -> None:
        """Write the new keys and values where `update` has not done so. `tokens` is the last result of the step."""
        if self._unwritten:
            barrier = device.optimization_barriers([tokens, *(new for _, _, new in self._unwritten)])
            for (tensor, slot, _), new in zip(self._unwritten, barrier[1:], strict=True):
                tensor.index_copy_(2, slot, new)

    def _slot_in_window(self, width: int) -> Tensor:
        """The slot of the oldest token once the window is full. Layers of one width share it."""
        if width not in self._slots:
            self._slots[width] = self.step % width
        return self._slots[width]

    def masks(self, config: PretrainedConfig, prompt_mask: Tensor) -> dict[str, Tensor] | Tensor:
        """As `attention.attention_masks`, bool, for what each kind of layer holds: (R, 1, 1, its P + its K).

        Where caches are written last there is one more column, of the token itself.

        `prompt_mask` is (R, P), False at padding.
        """
        width, kinds = prompt_mask.shape[1], getattr(config, "layer_types", None)
        distance = width + self.step - torch.arange(width, device=prompt_mask.device)  # (P,)

        def mask_of(layer: int) -> Tensor:
            prompt_keys, _, keys, _ = self.layers[layer]
            window, num_own, num_seen = self.windows[layer], keys.shape[2], prompt_keys.shape[2]
            seen = prompt_mask if window is None else prompt_mask & (distance < window)
            if num_seen < width:
                seen = seen[:, width - num_seen :]
            slots = torch.arange(num_own, device=prompt_mask.device)
            own = slots <= self.step  # all, once the window is full
            if mesh.writes_caches_last():  # the token itself comes last, and not in its slot
                own = own & (slots != (self.step if window is None else self._slot_in_window(num_own)))
                own = torch.nn.functional.pad(own, (0, 1), value=True)
            return torch.cat((seen, own.expand(seen.shape[0], -1)), dim=1)[:, None, None]

        if kinds is None:
            return mask_of(0)
        firsts: dict[str, int] = {}  # a layer of each kind
        for layer in self.layers:
            firsts.setdefault(kinds[layer], layer)
        return {kind: mask_of(layer) for kind, layer in firsts.items()}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        prompt_keys, _, keys, _ = self.layers[layer_idx]
        return prompt_keys.shape[2] + keys.shape[2]
