"""LoRA layers that multiply once: y = x (W + s B A)^T, where s is the LoRA's scaling.

PEFT's layer computes x W^T + s (x A^T) B^T, which takes three products and three passes over y. Here the sum of the
weights is kept, and made anew when A or B has changed. W itself stays as it is, to the bit: it is the reference policy.
The gradients of A and B come from skinny products that are laid out as the CPU's library (MKL) is fast at.
For decoding the sum is kept in another layout: for the few rows of a step, oneDNN on packed weights is twice as fast as
MKL on two threads, and XLA on the CPU is twice as fast where it need not transpose the weights for every token.

Only where weights are float32: in bfloat16 the sum would round small updates away.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import peft.tuners.lora
import torch
from torch import Tensor, nn

from . import device

_ON_XLA = device.KIND == "xla"
_CAN_PACK = _ON_XLA or torch.backends.mkldnn.is_available()
_PACKED_ROWS = 256  # at most: above that MKL is as fast


class _MergedProduct(torch.autograd.Function):
    """x (..., in), A (rank, in), B (out, rank), W + s B A (out, in) -> (..., out); gradients for x, A and B."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, a, b, weight)
        ctx.scaling = scaling
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, weight = ctx.saved_tensors
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (R, in), (R, out)
        grad_x = (grad_rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        grad_a = ctx.scaling * (_project(grad_rows, b.t()) @ rows)  # (rank, R) @ (R, in)
        grad_b = ctx.scaling * (_project(rows, a) @ grad_rows).t()  # ((rank, R) @ (R, out))^T
        return grad_x, grad_a, grad_b, None, None


def _project(rows: Tensor, matrix: Tensor) -> Tensor:
    """matrix (rank, D), rows (R, D) -> (rank, R), in the order that is faster."""
    return (rows @ matrix.t()).t() if _ON_XLA else matrix @ rows.t()


class MergedLinear(peft.tuners.lora.Linear):
    """PEFT's LoRA layer with another `forward`. An instance is made by `merge_lora`, out of PEFT's own."""

    _sum: Tensor | None = None  # W + s B A, (out, in)
    _made_from: tuple[object, ...] = ()
    _matrices: tuple[Tensor, ...] = ()  # A and B of that time; fused optimizers leave no other sign of a change
    _packed: Tensor | None = None  # the sum, packed by oneDNN; on XLA transposed, and always the same tensor
    _decoding = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        plain = not (args or kwargs or self.disable_adapters or self.merged) and len(names) == 1
        if not plain or (self.training and not isinstance(self.lora_dropout[names[0]], nn.Identity)):
            return super().forward(x, *args, **kwargs)
        if torch.is_grad_enabled():
            a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
            return _MergedProduct.apply(x, a, b, self.merged_weight(names[0]), self.scaling[names[0]])
        if self._decoding and _ON_XLA:
            return x @ self._packed
        if self._decoding and x.shape[:-1].numel() <= _PACKED_ROWS:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return nn.functional.linear(x, self.merged_weight(names[0]))

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """W + s B A of an adapter, (out, in). On XLA it is computed in each graph, as to compare A and B would wait."""
        a, b, base = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer.weight
        if _ON_XLA:
            return torch.addmm(base, b, a, alpha=self.scaling[name])
        key = (name, self.scaling[name], base.data_ptr(), base._version)
        if key != self._made_from or not (torch.equal(a, self._matrices[0]) and torch.equal(b, self._matrices[1])):
            self._sum = torch.addmm(base, b, a, alpha=self.scaling[name])
            self._made_from, self._matrices = key, (a.detach().clone(), b.detach().clone())
        return self._sum

    @torch.no_grad()
    def pack(self) -> None:
        """Make the copy for decoding. A and B must not change until `unpack`."""
        if len(self.active_adapters) != 1:
            return
        weight = self.merged_weight(self.active_adapters[0])
        if not _ON_XLA:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        elif self._packed is None:
            self._packed = weight.t().contiguous()
        else:
            self._packed.copy_(weight.t())
        self._decoding = True

    def unpack(self) -> None:
        """Free the copy for decoding, but on XLA, where the compiled step knows it."""
        self._decoding = False
        if not _ON_XLA:
            self._packed = None


def merge_lora(model: nn.Module) -> None:
    """Give every plain LoRA layer (float32 weights, no bias, no variant such as DoRA) the faster `forward`."""
    for layer in model.modules():
        if type(layer) is peft.tuners.lora.Linear and isinstance(layer.base_layer, nn.Linear):
            parts = [layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values()]
            plain = all(part.bias is None and part.weight.dtype == torch.float32 for part in parts)
            if plain and not layer.lora_variant and not layer.fan_in_fan_out:
                layer.__class__ = MergedLinear


@contextlib.contextmanager
def packed_for_decoding(model: nn.Module) -> Iterator[None]:
    """Within this context decode steps are fast, and A and B must not change."""
    layers = [layer for layer in model.modules() if isinstance(layer, MergedLinear)] if _CAN_PACK else []
    for layer in layers:
        layer.pack()
    try:
        yield
    finally:
        for layer in layers:
            layer.unpack()
