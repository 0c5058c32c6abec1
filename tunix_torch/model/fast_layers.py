"""Layers of Gemma 2 and 3 in fewer operations, for float32 on the CPU: RMSNorm, and the decoder layer while decoding.

Where two cores compute a small model, the many small operations of Transformers' layers take as long as the products,
and autograd keeps the result of each of a norm's seven operations. The results here equal those of Transformers up to
rounding, and where these layers do not apply, its own code runs. While decoding, no forward hook inside a decoder layer
is called.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RMSNorm

from .attention import shared_prefix_attention
from .caches import SharedPrefixCache
from .merged_lora import plain_weight


@functools.cache
def _scalar(value: float) -> Tensor:
    """The number as a float32 tensor, (), made once; not an inference tensor, wherever it is asked for first."""
    with torch.inference_mode(False):
        return torch.tensor(value)


def _inverse_rms(x: Tensor, eps: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays as 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _normed(x: Tensor, scale: Tensor, eps: Tensor) -> Tensor:
    """x (..., D), scale (D,), eps () -> x / rms(x) * scale."""
    return (x * _inverse_rms(x, eps)).mul_(scale)


class _ScaledNorm(torch.autograd.Function):
    """`_normed`, with a gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: Tensor) -> Tensor:
        inverse = _inverse_rms(x, eps)
        ctx.save_for_backward(x, scale, inverse)
        return (x * inverse).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, scale, inverse = ctx.saved_tensors
        grad = grad * scale
        along = (grad * x).sum(-1, keepdim=True) * inverse**3 / -x.shape[-1]
        return torch.addcmul(grad.mul_(inverse), x, along), None, None


class FastRMSNorm(nn.Module):
    """Takes the fast way for float32 with a frozen weight, which is what LoRA training has; else the class's own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.requires_grad:
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _ScaledNorm.apply(x, 1 + weight, _scalar(self.eps))
        return _normed(x, 1 + weight, _scalar(self.eps))


@dataclass
class _DecodeLayer:
    """What a decode step reads of one decoder layer.

    The weights of the projections include the LoRA, and oneDNN has laid them out: for few rows its products are twice
    as fast as MKL's. For each norm there are its scale, (D,), and its epsilon, ().
    """

    qkv: Tensor  # the weights of the queries, keys and values, one below the other
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    before_attention: tuple[Tensor, Tensor]
    after_attention: tuple[Tensor, Tensor]
    before_mlp: tuple[Tensor, Tensor]
    after_mlp: tuple[Tensor, Tensor]
    of_qk: tuple[Tensor, Tensor] | None  # Gemma 3 norms queries and keys: (heads + KV heads, head dim)


class FastDecoderLayer(nn.Module):
    """Computes the layer for one token of each row in few operations, within `decoding.decode_weights`."""

    _layout: _DecodeLayer | None = None

    @torch.no_grad()
    def prepare_to_decode(self) -> None:
        """Lay out the weights. Until `end_decoding`, neither they nor the active adapter may change."""
        attn, mlp = self.self_attn, self.mlp
        layers = (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        weights = [plain_weight(layer) for layer in layers]
        if any(weight is None for weight in weights) or self.config.hidden_activation != "gelu_pytorch_tanh":
            return
        q, k, v, *others = weights
        qkv, *others = (torch.ops.mkldnn._reorder_linear_weight(w) for w in (torch.cat((q, k, v)), *others))
        norms = (
            self.input_layernorm,
            self.post_attention_layernorm,
            self.pre_feedforward_layernorm,
            self.post_feedforward_layernorm,
        )
        of_qk = None
        if hasattr(attn, "q_norm"):
            counts = (len(q) // attn.head_dim, len(k) // attn.head_dim)
            of_both = zip((attn.q_norm, attn.k_norm), counts, strict=True)
            scale = torch.cat([(1 + norm.weight).expand(count, -1) for norm, count in of_both])
            of_qk = scale, _scalar(attn.q_norm.eps)
        self._layout = _DecodeLayer(qkv, *others, *((1 + norm.weight, _scalar(norm.eps)) for norm in norms), of_qk)

    def end_decoding(self) -> None:
        self._layout = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor,
        past_key_values: object = None,
        **kwargs: Any,
    ) -> Tensor:
        layout = self._layout
        if layout is None or not isinstance(past_key_values, SharedPrefixCache) or torch.is_grad_enabled():
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        x, attn = hidden_states[:, 0], self.self_attn  # (R, D)
        qkv = _product(_normed(x, *layout.before_attention), layout.qkv).view(len(x), -1, attn.head_dim)
        heads = layout.o.shape[1] // attn.head_dim
        num_kv = (qkv.shape[1] - heads) // 2
        qk, value = qkv[:, : heads + num_kv], qkv[:, heads + num_kv :]  # (R, heads + KV heads, E), (R, KV heads, E)
        softcap = attn.attn_logit_softcapping
        if layout.of_qk is not None:
            qk, softcap = _normed(qk, *layout.of_qk), None
        qk = _rotate(qk, *position_embeddings)
        kv, _ = past_key_values.update(qk[:, heads:, None], value[:, :, None], attn.layer_idx)
        mixed = shared_prefix_attention(qk[:, :heads, None], kv, attention_mask, attn.scaling, softcap)
        x = _plus_normed(x, _product(mixed.view(len(x), -1), layout.o), *layout.after_attention)
        h = _normed(x, *layout.before_mlp)
        gate = torch.ops.mkldnn._linear_pointwise(h, layout.gate, None, "gelu", [], "tanh")
        h = torch.ops.mkldnn._linear_pointwise.binary(h, gate, layout.up, None, "mul")
        return _plus_normed(x, _product(h, layout.down), *layout.after_mlp)[:, None]


def _plus_normed(x: Tensor, y: Tensor, scale: Tensor, eps: Tensor) -> Tensor:
    return torch.addcmul(x, y.mul_(_inverse_rms(y, eps)), scale)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x (R, heads, E); cos and sin are (R, 1, E)."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y


class _FastGemma2RMSNorm(FastRMSNorm, Gemma2RMSNorm):
    pass


class _FastGemma3RMSNorm(FastRMSNorm, Gemma3RMSNorm):
    pass


class _FastGemma2DecoderLayer(FastDecoderLayer, Gemma2DecoderLayer):
    pass


class _FastGemma3DecoderLayer(FastDecoderLayer, Gemma3DecoderLayer):
    pass


FAST = {  # the classes of Transformers, and their faster forms
    Gemma2RMSNorm: _FastGemma2RMSNorm,
    Gemma3RMSNorm: _FastGemma3RMSNorm,
    Gemma2DecoderLayer: _FastGemma2DecoderLayer,
    Gemma3DecoderLayer: _FastGemma3DecoderLayer,
}
