"""Compare recorded learning steps of this library with what Google's Tunix computes from the same inputs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .. import GRPOConfig
from ..learn.logprobs import token_logps
from ..learn.passes import shared_prompts
from ..learn.record import StepRecord
from . import tunix_side
from .tunix_lora import Lora, TunixPolicy
from .tunix_side import TUNIX_EPSILON, TunixBatch

# Tolerances: the largest difference that is allowed for each quantity.
ADVANTAGES, LOGPS, SCALARS, LARGE_SCALARS, GRADIENTS, PARAMETERS = 1e-6, 1e-5, 1e-6, 5e-6, 1e-5, 1e-5


@dataclass(frozen=True)
class Row:
    """One comparison, which is one line of the printed table. A difference that is not a number (NaN) fails."""

    case: str
    quantity: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def verdict(self) -> str:
        return "pass" if self.difference <= self.tolerance else "fail"


def largest_difference(ours: np.ndarray | torch.Tensor, theirs: np.ndarray | torch.Tensor) -> float:
    """Return max |ours - theirs|, computed in float64. It is NaN if either array has a NaN or the shapes differ."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        return float("nan")
    return float(np.abs(ours - theirs).max(initial=0.0))


def gradient_row(
    case: str, ours: Mapping[str, torch.Tensor], theirs: Mapping[str, np.ndarray | torch.Tensor], per_matrix: bool
) -> Row:
    """Return the largest relative difference of any LoRA matrix's gradient, as a line of the table.

    Args:
        per_matrix: relative to the largest entry of the same matrix's gradient; else to the largest of all gradients.
    """
    sizes = {name: float(np.abs(np.asarray(gradient)).max()) for name, gradient in theirs.items()}
    overall = max(sizes.values())
    gaps = {
        name: largest_difference(ours[name], gradient) / max(sizes[name] if per_matrix else overall, 1e-12)
        for name, gradient in theirs.items()
    }
    worst = max(gaps, key=lambda name: gaps[name] if gaps[name] >= 0 else np.inf)  # NaN counts as the worst
    shown = worst.removeprefix("base_model.model.").removesuffix(".default.weight")
    return Row(case, "LoRA gradients", gaps[worst], GRADIENTS, f"relative; worst: {shown}")


def scalar_tolerance(args: GRPOConfig, with_kl: bool = True) -> float:
    """Return the tolerance of losses and of KL.

    It is larger where a loss sums over rows, as sums are larger than means, and for k3, which has an exponential.
    """
    is_sum = args.aggregation in ("seq-mean-token-sum", "sequence-mean-token-sum-norm")
    return LARGE_SCALARS if is_sum or (with_kl and args.beta and args.kl_estimator == "k3") else SCALARS


def tunix_advantages(rewards: torch.Tensor, args: GRPOConfig) -> np.ndarray:
    """Return the advantages (B,) of Tunix's estimator, rescaled to this library's epsilon.

    Tunix has a constant epsilon beside the standard deviation; here it is a setting.
    """
    theirs = tunix_side.advantages(rewards.numpy(), args)
    if args.algorithm in ("rloo", "dr_grpo") or not args.normalize_advantages:
        return theirs
    group = args.num_completions_per_prompt
    std = rewards.view(-1, group).std(dim=1).repeat_interleave(group).numpy()
    return theirs * (std + TUNIX_EPSILON) / np.maximum(std + args.advantage_epsilon, 1e-30)


def compare_step(
    case: str, record: StepRecord, args: GRPOConfig, tunix: TunixPolicy, base: nn.Module, per_matrix: bool = True
) -> Iterator[Row]:
    """Compare every quantity of a learning step, in the order in which they are computed.

    Tunix gets this library's inputs at each stage, so that a difference shows only where it arises.

    Args:
        base: the model without any LoRA.
        per_matrix: see `gradient_row`.
    """
    batch, width, temperature = record.batch, args.generation_max_length, args.generation_temperature
    theirs = TunixBatch.of(batch, width, tunix.map.config.vocab_size)
    shown = slice(0, batch.completion_ids.shape[1])  # Tunix's columns beyond the batch's are padding
    difference = largest_difference(batch.advantages, tunix_advantages(batch.rewards, args))
    yield Row(case, "advantages", difference, ADVANTAGES)
    base_logps = tunix_side.token_logps(tunix.base, theirs, temperature)[:, shown]
    with torch.no_grad():
        ours, _ = token_logps(base, shared_prompts(batch), temperature)
    yield Row(case, "base log-probabilities", largest_difference(ours, base_logps), LOGPS)
    if batch.ref_per_token_logps is not None:
        difference = largest_difference(batch.ref_per_token_logps, base_logps)
        yield Row(case, "reference log-probabilities", difference, LOGPS)
    state = tunix.state_of({name: value.numpy() for name, value in record.lora.items()})
    logps = tunix_side.token_logps(tunix.policy(state), theirs, temperature)[:, shown]
    if args.num_iterations > 1:  # the policy had the same weights when these were computed
        yield Row(case, "old log-probabilities", largest_difference(batch.old_per_token_logps, logps), LOGPS)
    yield Row(case, "policy log-probabilities", largest_difference(record.logps, logps), LOGPS)
    result = tunix_side.loss_and_gradients(
        tunix,
        state,
        theirs,
        batch.advantages.numpy(),
        tunix_side.padded(batch.ref_per_token_logps, width),
        tunix_side.padded(batch.old_per_token_logps, width),
        tunix_side.settings_of(args),
    )
    difference = abs(float(record.policy_loss) - result.policy_loss)
    yield Row(case, "policy loss", difference, scalar_tolerance(args, with_kl=False))
    if batch.ref_per_token_logps is not None:
        yield Row(case, "KL", abs(float(record.kl_loss) - result.kl_loss), scalar_tolerance(args))
    yield Row(case, "loss", abs(float(record.loss) - result.loss), scalar_tolerance(args))
    yield gradient_row(case, record.gradients, result.gradients, per_matrix)


def tunix_updates(records: Sequence[StepRecord], args: GRPOConfig, tunix: TunixPolicy) -> Iterator[Lora]:
    """Return the LoRA after each recorded step, as Tunix alone computes it.

    It starts from the first record's LoRA. From there on, Tunix uses its own reference log-probabilities, advantages
    and gradients, and optax's AdamW; only the batches come from the records.
    """
    width, settings = args.generation_max_length, tunix_side.settings_of(args)
    weights = tunix.state_of({name: value.numpy() for name, value in records[0].lora.items()})
    step, optimizer_state = tunix_side.adamw(args), None
    for record in records:
        batch = TunixBatch.of(record.batch, width, tunix.map.config.vocab_size)
        reference = tunix_side.token_logps(tunix.base, batch, args.generation_temperature) if args.beta else None
        result = tunix_side.loss_and_gradients(
            tunix,
            weights,
            batch,
            tunix_advantages(record.batch.rewards, args),
            reference,
            tunix_side.padded(record.batch.old_per_token_logps, width),
            settings,
        )
        weights, optimizer_state = step(weights, result.state, optimizer_state, record.learning_rate)
        yield tunix.lora_of(weights)


def count_of_steps(number: int) -> str:
    """Return "1 step", "2 steps" and so on."""
    return "1 step" if number == 1 else f"{number} steps"
