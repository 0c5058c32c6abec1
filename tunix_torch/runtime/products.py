"""Products of bfloat16 matrices whose results are not rounded to bfloat16: what goes into a softmax is float32.

A GPU adds up such a product in float32 anyway, so it only writes what it has. Elsewhere the matrices are widened first;
a TPU rounds operands back to bfloat16 by default, which is exact here, and adds up in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import fsdp
from .device import KIND


class _Float32Product(torch.autograd.Function):
    """bfloat16 or float16 (B, M, D) and (B, D, K) -> (B, M, K) float32, on CUDA. PyTorch gives it no gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad = grad.to(a.dtype)  # as that of a rounded product would be
        return (grad @ b.mT if ctx.needs_input_grad[0] else None), (a.mT @ grad if ctx.needs_input_grad[1] else None)


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """(..., M, D) and (..., D, K), with equal leading dimensions -> (..., M, K) float32.

    On CUDA `a` takes the type of `b` first. So it is rounded where it is wider, as the weights of attention are in
    PyTorch's fused kernels.
    """
    if KIND != "cuda" or b.dtype == torch.float32:
        return a.float() @ b.float()
    leading = a.shape[:-2]
    return _Float32Product.apply(a.to(b.dtype).flatten(0, -3), b.flatten(0, -3)).unflatten(0, leading)


def float32_scores(head: nn.Module, hidden: Tensor) -> Tensor:
    """What a language model's head makes of hidden states, (..., D) -> (..., V) float32.

    Only on CUDA are the scores of a plain head in bfloat16 not rounded. A CPU would have to widen the head's weights,
    and on a TPU scores twice as large would add an eighth to what a learning pass reads and writes (docs/gpu.md).
    """
    plain = type(head) is nn.Linear and head.bias is None and hidden.dtype == head.weight.dtype
    if KIND != "cuda" or not plain or hidden.dtype == torch.float32 or fsdp.is_part(head.weight):
        return head(hidden).float()
    rows = hidden.reshape(1, -1, hidden.shape[-1])
    return _Float32Product.apply(rows, head.weight.t()[None])[0].view(*hidden.shape[:-1], -1)
