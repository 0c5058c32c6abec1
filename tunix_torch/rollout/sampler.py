"""Samples completions: computes each prompt once for its group, then decodes one token at a time for all rows.

`tokens.py` chooses the tokens, `rows.py` keeps the rows that are decoded and their KV caches.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..batch import Rollout
from ..model.attention import layer_windows, use_own_attention
from ..model.caches import SharedPrefixCache
from ..model.decoding import decode_weights
from ..model.forward import adapters_in_use, base_model, hidden_states, logits, prefill, text_config
from ..runtime import device
from .rows import Rows, lay_on_devices
from .steps import Steps
from .tokens import SamplingParams, choose_tokens, tokens_in_prompts


class Sampler:
    """Samples from a model with whatever LoRA is active.

    Args:
        model: a causal language model. From now on it computes attention by this library's functions.
        eos_token_ids: any of these ends a completion.
        pad_token_id: fills the columns after the end.
        stop_check_interval: where Python must wait to see which rows have ended, it looks once in so many tokens.
        compile_ahead: where decode steps are compiled, compile all that a batch of a new shape may need before it.

    Raises:
        ValueError: the model can't compute attention by these functions.
    """

    watch: Callable[[Rows], None] = staticmethod(lambda rows: None)  # is called after each call of a step

    def __init__(
        self,
        model: nn.Module,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        stop_check_interval: int = 16,
        compile_ahead: bool = False,
    ) -> None:
        self.model = model
        self.eos_token_ids, self.pad_token_id = tuple(eos_token_ids), pad_token_id
        self.stop_check_interval, self.compile_ahead = stop_check_interval, compile_ahead
        use_own_attention(base_model(model))
        self._steps = Steps(model)

    @torch.no_grad()
    def sample(
        self, prompt_ids: Tensor, prompt_mask: Tensor, num_completions: int, params: SamplingParams, uniforms: Tensor
    ) -> Rollout:
        """Sample a group of completions for each prompt.

        Args:
            prompt_ids, prompt_mask: (N, P) int64 and bool, left-padded, on the model's device.
            num_completions: G; rows of a group stand side by side.
            uniforms: (B, C) float32, see `draw_uniforms`.

        Returns:
            a `Rollout` of B = N * G rows and C = params.max_new_tokens columns.
        """
        num_rows = prompt_ids.shape[0] * num_completions
        assert uniforms.shape == (num_rows, params.max_new_tokens), uniforms.shape
        was_training = self.model.training
        self.model.eval()
        try:
            with decode_weights(self.model) as in_step:
                ids, logps = self._decode(prompt_ids, prompt_mask, num_completions, params, uniforms, in_step)
        finally:
            self.model.train(was_training)
        is_eos = self._is_eos(ids).long()
        mask = is_eos.cumsum(-1) - is_eos == 0  # by positions of EOS, since padding may be an EOS too
        return Rollout(ids.masked_fill(~mask, self.pad_token_id), mask, logps.masked_fill(~mask, 0.0))

    def _decode(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        num_completions: int,
        params: SamplingParams,
        uniforms: Tensor,
        in_step: bool,
    ) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities, (B, C). After a row's first EOS they may be anything.

        `in_step` is what `decode_weights` yields.
        """
        uniforms = device.upload(uniforms, prompt_ids.device)
        prompt_ids, prompt_mask, uniforms = lay_on_devices(prompt_ids, prompt_mask, uniforms)
        last_hidden, prefix = prefill(self.model, prompt_ids, prompt_mask)
        windows = layer_windows(text_config(self.model))
        prefix.forget(windows)
        scores = logits(self.model, last_hidden).repeat_interleave(num_completions, dim=0)  # (B, V)
        seen = None
        if params.needs_seen_tokens:
            seen = tokens_in_prompts(prompt_ids, prompt_mask, num_completions, scores.shape[-1])  # (B, V)
        tokens, logps = choose_tokens(scores, uniforms[:, 0], params, seen)
        first = tokens, logps, self._is_eos(tokens)  # each (B,)
        del last_hidden, scores  # (B, V) numbers are not held while rows are decoded
        step_key = (params, adapters_in_use(self.model), num_completions, prompt_ids.shape)
        layer_ids = tuple(prefix.layers)
        step, memory, is_new = self._steps.of(step_key, lambda: self._decode_step(params, layer_ids))
        pad_id, interval = self.pad_token_id, self.stop_check_interval
        rows = Rows(*first, prompt_mask, uniforms, prefix, windows, pad_id, interval, memory, seen, in_step)
        if is_new and self.compile_ahead:
            rows.rehearse(step)
        while rows.left():
            rows.decode(step)
            self.watch(rows)
        return rows.results()

    def _decode_step(self, params: SamplingParams, layer_ids: tuple[int, ...]) -> Callable[..., tuple[Tensor, ...]]:
        """The function that feeds token t of every row that is still decoded, (R,), and appends token t + 1."""
        model, config = self.model, text_config(self.model)
        windows = layer_windows(config)

        def decode_step(
            ids, logps, ended, t, prompt_mask, lengths, uniforms, seen, keys, values, own_keys, own_values, ragged=None
        ):
            cache = SharedPrefixCache(layer_ids, windows, keys, values, own_keys, own_values, t, ragged)
            masks = cache.masks(config, prompt_mask)
            fed, after = ids.index_select(1, t), t + 1
            hidden = hidden_states(model, fed, masks, lengths + t, cache)  # (R, 1, D)
            seen = [row_tokens.scatter_(1, fed, True) for row_tokens in seen]  # in place
            column = uniforms.index_select(1, after)[:, 0]
            tokens, token_logps = choose_tokens(logits(model, hidden[:, 0]), column, params, *seen)
            cache.write(tokens)
            tokens = tokens.masked_fill(ended, self.pad_token_id)
            ids = ids.index_copy(1, after, tokens[:, None])
            logps = logps.index_copy(1, after, token_logps[:, None])
            return ids, logps, ended | self._is_eos(tokens), after

        return decode_step

    def _is_eos(self, tokens: Tensor) -> Tensor:
        ended = tokens == self.eos_token_ids[0]
        for eos in self.eos_token_ids[1:]:
            ended = ended | (tokens == eos)
        return ended
