"""Move LoRA weights between PEFT (PyTorch) and Tunix (qwix on JAX), exactly, for the cross-check."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from transformers import PretrainedConfig

from .tunix_models import load_tunix_model

Lora = dict[str, np.ndarray]  # by PEFT's parameter name
LORA_NAME = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.lora_([AB])\.")


@dataclasses.dataclass(frozen=True)
class LoraMap:
    """The exact map between the LoRA matrices of PEFT and those of qwix, Tunix's LoRA library.

    PEFT has a pair of matrices for each projection: A (r, in) and B (out, r). qwix has one pair for each weight, and
    Tunix keeps K and V in one weight, and Q too when there are as many KV heads as heads. Such a weight therefore gets
    rank 2r (or 3r): its A matrix has the A matrices of the projections side by side, and its B matrix is
    block-diagonal. Outside the blocks B is 0 and stays 0.
    """

    config: PretrainedConfig
    rank: int
    alpha: float

    def projections_in_weight(self, projection: str) -> tuple[str, ...]:
        """Return the projections that share a weight with this one in Tunix, in the order of their blocks."""
        heads_equal = self.config.num_key_value_heads == self.config.num_attention_heads
        if self.config.model_type != "gemma4_text" and heads_equal and projection in "qkv":
            return ("q", "k", "v")
        return ("k", "v") if projection in "kv" else (projection,)

    def location_of(self, name: str) -> tuple[str, str, int, int]:
        """Return where PEFT's parameter is in Tunix's model: the module, "A" or "B", its block, the number of blocks.

        Raises:
            ValueError: Tunix has no LoRA for this weight.
        """
        found = LORA_NAME.search(name)
        if found is None or "vision" in name:
            raise ValueError(f"LoRA matrix {name}: only those on q, k, v, o, gate, up and down of the text layers map")
        layer, projection, matrix = found.groups()
        blocks = self.projections_in_weight(projection)
        weight = {("q", "k", "v"): "attn.qkv_einsum", ("k", "v"): "attn.kv_einsum", ("q",): "attn.q_einsum"}.get(
            blocks, "attn.attn_vec_einsum" if projection == "o" else f"mlp.{projection}_proj"
        )
        return f"layers.{layer}.{weight}", matrix, blocks.index(projection), len(blocks)

    def lora_rules(self) -> list[qwix.LoraRule]:
        """Return the rules by which qwix gives each weight a LoRA, whose rank and alpha grow with its blocks."""

        def rule(path: str, blocks: int) -> qwix.LoraRule:
            return qwix.LoraRule(module_path=path, rank=blocks * self.rank, alpha=blocks * self.alpha)

        return [
            rule(r".*qkv_einsum", 3),
            rule(r".*kv_einsum", 2),
            rule(r".*(q_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)", 1),
        ]

    def write(self, name: str, value: np.ndarray, target: np.ndarray) -> None:
        """Write PEFT's matrix `value` into qwix's matrix `target`, in place."""
        self._block(name, target)[...] = value.T.reshape(self._block(name, target).shape)

    def read(self, name: str, source: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return PEFT's matrix, which has the given shape, out of qwix's matrix `source`."""
        return self._block(name, source).reshape(shape[::-1]).T

    def _block(self, name: str, array: np.ndarray) -> np.ndarray:
        """Return the part of qwix's matrix that belongs to PEFT's parameter, as a view."""
        _, matrix, block, blocks = self.location_of(name)
        rows = slice(block * self.rank, (block + 1) * self.rank)
        if matrix == "A":
            return array[..., rows]  # (in..., rank of all blocks)
        return array[rows, block] if blocks > 1 else array[rows]  # (rank of all blocks, [block,] out...)


class TunixPolicy:
    """Tunix's model without a LoRA (the reference) and with one (the policy).

    Args:
        folder: of the base model, as `save_pretrained` wrote it.
        config: of the base model.
        lora_shapes: the shape of every LoRA matrix, by PEFT's name.
        rank, alpha: of the LoRA.
    """

    def __init__(
        self, folder: Path, config: PretrainedConfig, lora_shapes: dict[str, tuple[int, ...]], rank: int, alpha: float
    ) -> None:
        self.base = load_tunix_model(folder, config)
        self.map, self.shapes = LoraMap(config, rank, alpha), lora_shapes
        inputs = self.base.get_model_input()
        policy = qwix.apply_lora_to_model(
            load_tunix_model(folder, config), qwix.LoraProvider(self.map.lora_rules()), rngs=nnx.Rngs(0), **inputs
        )
        self._graph, lora, self._rest = nnx.split(policy, nnx.LoRAParam, ...)
        self._treedef = jax.tree.structure(lora)
        self._paths = [_path_name(path) for path, _ in jax.tree.leaves_with_path(lora)]
        self._sizes = [leaf.shape for leaf in jax.tree.leaves(lora)]
        unknown = {self._path_of(name) for name in lora_shapes} - set(self._paths)
        assert not unknown, f"LoRA matrices that Tunix's model has no place for: {unknown}"
        self.block_mask = self.state_of({name: np.ones(shape) for name, shape in lora_shapes.items()})  # 1 in blocks

    def _path_of(self, name: str) -> str:
        module, matrix, _, _ = self.map.location_of(name)
        weight = "kernel" if ".mlp." in module else "w"
        return f"{module}.{weight}_lora_{matrix.lower()}"

    def state_of(self, lora: Lora) -> nnx.State:
        """Return PEFT's matrices as the state of Tunix's LoRA."""
        arrays = {path: np.zeros(size, np.float32) for path, size in zip(self._paths, self._sizes, strict=True)}
        for name, value in lora.items():
            self.map.write(name, np.asarray(value), arrays[self._path_of(name)])
        return jax.tree.unflatten(self._treedef, [jnp.asarray(arrays[path]) for path in self._paths])

    def lora_of(self, state: nnx.State) -> Lora:
        """Return the state of Tunix's LoRA, or gradients of the same structure, as PEFT's matrices."""
        arrays = dict(zip(self._paths, map(np.asarray, jax.tree.leaves(state)), strict=True))
        return {name: self.map.read(name, arrays[self._path_of(name)], shape) for name, shape in self.shapes.items()}

    def policy(self, state: nnx.State) -> nnx.Module:
        """Return Tunix's model with the LoRA of the given state."""
        return nnx.merge(self._graph, state, self._rest)


def _path_name(path: tuple) -> str:
    """Return a path in JAX's tree of weights as one name, such as layers.0.attn.q_einsum.w_lora_a."""
    keys = [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path]
    return ".".join(key for key in keys if key != "value")
