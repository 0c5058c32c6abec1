"""Google's Tunix on JAX: its models, log-probabilities, advantages, loss and gradients. The only importer of Tunix.

Nothing is computed anew here: every number comes from a function of google-tunix (and AdamW from optax, as Tunix's
trainers take it). This file moves weights and batches across.
"""

import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_TRACEBACK_FILTERING", "off")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig
from tunix.models.gemma import model as gemma2
from tunix.models.gemma import params_safetensors as gemma2_loader
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import params_safetensors as gemma3_loader
from tunix.models.gemma4 import model as gemma4
from tunix.models.gemma4 import params_safetensors as gemma4_loader
from tunix.rl import algo_core, common
from tunix.rl.grpo.grpo_learner import GRPOConfig as TunixConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from .. import GRPOConfig
from ..batch import TrainBatch

Lora = dict[str, np.ndarray]  # by PEFT's parameter name
KL_NAMES = {"k1": "kl", "k2": "mse_kl", "k3": "low_var_kl"}
TUNIX_EPSILON = 1e-6  # beside the standard deviation, a constant in its compute_advantages
ESTIMATORS = {"rloo": "rloo", "dr_grpo": "drgrpo"}
LORA_NAME = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.lora_([AB])\.")


# ---- models ----


def load_base(folder: Path, config: PretrainedConfig) -> nnx.Module:
    """Tunix's own model with the weights that `save_pretrained` wrote, in float32.

    Raises:
        ValueError: a model that Tunix has no like of.
    """
    if config.model_type not in ("gemma2", "gemma3_text", "gemma4_text"):
        raise ValueError(f"model type {config.model_type!r}: the cross-check knows gemma2, gemma3_text and gemma4_text")
    sizes = {
        "num_layers": config.num_hidden_layers,
        "num_embed": config.vocab_size,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "num_kv_heads": config.num_key_value_heads,
        "sliding_window_size": config.sliding_window,
    }
    load = {"gemma2": _load_gemma2, "gemma3_text": _load_gemma3, "gemma4_text": _load_gemma4}[config.model_type]
    return load(folder, config, sizes)


def _attention_types(module: object, config: PretrainedConfig) -> tuple:
    kinds = {"full_attention": module.AttentionType.GLOBAL, "sliding_attention": module.AttentionType.LOCAL_SLIDING}
    return tuple(kinds[name] for name in config.layer_types)


def _load_gemma2(folder: Path, config: PretrainedConfig, sizes: dict[str, int]) -> nnx.Module:
    tunix_config = gemma2.ModelConfig(
        **sizes,
        final_logit_softcap=config.final_logit_softcapping,
        attn_logits_soft_cap=config.attn_logit_softcapping,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=_attention_types(gemma2, config),
    )
    if config.query_pre_attn_scalar != config.head_dim or config.rope_parameters["rope_theta"] != 10_000:
        raise ValueError("Tunix's Gemma 2 has query_pre_attn_scalar = head_dim and rope_theta = 10000 only")
    return gemma2_loader.create_model_from_safe_tensors(str(folder), tunix_config, dtype=jnp.float32)


def _load_gemma3(folder: Path, config: PretrainedConfig, sizes: dict[str, int]) -> nnx.Module:
    scales = {config.head_dim: 1, config.hidden_size // config.num_attention_heads: 2}  # Tunix knows these two
    if config.query_pre_attn_scalar not in scales:
        raise ValueError(f"Tunix's Gemma 3 has no query_pre_attn_scalar = {config.query_pre_attn_scalar}")
    local, full = config.rope_parameters["sliding_attention"], config.rope_parameters["full_attention"]
    tunix_config = gemma3.ModelConfig(
        **sizes,
        local_base_frequency=local["rope_theta"],
        global_base_frequency=full["rope_theta"],
        local_scale_factor=local.get("factor", 1.0),
        global_scale_factor=full.get("factor", 1.0),
        query_pre_attn_norm=gemma3.QueryPreAttentionNormalisation(scales[config.query_pre_attn_scalar]),
        param_dtype=jnp.float32,
    )
    # Tunix keeps the order of sliding and full layers in a constant of the module
    with mock.patch.object(gemma3, "GEMMA3_ATTENTION_PATTERN", _attention_types(gemma3, config)):
        return gemma3_loader.create_model_from_safe_tensors(str(folder), tunix_config, dtype=jnp.float32)


def _load_gemma4(folder: Path, config: PretrainedConfig, sizes: dict[str, int]) -> nnx.Module:
    if config.num_kv_shared_layers:
        raise ValueError(
            f"num_kv_shared_layers={config.num_kv_shared_layers}: Tunix 0.1.7 wants K and V weights of every layer, "
            "which Hugging Face does not save for Gemma 4's layers that share them"
        )
    full = config.rope_parameters["full_attention"]
    tunix_config = gemma4.ModelConfig(
        **sizes,
        final_logit_softcap=config.final_logit_softcapping,
        per_layer_input_dim=config.hidden_size_per_layer_input,
        num_global_kv_heads=config.num_global_key_value_heads,
        global_key_size=config.global_head_dim,
        attention_pattern=_attention_types(gemma4, config),
        global_rope_proportion=full.get("partial_rotary_factor", 1.0),
        local_base_frequency=config.rope_parameters["sliding_attention"]["rope_theta"],
        global_base_frequency=full["rope_theta"],
        k_eq_v_global=config.attention_k_eq_v,
    )
    # its loader wants the names that the text model has inside the multimodal one
    with tempfile.TemporaryDirectory() as renamed:
        weights = {}
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
        if not any("language_model" in name for name in weights):
            weights = {name.replace("model.", "model.language_model.", 1): w for name, w in weights.items()}
        save_file(weights, Path(renamed) / "model.safetensors")
        shutil.copy(folder / "config.json", renamed)
        return gemma4_loader.create_model_from_safe_tensors(renamed, tunix_config, dtype=jnp.float32)


# ---- LoRA, both ways ----


@dataclasses.dataclass(frozen=True)
class LoraMap:
    """The exact map between PEFT's LoRA matrices and qwix's.

    PEFT: A is (r, in), B is (out, r), for each projection. qwix has one pair a weight, and Tunix keeps K and V (Q too,
    when there are as many KV heads as heads) in one weight. So that weight gets rank 2r (3r), with the A matrices
    side by side and B block-diagonal: what lies outside the blocks is 0 and stays 0.
    """

    config: PretrainedConfig
    rank: int
    alpha: float

    def joined(self, projection: str) -> tuple[str, ...]:
        """The projections that share a weight with this one in Tunix, in the order in which they stand there."""
        heads_equal = self.config.num_key_value_heads == self.config.num_attention_heads
        if self.config.model_type != "gemma4_text" and heads_equal and projection in "qkv":
            return ("q", "k", "v")
        return ("k", "v") if projection in "kv" else (projection,)

    def place(self, name: str) -> tuple[str, str, int, int]:
        """Where PEFT's parameter lies: Tunix's module, "A" or "B", its block, the number of blocks."""
        found = LORA_NAME.search(name)
        if found is None or "vision" in name:
            raise ValueError(f"LoRA matrix {name}: only those on q, k, v, o, gate, up and down of the text layers map")
        layer, projection, matrix = found.groups()
        blocks = self.joined(projection)
        weight = {("q", "k", "v"): "attn.qkv_einsum", ("k", "v"): "attn.kv_einsum", ("q",): "attn.q_einsum"}.get(
            blocks, "attn.attn_vec_einsum" if projection == "o" else f"mlp.{projection}_proj"
        )
        return f"layers.{layer}.{weight}", matrix, blocks.index(projection), len(blocks)

    def rules(self) -> list[qwix.LoraRule]:
        def rule(path: str, blocks: int) -> qwix.LoraRule:
            return qwix.LoraRule(module_path=path, rank=blocks * self.rank, alpha=blocks * self.alpha)

        return [
            rule(r".*qkv_einsum", 3),
            rule(r".*kv_einsum", 2),
            rule(r".*(q_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)", 1),
        ]

    def put(self, name: str, value: np.ndarray, target: np.ndarray) -> None:
        """Write PEFT's matrix into qwix's, in place."""
        self._view(name, target)[...] = value.T.reshape(self._view(name, target).shape)

    def get(self, name: str, source: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Read PEFT's matrix, of the given shape, out of qwix's."""
        return self._view(name, source).reshape(shape[::-1]).T

    def _view(self, name: str, array: np.ndarray) -> np.ndarray:
        _, matrix, block, blocks = self.place(name)
        rows = slice(block * self.rank, (block + 1) * self.rank)
        if matrix == "A":
            return array[..., rows]  # (in..., rank of all blocks)
        return array[rows, block] if blocks > 1 else array[rows]  # (rank of all blocks, [block,] out...)


class TunixPolicy:
    """Tunix's model without a LoRA (the reference) and with one (the policy).

    Args:
        folder: what `save_pretrained` wrote of the base model.
        config: of that model.
        lora_shapes: shape of every LoRA matrix by PEFT's name.
        rank, alpha: of the LoRA.
    """

    def __init__(
        self, folder: Path, config: PretrainedConfig, lora_shapes: dict[str, tuple[int, ...]], rank: int, alpha: float
    ) -> None:
        self.base = load_base(folder, config)
        self.map, self.shapes = LoraMap(config, rank, alpha), lora_shapes
        inputs = self.base.get_model_input()
        policy = qwix.apply_lora_to_model(
            load_base(folder, config), qwix.LoraProvider(self.map.rules()), rngs=nnx.Rngs(0), **inputs
        )
        self._graph, lora, self._rest = nnx.split(policy, nnx.LoRAParam, ...)
        self._treedef = jax.tree.structure(lora)
        self._paths = [_path_name(path) for path, _ in jax.tree.leaves_with_path(lora)]
        self._sizes = [leaf.shape for leaf in jax.tree.leaves(lora)]
        unknown = {self._path_of(name) for name in lora_shapes} - set(self._paths)
        assert not unknown, f"LoRA matrices that Tunix's model has no place for: {unknown}"
        self.used = self.state_of({name: np.ones(shape) for name, shape in lora_shapes.items()})  # 1 inside the blocks

    def _path_of(self, name: str) -> str:
        module, matrix, _, _ = self.map.place(name)
        weight = "kernel" if ".mlp." in module else "w"
        return f"{module}.{weight}_lora_{matrix.lower()}"

    def state_of(self, lora: Lora) -> nnx.State:
        """PEFT's matrices as Tunix's state."""
        arrays = {path: np.zeros(size, np.float32) for path, size in zip(self._paths, self._sizes, strict=True)}
        for name, value in lora.items():
            self.map.put(name, np.asarray(value), arrays[self._path_of(name)])
        return jax.tree.unflatten(self._treedef, [jnp.asarray(arrays[path]) for path in self._paths])

    def lora_of(self, state: nnx.State) -> Lora:
        """Tunix's state (weights, or their gradients) as PEFT's matrices."""
        arrays = dict(zip(self._paths, map(np.asarray, jax.tree.leaves(state)), strict=True))
        return {name: self.map.get(name, arrays[self._path_of(name)], shape) for name, shape in self.shapes.items()}

    def policy(self, state: nnx.State) -> nnx.Module:
        return nnx.merge(self._graph, state, self._rest)


def _path_name(path: tuple) -> str:
    keys = [str(getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry)))) for entry in path]
    return ".".join(key for key in keys if key != "value")


# ---- batches and settings ----


@dataclasses.dataclass(frozen=True)
class TunixBatch:
    """A batch in Tunix's terms: a prompt a row, completions as wide as is allowed, and a padding token.

    Tunix takes every token that equals `pad_id` for padding, wherever it stands. So padding gets an id that occurs
    nowhere else, and real tokens stay what they are.
    """

    prompt_ids: jax.Array  # (B, P) int32
    completion_ids: jax.Array  # (B, C) int32
    completion_mask: jax.Array  # (B, C) int32
    pad_id: int

    @classmethod
    def of(cls, batch: TrainBatch, completion_width: int, vocabulary_size: int) -> "TunixBatch":
        """Raises ValueError when every id of the vocabulary occurs, so that none is left to mark padding."""
        group = batch.completion_ids.shape[0] // batch.prompt_ids.shape[0]
        used = set(batch.prompt_ids[batch.prompt_mask].tolist())
        used |= set(batch.completion_ids[batch.completion_mask].tolist())
        free = next((i for i in range(vocabulary_size) if i not in used), None)
        if free is None:
            raise ValueError("every token of the vocabulary occurs in this batch: none is left to mark padding")
        room = completion_width - batch.completion_ids.shape[1]
        mask = torch.nn.functional.pad(batch.completion_mask, (0, room))
        ids = torch.nn.functional.pad(batch.completion_ids, (0, room)).masked_fill(~mask, free)
        prompts = batch.prompt_ids.masked_fill(~batch.prompt_mask, free).repeat_interleave(group, dim=0)
        return cls(_int32(prompts), _int32(ids), _int32(mask), free)


def _int32(tensor: torch.Tensor) -> jax.Array:
    return jnp.asarray(tensor.numpy().astype(np.int32))


def padded(values: torch.Tensor | None, width: int) -> jax.Array | None:
    """(B, c) -> (B, width) float32; None stays None."""
    if values is None:
        return None
    return jnp.asarray(torch.nn.functional.pad(values.float(), (0, width - values.shape[1])).numpy())


def settings_of(args: GRPOConfig) -> TunixConfig:
    """Our settings as Tunix's."""
    config = TunixConfig(
        num_generations=args.num_completions_per_prompt,
        num_iterations=args.num_iterations,
        beta=args.beta,
        epsilon=args.epsilon,
        loss_agg_mode=args.aggregation,
        kl_loss_mode=KL_NAMES[args.kl_estimator],
        loss_algo="gspo-token" if args.algorithm == "gspo" else "grpo",
    )
    config.temperature = args.generation_temperature  # as its learner does
    config.epsilon_high, config.epsilon_c, config.kl_clamp_value = args.clip_high, args.epsilon_c, args.kl_clamp_value
    return config


# ---- what it computes ----


def advantages(rewards: np.ndarray, args: GRPOConfig) -> np.ndarray:
    """(B,) rewards -> (B,) advantages by Tunix's own estimator."""
    name = ESTIMATORS.get(args.algorithm, "grpo" if args.normalize_advantages else "drgrpo")
    estimate = algo_core.registry.get("advantage_estimator", name)
    return np.asarray(estimate(rewards=rewards, num_generations=args.num_completions_per_prompt))


def completion_mask(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """(B, C) 1 up to and including the first `eos_id`, by Tunix's own function."""
    return common.np_make_completion_mask(ids, eos_id)


def padding_mask(prompt_ids: np.ndarray, completion_ids: np.ndarray, pad_id: int) -> np.ndarray:
    """(B, C) which completion tokens Tunix's log-probabilities take for real ones, by its own function."""
    *_, mask = common.process_ids(jnp.asarray(prompt_ids), jnp.asarray(completion_ids), pad_id, pad_id)
    return np.asarray(mask)[:, prompt_ids.shape[1] :]


def token_logps(model: nnx.Module, batch: TunixBatch, temperature: float) -> np.ndarray:
    """(B, C) log-probabilities, 0 where masked."""
    graph, state = nnx.split(model)
    logps = common.compute_per_token_logps(
        graph,
        state,
        prompt_tokens=batch.prompt_ids,
        completion_tokens=batch.completion_ids,
        pad_id=batch.pad_id,
        eos_id=-1,
        temperature=temperature,
    )
    return np.asarray(logps * batch.completion_mask)


def old_logps(model: nnx.Module, batch: TunixBatch) -> np.ndarray:
    """(B, C) what Tunix's learner takes for old log-probabilities: the method of its rollout, 0 where masked."""

    class Rollout:  # what that method reads of itself
        _sampler = SimpleNamespace(model_def_and_state=lambda: nnx.split(model))
        pad_id = staticmethod(lambda: batch.pad_id)
        eos_id = staticmethod(lambda: -1)

    logps = VanillaRollout.get_per_token_logps(Rollout, batch.prompt_ids, batch.completion_ids)
    return np.asarray(logps * batch.completion_mask)


@dataclasses.dataclass
class TunixLoss:
    """Scalars as floats; gradients by PEFT's parameter names."""

    loss: float
    policy_loss: float
    kl_loss: float
    gradients: Lora
    state: nnx.State  # the gradients as Tunix holds them, 0 outside the blocks


def loss_and_gradients(
    tunix: TunixPolicy,
    lora: nnx.State,
    batch: TunixBatch,
    advantages: np.ndarray,
    ref_logps: jax.Array | None,
    old_logps: jax.Array | None,
    config: TunixConfig,
) -> TunixLoss:
    """Tunix's `grpo_loss_fn` and its gradient with respect to the LoRA."""
    example = common.TrainExample(
        prompt_ids=batch.prompt_ids,
        prompt_mask=batch.prompt_ids != batch.pad_id,
        completion_ids=batch.completion_ids,
        completion_mask=batch.completion_mask,
        advantages=jnp.asarray(advantages, jnp.float32),
        ref_per_token_logps=ref_logps,
        old_per_token_logps=old_logps,
    )

    def loss(state: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
        return algo_core.grpo_loss_fn(tunix.policy(state), example, config, batch.pad_id, -1)

    (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(lora)
    gradient = jax.tree.map(jnp.multiply, gradient, tunix.used)
    return TunixLoss(
        loss=float(value),
        policy_loss=float(terms["pg_loss"]),
        kl_loss=float(terms["kl_loss"]),
        gradients=tunix.lora_of(gradient),
        state=gradient,
    )


@functools.cache
def _optimizer(
    max_norm: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> tuple[optax.GradientTransformation, Callable]:
    clip = [optax.clip_by_global_norm(max_norm)] if max_norm else []
    optimizer = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(
            *clip, optax.adamw(learning_rate, beta1, beta2, epsilon, weight_decay=weight_decay)
        )
    )(learning_rate=0.0)

    @jax.jit
    def step(weights: nnx.State, gradient: nnx.State, state: Any) -> tuple[nnx.State, Any]:
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state

    return optimizer, step


def adamw(args: GRPOConfig) -> Callable[[nnx.State, nnx.State, Any, float], tuple[nnx.State, Any]]:
    """One step of optax's AdamW with clipping by global norm: (weights, gradient, its state or None, learning rate)."""
    optimizer, compiled = _optimizer(
        args.max_grad_norm, args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay
    )

    def step(weights: nnx.State, gradient: nnx.State, state: Any, learning_rate: float) -> tuple[nnx.State, Any]:
        state = optimizer.init(weights) if state is None else state
        state.hyperparams["learning_rate"] = jnp.asarray(learning_rate, jnp.float32)
        return compiled(weights, gradient, state)

    return step
