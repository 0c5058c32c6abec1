"""Google Tunix's side of a case: its log-probabilities, advantages, loss, gradients and optimizer, on JAX.

This file computes nothing itself: every number comes from a function of google-tunix, or from optax's AdamW, which
Tunix's trainers use. It only translates batches and settings. `tunix_models.py` loads the models, and `tunix_lora.py`
translates LoRA weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from tunix.rl import algo_core, common
from tunix.rl.grpo.grpo_learner import GRPOConfig as TunixConfig
from tunix.rl.rollout.vanilla_rollout import VanillaRollout

from .. import GRPOConfig
from ..batch import TrainBatch
from .tunix_lora import Lora, TunixPolicy

KL_NAMES = {"k1": "kl", "k2": "mse_kl", "k3": "low_var_kl"}  # Tunix's names of the KL estimators
TUNIX_EPSILON = 1e-6  # beside the standard deviation, a constant in Tunix's compute_advantages
ESTIMATORS = {"rloo": "rloo", "dr_grpo": "drgrpo"}  # Tunix's names of the advantage estimators


# ---- batches and settings ----


@dataclasses.dataclass(frozen=True)
class TunixBatch:
    """A batch in Tunix's form: each row has its own copy of the prompt, and completions have the full width.

    Tunix takes every token that equals `pad_id` for padding, wherever it is. Padding therefore gets an id that occurs
    nowhere else in the batch.
    """

    prompt_ids: jax.Array  # (B, P) int32
    completion_ids: jax.Array  # (B, C) int32
    completion_mask: jax.Array  # (B, C) int32
    pad_id: int

    @classmethod
    def of(cls, batch: TrainBatch, completion_width: int, vocabulary_size: int) -> "TunixBatch":
        """Translate a batch of this library. `completion_width` is C, the limit of a completion's tokens.

        Raises:
            ValueError: every id of the vocabulary occurs in the batch, so that none is left to mark padding.
        """
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
    """Pad (B, C) values with 0 on the right to (B, width), in float32. None stays None."""
    if values is None:
        return None
    return jnp.asarray(torch.nn.functional.pad(values.float(), (0, width - values.shape[1])).numpy())


def settings_of(args: GRPOConfig) -> TunixConfig:
    """Return this library's settings as Tunix's."""
    config = TunixConfig(
        num_generations=args.num_completions_per_prompt,
        num_iterations=args.num_iterations,
        beta=args.beta,
        epsilon=args.epsilon,
        loss_agg_mode=args.aggregation,
        kl_loss_mode=KL_NAMES[args.kl_estimator],
        loss_algo="gspo-token" if args.algorithm == "gspo" else "grpo",
    )
    config.temperature = args.generation_temperature  # set as an attribute, as Tunix's learner does it
    config.epsilon_high, config.epsilon_c, config.kl_clamp_value = args.clip_high, args.epsilon_c, args.kl_clamp_value
    return config


# ---- what Tunix computes ----


def advantages(rewards: np.ndarray, args: GRPOConfig) -> np.ndarray:
    """Return the advantages (B,) of rewards (B,), by Tunix's own estimator."""
    name = ESTIMATORS.get(args.algorithm, "grpo" if args.normalize_advantages else "drgrpo")
    estimate = algo_core.registry.get("advantage_estimator", name)
    return np.asarray(estimate(rewards=rewards, num_generations=args.num_completions_per_prompt))


def completion_mask(ids: np.ndarray, eos_id: int) -> np.ndarray:
    """Return the mask (B, C) of completions by Tunix's own function: 1 up to and including the first `eos_id`."""
    return common.np_make_completion_mask(ids, eos_id)


def padding_mask(prompt_ids: np.ndarray, completion_ids: np.ndarray, pad_id: int) -> np.ndarray:
    """Return which completion tokens (B, C) count in Tunix's log-probabilities, by its own function."""
    *_, mask = common.process_ids(jnp.asarray(prompt_ids), jnp.asarray(completion_ids), pad_id, pad_id)
    return np.asarray(mask)[:, prompt_ids.shape[1] :]


def token_logps(model: nnx.Module, batch: TunixBatch, temperature: float) -> np.ndarray:
    """Return Tunix's log-probabilities of the completions (B, C), 0 where masked."""
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
    """Return the old log-probabilities (B, C) as Tunix's learner gets them, 0 where masked.

    They come from a method of Tunix's rollout class, which is called with the few attributes that it reads.
    """

    class Rollout:
        _sampler = SimpleNamespace(model_def_and_state=lambda: nnx.split(model))
        pad_id = staticmethod(lambda: batch.pad_id)
        eos_id = staticmethod(lambda: -1)

    logps = VanillaRollout.get_per_token_logps(Rollout, batch.prompt_ids, batch.completion_ids)
    return np.asarray(logps * batch.completion_mask)


@dataclasses.dataclass
class TunixLoss:
    """The loss of a batch, its two terms, and its gradients."""

    loss: float
    policy_loss: float
    kl_loss: float
    gradients: Lora  # by PEFT's parameter name
    state: nnx.State  # the same gradients in Tunix's form, 0 outside the blocks of `LoraMap`


def loss_and_gradients(
    tunix: TunixPolicy,
    lora: nnx.State,
    batch: TunixBatch,
    advantages: np.ndarray,
    ref_logps: jax.Array | None,
    old_logps: jax.Array | None,
    config: TunixConfig,
) -> TunixLoss:
    """Return Tunix's loss, `grpo_loss_fn`, and its gradient with respect to the LoRA."""
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
    gradient = jax.tree.map(jnp.multiply, gradient, tunix.block_mask)
    return TunixLoss(
        loss=float(value),
        policy_loss=float(terms["pg_loss"]),
        kl_loss=float(terms["kl_loss"]),
        gradients=tunix.lora_of(gradient),
        state=gradient,
    )


@functools.cache
def _compiled_optimizer(
    max_norm: float, beta1: float, beta2: float, epsilon: float, weight_decay: float
) -> tuple[optax.GradientTransformation, Callable]:
    """Return the optimizer and its compiled step, which are made once for the same settings."""
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
    """Return a function that takes one step of optax's AdamW, after clipping by global norm.

    Its arguments are the weights, the gradient, the optimizer's state (None at first) and the learning rate. It
    returns the new weights and the new state.
    """
    optimizer, compiled = _compiled_optimizer(
        args.max_grad_norm, args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay
    )

    def step(weights: nnx.State, gradient: nnx.State, state: Any, learning_rate: float) -> tuple[nnx.State, Any]:
        state = optimizer.init(weights) if state is None else state
        state.hyperparams["learning_rate"] = jnp.asarray(learning_rate, jnp.float32)
        return compiled(weights, gradient, state)

    return step
