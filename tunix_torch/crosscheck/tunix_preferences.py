"""Tunix's side of preference losses and of distillation: its own functions, called on plain arrays."""

from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from tunix.distillation.strategies.logit import LogitStrategy
from tunix.sft.dpo import dpo_trainer


def dpo_loss(
    algorithm: str,
    logps: np.ndarray,
    ref_logps: np.ndarray | None,
    mask: np.ndarray,
    weight: float,
    label_smoothing: float,
) -> tuple[float, np.ndarray, dict[str, float]]:
    """Return the loss of Tunix's `dpo_loss_fn`, its gradient with respect to `logps`, and its metrics.

    Its `compute_logps`, which sums a model's log-probabilities, is replaced by the sums of those that are given.

    Args:
        algorithm: dpo or orpo.
        logps, ref_logps, mask: (2N, C), as for `preference_terms`.
        weight: beta of dpo, or lambda of orpo.
    """
    sides = np.concatenate((mask[::2], mask[1::2]))
    references = [None, None] if ref_logps is None else [jnp.asarray((ref_logps * mask).sum(1)[s::2]) for s in (0, 1)]
    example = SimpleNamespace(
        input_ids=None,
        positions=None,
        attention_mask=None,
        logits_to_keep=None,
        images=None,
        completion_mask=jnp.asarray(sides),
        ref_chosen_logps=references[0],
        ref_rejected_logps=references[1],
    )

    def loss(logps: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = (logps * mask).sum(axis=1)
        with mock.patch.object(dpo_trainer, "compute_logps", lambda *_, **__: (sums[::2], sums[1::2])):
            return dpo_trainer.dpo_loss_fn(
                None, example, algorithm, beta=weight, lambda_orpo=weight, label_smoothing=label_smoothing
            )

    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(logps))
    return float(value), np.asarray(gradient), {name: float(number) for name, number in metrics.items()}


def mean_of_reverse_kl(scores: np.ndarray, teacher_scores: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """Return the mean over tokens of the reverse KL of logits (K, V), and its gradient with respect to `scores`.

    Tunix's `LogitStrategy` has the forward KL, KL(teacher || student), so policy and teacher change places here.
    """
    strategy = LogitStrategy(None, None, None, temperature=temperature, alpha=1.0)
    labels = jnp.zeros_like(jnp.asarray(scores))

    def loss(scores: jax.Array) -> jax.Array:
        value, _ = strategy.compute_loss(jnp.asarray(teacher_scores), scores, labels)
        return value / temperature**2  # Tunix multiplies by it

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(scores))
    return float(value), np.asarray(gradient)
