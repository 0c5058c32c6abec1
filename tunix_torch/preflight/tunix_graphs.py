"""Trace the graphs of a training step of Google's Tunix for a slice of TPU chips, with abstract weights.

Every function that is traced is Tunix's own: its model with qwix's LoRA, its `Sampler`, its `compute_per_token_logps`,
and the train step of its `Trainer` with its GRPO loss. The weights are shapes with Tunix's own layout on the mesh, and
take no memory. `compile_tunix.py` compiles the graphs.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from jax._src.sharding_impls import GSPMDSharding
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from transformers import AutoConfig, PretrainedConfig
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.gemma import model as gemma2
from tunix.models.gemma3 import model as gemma3
from tunix.rl import common, function_registry
from tunix.rl.grpo.grpo_learner import GRPOConfig as TunixConfig
from tunix.rl.rl_cluster import RLTrainingConfig
from tunix.rl.trainer import Trainer

from ..model import tiny
from .compile_tunix import LEARNING, LOGPS, ROLLOUT, TunixRequest
from .graph_names import DECODE, LEARN, OLD, PREFILL, REFERENCE
from .tunix_configs import gemma2_config, gemma3_config, gemma3_layers

LORA_TARGETS = ".*(q_einsum|qkv_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)"


@dataclass
class TunixGraph:
    """One graph of Tunix, lowered for a slice."""

    name: str
    module: Any  # StableHLO
    free_parameters: list[bool]  # for each parameter, whether the compiler chooses its layout on the mesh
    free_results: list[bool]
    held_bytes: int  # of one chip, that the job holds besides the graph's arguments


Compile = Callable[[TunixGraph], Any]  # compiles a graph; returns the executable, None where it does not compile


@dataclass
class Policy:
    """Tunix's model, with a LoRA or without, and what its trainer holds besides. All arrays are abstract."""

    reference: nnx.Module  # without a LoRA; its weights are the same arrays as those of `actor`
    actor: nnx.Module
    trainer: Trainer
    optimizer: nnx.Optimizer

    @property
    def lora_bytes(self) -> int:
        return bytes_per_chip(nnx.state(self.actor, nnx.LoRAParam))

    @property
    def optimizer_bytes(self) -> int:
        return bytes_per_chip(nnx.state(self.optimizer))


def trace_part(request: TunixRequest, devices: list, compile_graph: Compile) -> None:
    """Trace the graphs of a part, and hand each to `compile_graph`, within the context of its module.

    Args:
        devices: chips of the slice, as many as the mesh has.
    """
    jax.config.update("jax_use_shardy_partitioner", False)  # this jaxlib's libtpu does not know it
    mesh = Mesh(np.array(devices).reshape(request.mesh[0]), tuple(request.mesh[1]))
    policy = make_policy(request, mesh)
    trace = {ROLLOUT: _trace_rollout, LOGPS: _trace_logps, LEARNING: _trace_learning}[request.part]
    trace(request, policy, mesh, compile_graph)


def make_policy(request: TunixRequest, mesh: Mesh) -> Policy:
    """Return Tunix's abstract model, the same with a LoRA, and its trainer, laid out on the mesh as Tunix does it."""
    config = AutoConfig.for_model(**request.model)
    trainers = []

    def make_reference() -> nnx.Module:
        return _model(config, request)

    def make_actor() -> tuple[nnx.Module, nnx.Optimizer]:
        model = _model(config, request)
        provider = qwix.LoraProvider(module_path=LORA_TARGETS, rank=request.lora_rank, alpha=request.lora_alpha)
        model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())
        trainers.append(_trainer(model, request))
        return model, trainers[0].optimizer

    actor, optimizer = nnx.eval_shape(make_actor)
    actor, optimizer = laid_out(actor, mesh), laid_out(optimizer, mesh)
    trainers[0].model, trainers[0].optimizer = actor, optimizer
    return Policy(laid_out(nnx.eval_shape(make_reference), mesh), actor, trainers[0], optimizer)


def _model(config: PretrainedConfig, request: TunixRequest) -> nnx.Module:
    dtype = jnp.dtype(request.dtype)
    if config.model_type == "gemma2":
        tunix_config = gemma2_config(config)
        tunix_config.remat_config = gemma2.RematConfig[request.rematerialisation]
        model = gemma2.Gemma(tunix_config, rngs=nnx.Rngs(0))
    else:
        tunix_config = gemma3_config(config, dtype)
        tunix_config.remat_config = gemma3.RematConfig[request.rematerialisation]
        with gemma3_layers(config):
            model = gemma3.Gemma3(tunix_config, rngs=nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda weight: weight.astype(dtype), nnx.state(model)))
    return model


def _trainer(model: nnx.Module, request: TunixRequest) -> Trainer:
    """Return Tunix's trainer of a model, as its `RLCluster` and `GRPOLearner` set it up."""
    clip = [optax.clip_by_global_norm(request.max_grad_norm)] if request.max_grad_norm else []
    batches = {"mini_batch_size": request.passes, "train_micro_batch_size": 1} if request.passes > 1 else {}
    optimizer = optax.chain(*clip, optax.adamw(1e-6, weight_decay=request.weight_decay))
    training = RLTrainingConfig(eval_every_n_steps=10**9, actor_optimizer=optimizer, **batches)
    trainer = Trainer(model, optimizer, training, custom_checkpoint_metadata_fn=dict)
    config = TunixConfig(num_generations=2, beta=request.beta, epsilon=request.epsilon, kl_loss_mode="low_var_kl")
    config.temperature = request.temperature
    loss = function_registry.get_policy_loss_fn(config.policy_loss_fn)
    pad_id, eos_id = _token_ids()
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algo_config, pad_id=pad_id, eos_id=eos_id
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example, "algo_config": config})
    return trainer


def _token_ids() -> tuple[int, int]:
    tokenizer = tiny.make_tokenizer()  # which tokens these are decides no shape
    return tokenizer.pad_token_id, tokenizer.eos_token_id


def laid_out(module: nnx.Module, mesh: Mesh) -> nnx.Module:
    """Return a module whose abstract arrays lie on the mesh as their own annotations say; without one, whole."""
    graph, state = nnx.split(module)

    def lay(array: jax.ShapeDtypeStruct, axes: PartitionSpec | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, axes or PartitionSpec()))

    return nnx.merge(graph, jax.tree.map(lay, state, nnx.get_partition_spec(state)))


def bytes_per_chip(tree: Any) -> int:
    """Return the bytes that the abstract arrays of a tree take on one chip."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _lowered(
    name: str, function: Any, mesh: Mesh, held_bytes: int, *args: Any, **kwargs: Any
) -> tuple[TunixGraph, Any]:
    """Lower a jitted function for the mesh's chips. Returns the graph, and jax's own object."""
    # Tunix lays out activations only where jax's first device is no CPU, which on a TPU it is not.
    with mesh, mock.patch.object(jax, "devices", lambda *backend: list(mesh.devices.flat)):
        lowered = function.lower(*args, **kwargs)
    lowered = getattr(lowered, "lowered", lowered)  # flax has an object of its own around jax's
    known = lowered._lowering.compile_args
    free = [[not hasattr(s, "_to_xla_hlo_sharding") for s in known[key]] for key in ("in_shardings", "out_shardings")]
    return TunixGraph(name, _with_listed_devices(lowered.compiler_ir("stablehlo")), *free, held_bytes), lowered


def _with_listed_devices(module: ir.Module) -> ir.Module:
    """Return a module in which each layout lists its devices, in place of the short form devices=[1,4,2]<=[2,4]T(1,0).

    The layouts are the same. But the compiler writes the groups of chips of each collective as it was given them, and
    of the short form this jaxlib reads nothing out of a program of this libtpu.
    """

    def listed(match: re.Match[str]) -> str:
        sizes = [int(size) for size in match["sizes"].split(",")]
        order = [int(axis) for axis in match["order"].split(",")] if match["order"] else range(len(sizes))
        devices = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).flatten()
        return f"devices=[{match['tiles']}]{','.join(map(str, devices))}"

    short = r"devices=\[(?P<tiles>[\d,]+)\]<=\[(?P<sizes>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
    with module.context:
        return ir.Module.parse(re.sub(short, listed, str(module)))


def _trace_rollout(request: TunixRequest, policy: Policy, mesh: Mesh, compile_graph: Compile) -> None:
    """Trace the prefill of Tunix's sampler, and one turn of its decoding loop."""
    config, room = policy.actor.config, request.prompt_length + request.completion_length
    sampler = Sampler(
        policy.actor,
        tiny.make_tokenizer(),
        CacheConfig(room, config.num_layers, config.num_kv_heads, config.head_dim),
    )
    sampler.eos_ids = jnp.array([sampler.tokenizer.eos_id()])  # as `Sampler.__call__` sets it
    greedy = request.temperature == 0
    state = sampler.init_sample_state(
        jnp.ones((request.rows, request.prompt_length), jnp.int32),
        total_sampling_steps=room,
        include_logits=False,
        forbidden_token_ids=None,
        temperature=request.temperature,
        top_p=None if greedy else request.top_p,
        top_k=None if greedy else request.top_k or None,
        seed=jax.random.PRNGKey(0),
        beam_size=None,
    )
    state = jax.tree.map(_abstract, state)  # Tunix's caches have no layout of their own: the compiler chooses it
    weights, held = sampler._flattened_transformer_state, policy.optimizer_bytes
    prefill, lowered = _lowered(PREFILL, sampler._compiled_prefill_fn, mesh, held, weights, state, None, echo=False)
    executable = compile_graph(prefill)
    if executable is None:
        return
    # Decoding gets the caches as the prefill has laid them out, and keeps them so.
    results, tree = jax.tree.flatten(lowered.out_info)
    layouts = [GSPMDSharding(tuple(mesh.devices.flat), sharding) for sharding in executable.get_output_shardings()]
    state = jax.tree.unflatten(tree, [_abstract(x, s) for x, s in zip(results, layouts, strict=True)])
    step = jax.jit(sampler._sample_step, donate_argnums=(1,), out_shardings=jax.tree.unflatten(tree, layouts))
    decode, _ = _lowered(DECODE, step, mesh, held, weights, state)
    compile_graph(decode)


def _abstract(array: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of an array or a number, with the weak type that a Python number has."""
    weak = getattr(array, "weak_type", isinstance(array, int | float))
    return jax.ShapeDtypeStruct(jnp.shape(array), jnp.result_type(array), sharding=sharding, weak_type=weak)


def _trace_logps(request: TunixRequest, policy: Policy, mesh: Mesh, compile_graph: Compile) -> None:
    """Trace the log-probabilities of the reference, and those of the old policy, where they are computed."""
    pad_id, eos_id = _token_ids()
    settings = {"pad_id": pad_id, "eos_id": eos_id, "stop_gradient": True, "return_logits": False}

    def trace(name: str, model: nnx.Module, held: int, rows: Any, **more: Any) -> None:
        tokens = {
            "prompt_tokens": _array(request.rows, request.prompt_length, jnp.int32, rows),
            "completion_tokens": _array(request.rows, request.completion_length, jnp.int32, rows),
        }
        function = common.compute_per_token_logps
        graph, _ = _lowered(name, function, mesh, held, *nnx.split(model), **tokens, **settings, **more)
        compile_graph(graph)

    held = policy.optimizer_bytes
    if request.beta:
        by_row = NamedSharding(mesh, PartitionSpec("fsdp"))
        trace(REFERENCE, policy.reference, held + policy.lora_bytes, by_row, temperature=request.temperature)
    if request.has_old:  # Tunix lays these out for the reference only, and leaves the temperature out
        trace(OLD, policy.actor, held, None)


def _array(rows: int, width: int | None, dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows,) if width is None else (rows, width), dtype, sharding=sharding)


def _trace_learning(request: TunixRequest, policy: Policy, mesh: Mesh, compile_graph: Compile) -> None:
    """Trace the train step of Tunix's trainer: loss, gradient, and the optimizer, which sums up gradients itself."""
    by_row = NamedSharding(mesh, PartitionSpec("fsdp"))
    rows, width = request.rows, request.completion_length
    logps = _array(rows, width, jnp.float32, by_row)
    example = common.TrainExample(
        prompt_ids=_array(rows, request.prompt_length, jnp.int32, by_row),
        prompt_mask=_array(rows, request.prompt_length, jnp.bool_, by_row),
        completion_ids=_array(rows, width, jnp.int32, by_row),
        completion_mask=_array(rows, width, jnp.bool_, by_row),
        advantages=_array(rows, None, jnp.float32, by_row),
        ref_per_token_logps=logps if request.beta else None,
        old_per_token_logps=logps if request.has_old else None,
    )
    step, _ = policy.trainer.jit_train_and_eval_step()
    graph, _ = _lowered(LEARN, step.func, mesh, 0, *step.args, example)
    compile_graph(graph)
