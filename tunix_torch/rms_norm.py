"""Gemma's RMSNorm in few operations: y = x / rms(x) * (1 + w).

Transformers' takes seven operations forward, and autograd keeps what each of them made. On a CPU with two cores that is
a tenth of a training step; in this form learning through a norm takes a quarter of the time, and decoding half of it
(`python -m benchmarks.rms_norm`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm


def _inverse_rms(x: Tensor, eps: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, which stays as 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


class _ScaledNorm(torch.autograd.Function):
    """x (..., D), scale (D,), eps () -> x / rms(x) * scale, with a gradient for x."""

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


class _FastRMSNorm(nn.Module):
    """Takes the fast way for float32 with a frozen weight, which is what LoRA training has; else the class's own."""

    _made_from: tuple[Any, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.requires_grad:
            return super().forward(x)
        made_from = (weight, weight._version)
        if self._made_from[1:] != made_from[1:] or self._made_from[0] is not weight:
            with torch.inference_mode(False), torch.no_grad():
                self._scale, self._eps, self._made_from = 1 + weight, weight.new_tensor(self.eps), made_from
        if torch.is_grad_enabled() and x.requires_grad:
            return _ScaledNorm.apply(x, self._scale, self._eps)
        return (x * _inverse_rms(x, self._eps)).mul_(self._scale)


_FAST = {kind: type(f"Fast{kind.__name__}", (_FastRMSNorm, kind), {}) for kind in (Gemma2RMSNorm, Gemma3RMSNorm)}


def speed_up_norms(model: nn.Module) -> None:
    """Give the RMSNorms of Gemma 2 and 3 the faster `forward`."""
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
