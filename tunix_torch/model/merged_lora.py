"""LoRA layers that multiply once: y = x (W + s B A)^T, where s is the LoRA's scaling.

PEFT's layer computes x W^T + s (x A^T) B^T, which takes three products and three passes over y. Here the sum of the
weights is kept, and made anew when A or B has changed. W itself stays as it is, to the bit: it is the reference policy.
The gradients of A and B come from skinny products, in the order in which the CPU's libraries are fast (MKL, XLA's own).
For decoding on XLA the sum is kept transposed: on the CPU that is twice as fast, as no step has to do it.

Only where weights are float32: in bfloat16 the sum would round small updates away. It costs memory: on the CPU the sums
are a second copy of the projections, and while decoding, packed ones are a third.
"""

from typing import Any

import peft.tuners.lora
import torch
from torch import Tensor, nn

from ..runtime import device

_ON_XLA = device.KIND == "xla"


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
        grad_a = ctx.scaling * _product_of_projected(grad_rows, b.t(), rows)
        grad_b = ctx.scaling * _product_of_projected(rows, a, grad_rows).t()
        return grad_x, grad_a, grad_b, None, None


def _product_of_projected(rows: Tensor, matrix: Tensor, others: Tensor) -> Tensor:
    """matrix (rank, D), rows (R, D), others (R, E) -> matrix rows^T others, (rank, E).

    Left to itself, XLA merges transpositions before and after into its products, which takes the CPU ten times as long.
    """
    if not _ON_XLA:
        return (matrix @ rows.t()) @ others
    return device.optimization_barrier(device.optimization_barrier(rows @ matrix.t()).t() @ others)


class MergedLinear(peft.tuners.lora.Linear):
    """PEFT's LoRA layer with another `forward`. PEFT's own becomes one within `decoding.fast_layers`."""

    _sum: Tensor | None = None  # W + s B A, (out, in)
    _made_from: tuple[Any, ...] = ()  # W, s, and A and B as they were: fused optimizers leave no other sign of a change
    _packed: Tensor | None = None  # on XLA: the sum, transposed; always the same tensor
    _decoding = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._decoding and not (self._disable_adapters or torch.is_grad_enabled()):  # `pack` has looked at the rest
            return x @ self._packed
        name = None if args or kwargs else self._plain_adapter(x.device)
        if name is None:
            return super().forward(x, *args, **kwargs)
        if torch.is_grad_enabled():
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return _MergedProduct.apply(x, a, b, self.merged_weight(name), self.scaling[name])
        return nn.functional.linear(x, self.merged_weight(name))

    def _plain_adapter(self, place: torch.device) -> str | None:
        """The adapter that acts alone here, if adding it to the weights says it all; else PEFT's way is taken."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        if self.training and not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        weights = (self.base_layer.weight, self.lora_A[name].weight, self.lora_B[name].weight)
        exact = all(weight.dtype == torch.float32 for weight in weights)
        return name if exact and not torch.is_autocast_enabled(place.type) else None

    @torch.no_grad()
    def merged_weight(self, name: str) -> Tensor:
        """W + s B A of an adapter, (out, in). On XLA it is computed in each graph, as to compare A and B would wait.

        W is told by its identity and version: a change through `W.data`, which leaves neither, is not seen.
        """
        a, b, base = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer.weight
        if _ON_XLA:  # not by addmm, which torch-xla leaves to the host where its alpha is not 1
            return base + self.scaling[name] * (b @ a)
        key = (name, self.scaling[name], base._version)
        if self._sum is not None:
            old_key, old_base, old_a, old_b = self._made_from
            if old_key == key and old_base is base and torch.equal(a, old_a) and torch.equal(b, old_b):
                return self._sum
        with torch.inference_mode(False), torch.no_grad():  # a learning pass may take it
            self._sum = torch.addmm(base, b, a, alpha=self.scaling[name])
            self._made_from = (key, base, a.detach().clone(), b.detach().clone())
        return self._sum

    @torch.no_grad()
    def pack(self) -> None:
        """On XLA, make the copy for decoding. A and B must not change until `unpack`."""
        name = self._plain_adapter(self.base_layer.weight.device)
        if name is None:
            return
        weight = self.merged_weight(name)
        if self._packed is None:
            self._packed = weight.t().contiguous()
        else:
            self._packed.copy_(weight.t())
        self._decoding = True

    def unpack(self) -> None:
        """The copy stays: the compiled step knows it."""
        self._decoding = False


def faster_lora(layer: nn.Module) -> type | None:
    """`MergedLinear` for a plain LoRA layer: one with float32 weights, no bias, and no variant such as DoRA."""
    if type(layer) is not peft.tuners.lora.Linear or not isinstance(layer.base_layer, nn.Linear):
        return None
    parts = [layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values()]
    plain = all(part.bias is None and part.weight.dtype == torch.float32 for part in parts)
    return MergedLinear if plain and not layer.lora_variant and not layer.fan_in_fan_out else None


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The one float32 matrix, (out, in), by which a layer multiplies now; None: there is more to it."""
    name = None
    if isinstance(layer, peft.tuners.lora.Linear):
        if isinstance(layer, MergedLinear):
            name = layer._plain_adapter(layer.base_layer.weight.device)
        if name is not None:
            return layer.merged_weight(name)
        if layer.merged or not layer.disable_adapters:
            return None
        layer = layer.base_layer
    if type(layer) is not nn.Linear or layer.bias is not None or layer.weight.dtype != torch.float32:
        return None
    return None if torch.is_autocast_enabled(layer.weight.device.type) else layer.weight
