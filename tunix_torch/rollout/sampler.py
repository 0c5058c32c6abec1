"""Sample completions: prefill once a prompt, then decode one token at a time for all rows. On the CPU rows that have
ended leave; elsewhere shapes are static, for steps that are compiled (XLA) or recorded (CUDA).

Randomness belongs to the row: the host draws one uniform number per row and token, and a token is found by inverting
the cumulative distribution of the top-k / top-p candidates. So a rollout is the same on cpu, cuda and xla up to float
ties, does not depend on how rows are batched, and a resumed run draws what the uninterrupted run would have drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Rollout
from ..model.attention import ATTENTION, PrefixCache, SharedPrefixCache, SlotCache, attention_masks, layer_windows
from ..model.fast_layers import packed_for_decoding
from ..model.forward import adapters_in_use, base_model, hidden_states, logits, prefill, text_config
from ..runtime import compiled, device
from ..runtime.recorded import RecordedStep
from ..runtime.sharding import shard_rows
from .rows import StaticRows

_LEAVE_AT = 7 / 8  # rows that have ended leave when so few are left: each time the KV cache is copied


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. The order is that of Transformers: temperature, then top-k, then top-p."""

    max_new_tokens: int  # C
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off


def draw_uniforms(seed: Sequence[int], rows: Sequence[int], num_tokens: int) -> Tensor:
    """One number in [0, 1) per row and token, (len(rows), num_tokens) float32, a function of (seed, row) only."""
    draws = [np.random.Generator(np.random.Philox([*seed, row])).random(num_tokens, np.float32) for row in rows]
    return torch.from_numpy(np.stack(draws))


def choose_tokens(scores: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Turn one uniform number a row into one token a row by inverse CDF within the top-k / top-p candidates.

    Args:
        scores: (B, V) float32 logits.
        uniforms: (B,) float32 in [0, 1).

    Returns:
        tokens (B,) int64, and their log-probabilities (B,) float32 under softmax(scores / temperature) over the whole
        vocabulary, which is what `token_logps` computes. With temperature 0: argmax, scored at temperature 1.
    """
    logps = torch.log_softmax(scores / (params.temperature or 1.0), dim=-1)
    if params.temperature == 0:
        tokens = logps.argmax(dim=-1)
        return tokens, logps.gather(-1, tokens[:, None])[:, 0]
    top_k = min(params.top_k, scores.shape[-1])
    if top_k > 0:
        candidates, ids = logps.topk(top_k, dim=-1)  # (B, K), best first
    elif params.top_p < 1:
        candidates, ids = logps.sort(dim=-1, descending=True)
    else:
        candidates, ids = logps, None
    probs = candidates.exp()
    if params.top_p < 1:
        share = probs / probs.sum(-1, keepdim=True)
        probs = probs * (share.cumsum(-1) - share < params.top_p)  # keeps the first one that reaches top_p
    if ids is not None:  # walk candidates in vocabulary order: near-ties in rank then can't change the token
        ids, order = ids.sort(dim=-1)
        probs = probs.gather(-1, order)
    cdf = probs.cumsum(-1)
    total = cdf[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, total * (1 - 2**-22))  # below the total, whatever the rounding
    reached = (cdf > target) & (probs > 0)  # a parallel scan may give a cdf that is not quite monotone
    chosen = reached.int().argmax(dim=-1, keepdim=True)  # the first
    tokens = chosen if ids is None else ids.gather(-1, chosen)
    return tokens[:, 0], logps.gather(-1, tokens)[:, 0]


class Sampler:
    """Samples from a model; holds the decode step, which on XLA is compiled once for each shape and then reused, and on
    CUDA recorded as a graph for each shape in each batch.

    Args:
        model: a causal language model, with or without a LoRA; whatever is active is sampled from. Its attention takes
            the form that the KV cache needs.
        eos_token_ids: any of these ends a completion.
        pad_token_id: fills up after the end.
        stop_check_interval: every so many tokens the host looks which rows have ended; on the CPU before every one.
        compile_ahead: on XLA, before the first batch of a shape every step is compiled that such a batch may come to
            need, whatever the lengths of its completions.

    Raises:
        ValueError: the model has an attention of its own.
    """

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
        self.stop_check_interval = stop_check_interval
        self._decode = self._decode_growing if device.KIND == "cpu" else self._decode_static
        base_model(model).set_attn_implementation(ATTENTION)
        if text_config(model)._attn_implementation != ATTENTION:
            raise ValueError(
                f"model_type={text_config(model).model_type!r}: its attention can't take the form that "
                "sampling needs; use a Gemma, or another model on Transformers' AttentionInterface"
            )
        self._steps: dict[tuple[SamplingParams, tuple[str, ...]], Callable] = {}
        self.compile_ahead = compile_ahead
        self._seen: set[tuple] = set()  # for these batches every step has been compiled

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
            return self._sample(prompt_ids, prompt_mask, num_completions, params, uniforms.to(prompt_ids.device))
        finally:
            self.model.train(was_training)

    def _sample(
        self, prompt_ids: Tensor, prompt_mask: Tensor, num_completions: int, params: SamplingParams, uniforms: Tensor
    ) -> Rollout:
        for tensor in (prompt_ids, prompt_mask, uniforms):
            shard_rows(tensor)
        with packed_for_decoding(self.model):
            device.sync()
            ids, logps, prefix = self._start(prompt_ids, prompt_mask, num_completions, params, uniforms)
            prompt_mask = prompt_mask.repeat_interleave(num_completions, dim=0)  # (B, P)
            ids, logps = self._decode(ids, logps, prompt_mask, prefix, uniforms, params)
        mask = self._completion_mask(ids)
        return Rollout(ids.masked_fill(~mask, self.pad_token_id), mask, logps.masked_fill(~mask, 0.0))

    def _start(
        self, prompt_ids: Tensor, prompt_mask: Tensor, num_completions: int, params: SamplingParams, uniforms: Tensor
    ) -> tuple[Tensor, Tensor, PrefixCache]:
        """One pass over the prompts, and each row's first token.

        Returns:
            ids, logps (B, C), of which the first column is filled in; the KV cache of the N prompts, as far as
            completions look at it.
        """
        last_hidden, prefix = prefill(self.model, prompt_ids, prompt_mask)
        prefix.forget(layer_windows(text_config(self.model)))
        scores = logits(self.model, last_hidden).repeat_interleave(num_completions, dim=0)  # (B, V)
        tokens, logps = choose_tokens(scores, uniforms[:, 0], params)
        room = params.max_new_tokens - 1
        ids = nn.functional.pad(tokens[:, None], (0, room), value=self.pad_token_id)
        logps = nn.functional.pad(logps[:, None], (0, room))
        return ids, logps, prefix

    @torch.inference_mode()  # a tenth faster than no_grad
    def _decode_growing(
        self,
        ids: Tensor,
        logps: Tensor,
        prompt_mask: Tensor,
        prefix: PrefixCache,
        uniforms: Tensor,
        params: SamplingParams,
    ) -> tuple[Tensor, Tensor]:
        """Fill in the columns from 1 on, with shapes that follow the data: rows that have ended leave. For the CPU."""
        model, config, dtype = self.model, text_config(self.model), base_model(self.model).dtype
        room = params.max_new_tokens - 1
        width, lengths = prompt_mask.shape[1], prompt_mask.sum(-1, keepdim=True)  # (B, 1)
        key_mask = nn.functional.pad(prompt_mask, (0, room), value=True)
        cache = SharedPrefixCache(prefix, len(ids) // prefix.num_rows, room, layer_windows(config))
        rows = torch.arange(len(ids))  # those still there
        ended = self._is_eos(ids[:, 0])
        for t in range(room):
            num_left = len(rows) - int(ended.sum())
            if num_left == 0:
                break
            if num_left <= _LEAVE_AT * len(rows):
                left = (~ended).nonzero()[:, 0]
                cache.keep(left)
                rows, ended, key_mask, lengths = rows[left], ended[left], key_mask[left], lengths[left]
            masks = attention_masks(config, key_mask[:, : width + t + 1], torch.tensor([width + t]), dtype)
            hidden = hidden_states(model, ids[rows, t : t + 1], masks, lengths + t, cache)  # (rows, 1, D)
            cache.used += 1  # every layer has its token
            tokens, token_logps = choose_tokens(logits(model, hidden[:, 0]), uniforms[rows, t + 1], params)
            ids[rows, t + 1] = tokens.masked_fill(ended, self.pad_token_id)
            logps[rows, t + 1] = token_logps
            ended |= self._is_eos(tokens)
        return ids, logps

    def _decode_static(
        self,
        ids: Tensor,
        logps: Tensor,
        prompt_mask: Tensor,
        prefix: PrefixCache,
        uniforms: Tensor,
        params: SamplingParams,
    ) -> tuple[Tensor, Tensor]:
        """The same with few fixed shapes, for each of which the step is compiled or recorded."""
        num_prompts, layer_ids, windows = prefix.num_rows, tuple(prefix.layers), layer_windows(text_config(self.model))
        rows = StaticRows(ids, logps, self._is_eos(ids[:, 0]), prompt_mask, uniforms, prefix, windows)
        if device.KIND == "cuda":  # anew for each batch: weights may have moved since the last
            decode = RecordedStep(self._decode_step(params, layer_ids))
        else:
            decode = self._compiled_step(params, layer_ids)
            batch = (params, adapters_in_use(self.model), num_prompts, prompt_mask.shape)
            ahead = self.compile_ahead and params.max_new_tokens > 1 and device.planner() is None
            if ahead and batch not in self._seen:
                rows.rehearse(decode)
                self._seen.add(batch)
        rows.begin()
        for t in range(1, params.max_new_tokens):
            rows.decode(decode)
            looks = t % self.stop_check_interval == 0 and t + 1 < params.max_new_tokens
            if looks and not rows.drop_ended():
                break
        return rows.results()

    def _is_eos(self, tokens: Tensor) -> Tensor:
        ended = tokens == self.eos_token_ids[0]
        for eos in self.eos_token_ids[1:]:
            ended = ended | (tokens == eos)
        return ended

    def _completion_mask(self, ids: Tensor) -> Tensor:
        """True up to and including the first EOS, by position: right even when the padding token is an EOS token."""
        is_eos = self._is_eos(ids).long()
        return is_eos.cumsum(-1) - is_eos == 0

    def _compiled_step(self, params: SamplingParams, layer_ids: tuple[int, ...]) -> Callable:
        """The decode step, compiled once for each static shape."""
        key = (params, adapters_in_use(self.model))
        if key not in self._steps:
            self._steps[key] = compiled.compile_step(self._decode_step(params, layer_ids), self.model)
        return self._steps[key]

    def _decode_step(self, params: SamplingParams, layer_ids: tuple[int, ...]) -> Callable:
        """The function that feeds token t of every row and appends token t + 1."""
        model, config = self.model, text_config(self.model)
        windows = layer_windows(config)

        def decode_step(ids, logps, ended, step, prompt_mask, lengths, uniforms, *keys_and_values):
            cache = SlotCache(layer_ids, windows, *keys_and_values, step)
            masks = cache.masks(config, prompt_mask)
            hidden = hidden_states(model, ids.index_select(1, step), masks, lengths + step, cache)  # (B, 1, D)
            column = uniforms.index_select(1, step + 1)[:, 0]
            tokens, token_logps = choose_tokens(logits(model, hidden[:, 0]), column, params)
            tokens = tokens.masked_fill(ended, self.pad_token_id)
            ids = ids.index_copy(1, step + 1, tokens[:, None])
            logps = logps.index_copy(1, step + 1, token_logps[:, None])
            return ids, logps, ended | self._is_eos(tokens), step + 1

        return decode_step
