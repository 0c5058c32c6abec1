"""A LoRA layer that multiplies once: y = x (W + s B A)^T, where s is the scaling of the LoRA.

PEFT's layer computes x W^T + s (x A^T) B^T, which takes three products and three passes over y. This layer keeps the
sum of the weights, and computes it again when A or B has changed. W itself never changes, since the reference policy
needs it. The gradients of A and B come from skinny products, in the order in which the libraries of the CPU (MKL,
XLA's own) are fast. To decode through XLA the transposed sum is kept, which is twice as fast on the CPU, since no step
transposes.

The weights must be float32: in bfloat16 the sum would round small updates away. The price is memory. On the CPU the
sums are a second copy of the projections, and while decoding, the copies that oneDNN has laid out are a third.
"""

from typing import Any

import peft.tuners.lora
import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..runtime import compiled, device

_TRACED = device.traces_graphs()


def _weight_of(module: nn.Module) -> Tensor:
    return module.weight


# DoRA asks for a layer's weight in a way that looks at the name of a class, which `torch.compile` can't trace.
compiled.trace_as(dequantize_module_weight, _weight_of)


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
    if not _TRACED:
        return (matrix @ rows.t()) @ others
    return device.optimization_barrier(device.optimization_barrier(rows @ matrix.t()).t() @ others)


class MergedLinear(peft.tuners.lora.Linear):
    """PEFT's LoRA layer with another `forward`. `decoding.fast_layers` makes it of PEFT's own layer."""

    _sum: Tensor | None = None  # W + s B A, (out, in)
    # W, s, and copies of A and B: fused optimizers change these without raising their version
    _made_from: tuple[Any, ...] = ()
    _decode_weight: Tensor | None = None  # where steps are compiled: the transposed sum, always in the same tensor
    _decoding = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # `prepare_to_decode` has seen that the merged weight is all that the layer computes with
        if self._decoding and not (self._disable_adapters or torch.is_grad_enabled()):
            return x @ self._decode_weight
        name = None if args or kwargs else self._plain_adapter(x.device)
        if name is None:
            return super().forward(x, *args, **kwargs)
        if torch.is_grad_enabled():
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            return _MergedProduct.apply(x, a, b, self.merged_weight(name), self.scaling[name])
        return nn.functional.linear(x, self.merged_weight(name))

    def _plain_adapter(self, place: torch.device) -> str | None:
        """The only active adapter, if adding it to the weights gives all that it does. None: PEFT's way is taken."""
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
        """W + s B A of an adapter, (out, in). Traced graphs compute it each time, since comparing A and B would wait.

        A change of W is noticed by its identity and its version. A change through `W.data` alters neither.
        """
        a, b, base = self.lora_A[name].weight, self.lora_B[name].weight, self.base_layer.weight
        if _TRACED:  # not by addmm, which torch-xla leaves to the host where its alpha is not 1
            return base + self.scaling[name] * (b @ a)
        key = (name, self.scaling[name], base._version)
        if self._sum is not None:
            old_key, old_base, old_a, old_b = self._made_from
            if old_key == key and old_base is base and torch.equal(a, old_a) and torch.equal(b, old_b):
                return self._sum
        with torch.inference_mode(False), torch.no_grad():  # so that a learning pass may use it
            self._sum = torch.addmm(base, b, a, alpha=self.scaling[name])
            self._made_from = (key, base, a.detach().clone(), b.detach().clone())
        return self._sum

    @torch.no_grad()
    def prepare_to_decode(self) -> None:
        """Copy the transposed sum for compiled steps. A and B must not change until `end_decoding`."""
        name = self._plain_adapter(self.base_layer.weight.device)
        if name is None:
            return
        weight = self.merged_weight(name)
        if self._decode_weight is None:
            self._decode_weight = weight.t().contiguous()
        else:
            self._decode_weight.copy_(weight.t())
        self._decoding = True

    def end_decoding(self) -> None:
        """Use the sum again. The copy stays, since the compiled step reads it."""
        self._decoding = False


def faster_lora(layer: nn.Module) -> type | None:
    """`MergedLinear` for a plain LoRA layer, with float32 weights, no bias and no variant such as DoRA. Else None."""
    if type(layer) is not peft.tuners.lora.Linear or not isinstance(layer.base_layer, nn.Linear):
        return None
    parts = [layer.base_layer, *layer.lora_A.values(), *layer.lora_B.values()]
    plain = all(part.bias is None and part.weight.dtype == torch.float32 for part in parts)
    return MergedLinear if plain and not layer.lora_variant and not layer.fan_in_fan_out else None


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The float32 matrix, (out, in), by which a layer multiplies now. None: the layer does more than that."""
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
