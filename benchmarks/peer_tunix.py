"""Measure Google's Tunix for `grpo_step.py`: `GRPOLearner` with Tunix's own sampler ("vanilla"), JAX on the CPU.

Completions are forced to the lengths of the spec, as all peers must do the same work. Tunix samples in one compiled
loop, which ends when all rows have ended. The logits that its `Sampler._sample` gets are masked there: special tokens
are forbidden, and all tokens but EOS where a row shall end. Tunix removes the end token of a completion before it
learns; it counts here, since it was sampled. In everything after the rollout, Tunix's arrays have the full width.

The LoRA has the given rank on every weight, as Tunix's users set it. Tunix keeps K and V in one weight, so that they
share a matrix A, which is a little less work than in the other peers.
"""

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from transformers import AutoTokenizer
from tunix.generate.sampler import Sampler
from tunix.models.gemma3.model import ModelConfig
from tunix.models.gemma3.params_safetensors import create_model_from_safe_tensors
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from .stopwatch import Stopwatch
from .worker import Measurement
from .workload import EOS, NUM_SPECIAL, Spec, ends_itself, lengths, read_prompts, rows_per_pass, share_of_even_words

TOKENS_PER_PASS = 512  # of a learning pass; README.md has the measurement
LORA_TARGETS = ".*(q_einsum|kv_einsum|attn_vec_einsum|gate_proj|up_proj|down_proj)"


def load_model(spec: Spec, folder: Path, mesh: jax.sharding.Mesh) -> nnx.Module:
    """Return Tunix's Gemma 3 with the weights that `save_pretrained` wrote into the folder."""
    dtype = getattr(jnp, spec.dtype)
    config = ModelConfig(
        num_layers=spec.num_layers,
        num_embed=spec.vocabulary_size,
        embed_dim=spec.hidden_size,
        hidden_dim=spec.intermediate_size,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        num_kv_heads=spec.num_kv_heads,
        sliding_window_size=spec.sliding_window,
        global_base_frequency=1_000_000,
        param_dtype=dtype,
    )
    return create_model_from_safe_tensors(str(folder), config, mesh, dtype=dtype)


def add_lora(spec: Spec, model: nnx.Module, mesh: jax.sharding.Mesh) -> nnx.Module:
    """Return the model with a LoRA, added as Tunix's examples do it."""
    provider = qwix.LoraProvider(module_path=LORA_TARGETS, rank=spec.lora_rank, alpha=spec.lora_alpha)
    model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(spec.seed), **model.get_model_input())
    with mesh:
        state = nnx.state(model)
        nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model


def prompts_per_pass(spec: Spec) -> int:
    """Return the prompts, with all their completions, of one learning pass."""
    return rows_per_pass(spec, TOKENS_PER_PASS, multiple=spec.num_completions) // spec.num_completions


def make_learner(spec: Spec, folder: Path) -> GRPOLearner:
    """Return Tunix's learner with the spec's settings and the model of the folder.

    It learns from the completions of a few prompts at a time, which is faster than from all of them; a step still has
    one rollout and one optimizer step.
    """
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    base = load_model(spec, folder, mesh)
    optimizer = optax.chain(
        optax.clip_by_global_norm(spec.max_grad_norm), optax.adamw(spec.learning_rate, weight_decay=0.0)
    )
    cluster = RLCluster(
        actor=add_lora(spec, base, mesh),
        reference=base,  # the actor has the same arrays as base weights
        tokenizer=AutoTokenizer.from_pretrained(folder),
        cluster_config=ClusterConfig(
            role_to_mesh={Role.ACTOR: mesh, Role.REFERENCE: mesh, Role.ROLLOUT: mesh},
            rollout_engine="vanilla",
            training_config=RLTrainingConfig(
                actor_optimizer=optimizer,
                eval_every_n_steps=10**9,
                max_steps=spec.warmup + spec.steps,
                mini_batch_size=spec.num_prompts,
                train_micro_batch_size=prompts_per_pass(spec),
                compute_logps_micro_batch_size=prompts_per_pass(spec),
                rollout_micro_batch_size=spec.num_prompts,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=spec.completion_length,
                max_prompt_length=spec.prompt_length,
                kv_cache_size=spec.prompt_length + spec.completion_length,  # the smallest that Tunix accepts
                temperature=1.0,
                top_p=1.0,
                top_k=None,
            ),
        ),
    )
    config = GRPOConfig(num_generations=spec.num_completions, beta=spec.beta, kl_loss_mode="low_var_kl")
    return GRPOLearner(cluster, config, share_of_even_words)


def force_lengths(sampler: Sampler, spec: Spec) -> None:
    """Mask the logits from which Tunix's sampler samples, so that rows end where the spec wants it."""
    sample = sampler._sample
    last = jnp.array([n - 1 if ends else -1 for n, ends in zip(lengths(spec), ends_itself(spec), strict=True)])  # (B,)
    token = jnp.arange(spec.vocabulary_size)

    def forced(logits, eos, cache, sampler_state):  # logits (B, P or 1, V), of which the last are sampled from
        tokens_so_far = sampler_state.decoding_step + 1 - spec.prompt_length
        ending = (last == tokens_so_far)[:, None]
        forbidden = jnp.where(ending, token != EOS, token < NUM_SPECIAL)  # (B, V)
        logits = jnp.where(forbidden[:, None], -jnp.inf, logits[:, -1:])
        return sample(logits=logits, eos=eos, cache=cache, sampler_state=sampler_state)

    sampler._sample = forced


def batches(spec: Spec, folder: Path) -> Iterator[dict[str, np.ndarray]]:
    """Return the prompts of each step."""
    prompts = read_prompts(folder)
    for first in range(0, len(prompts), spec.num_prompts):
        yield {"prompts": np.array(prompts[first : first + spec.num_prompts])}


def run(spec: Spec, folder: Path) -> Measurement:
    """Train for the spec's steps, and measure the parts of each."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    watch, rollouts = Stopwatch(jax.block_until_ready), []
    learner = make_learner(spec, folder)
    cluster = learner.rl_cluster
    force_lengths(cluster.rollout._sampler, spec)
    watch.wrap(cluster, "generate", "rollout", seen=lambda output: rollouts.append(output.tokens))
    watch.wrap(cluster, "get_ref_per_token_logps", "reference")
    watch.wrap(learner, "_compute_rewards", "scoring")
    passes = itertools.cycle(range(1, spec.num_prompts // prompts_per_pass(spec) + 1))

    def learned(result: None) -> None:
        if next(passes) * prompts_per_pass(spec) == spec.num_prompts:
            watch.end_step()

    watch.wrap(cluster, "update_actor", "learning", seen=learned)
    watch.start()
    learner.train(batches(spec, folder))
    ended = np.array(ends_itself(spec), dtype=int)
    return Measurement(
        watch.steps,
        [(np.array([len(ids) for ids in rows]) + ended).tolist() for rows in rollouts],
        cluster.actor_trainer.metrics_logger.get_metric_history("actor", "loss", "train").tolist(),
    )
