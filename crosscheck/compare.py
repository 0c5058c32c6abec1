"""Compare one recorded learning step, or a chain of them, with what Tunix computes from the same inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tunix_torch import GRPOConfig
from tunix_torch.logprobs import token_logps
from tunix_torch.record import StepRecord

from . import tunix_side
from .tunix_side import TunixBatch, TunixPolicy

LOGPS, SCALARS, LARGE_SCALARS, GRADIENTS, PARAMETERS, ADVANTAGES = 1e-5, 1e-6, 5e-6, 1e-5, 1e-5, 1e-6


@dataclass(frozen=True)
class Row:
    """One line of the table. A difference that is not a number fails."""

    case: str
    quantity: str
    difference: float
    tolerance: float
    note: str = ""

    @property
    def verdict(self) -> str:
        return "pass" if self.difference <= self.tolerance else "fail"


def largest_difference(ours: np.ndarray | torch.Tensor, theirs: np.ndarray | torch.Tensor) -> float:
    """max |ours - theirs|, in float64; not a number where either one is not."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    return float(np.abs(ours - theirs).max(initial=0.0))


def scalar_tolerance(args: GRPOConfig, with_kl: bool = True) -> float:
    """Of losses and KL: sums over a row are larger than means, and k3 takes an exponential."""
    is_sum = args.aggregation in ("seq-mean-token-sum", "sequence-mean-token-sum-norm")
    return LARGE_SCALARS if is_sum or (with_kl and args.beta and args.kl_estimator == "k3") else SCALARS


def epsilon_effect(rewards: torch.Tensor, advantages: torch.Tensor, args: GRPOConfig) -> float:
    """How far apart advantages are by right when our epsilon beside the standard deviation is not Tunix's 1e-6."""
    if args.algorithm in ("rloo", "dr_grpo") or not args.normalize_advantages:
        return 0.0
    std = rewards.view(-1, args.num_completions_per_prompt).std(dim=1, keepdim=True)
    relative = abs(args.advantage_epsilon - 1e-6) / (std + min(args.advantage_epsilon, 1e-6))
    return float((relative * advantages.view(len(std), -1).abs()).max())


def _tunix_batch(record: StepRecord, args: GRPOConfig, tunix: TunixPolicy) -> TunixBatch:
    return TunixBatch.of(record.batch, args.generation_max_length, tunix.map.config.vocab_size)


def compare_step(case: str, record: StepRecord, args: GRPOConfig, tunix: TunixPolicy, base: nn.Module) -> Iterator[Row]:
    """Every quantity of a step, in the order in which it is computed. `base` is the model without any LoRA.

    Each stage gets this library's inputs, so that a difference shows where it arises and not in all that follows.
    """
    batch, width = record.batch, args.generation_max_length
    theirs, settings = _tunix_batch(record, args, tunix), tunix_side.settings_of(args)
    shown = slice(0, batch.completion_ids.shape[1])  # Tunix's columns beyond the batch's are padding
    difference = largest_difference(batch.advantages, tunix_side.advantages(batch.rewards.numpy(), args))
    yield Row(case, "advantages", difference, ADVANTAGES + epsilon_effect(batch.rewards, batch.advantages, args))
    base_logps = tunix_side.token_logps(tunix.base, theirs, args.generation_temperature)[:, shown]
    with torch.no_grad():
        ours, _ = token_logps(base, batch, args.generation_temperature)
    yield Row(case, "base log-probabilities", largest_difference(ours, base_logps), LOGPS)
    if batch.ref_per_token_logps is not None:
        difference = largest_difference(batch.ref_per_token_logps, base_logps)
        yield Row(case, "reference log-probabilities", difference, LOGPS)
    state = tunix.state_of({name: value.numpy() for name, value in record.lora.items()})
    logps = tunix_side.token_logps(tunix.policy(state), theirs, args.generation_temperature)
    yield Row(case, "policy log-probabilities", largest_difference(record.logps, logps[:, shown]), LOGPS)
    result = tunix_side.loss_and_gradients(
        tunix,
        state,
        theirs,
        batch.advantages.numpy(),
        tunix_side.padded(batch.ref_per_token_logps, width),
        tunix_side.padded(batch.old_per_token_logps, width),
        settings,
    )
    tolerance = scalar_tolerance(args)
    if batch.ref_per_token_logps is not None:
        yield Row(case, "KL", abs(float(record.kl_loss) - result.kl_loss), tolerance)
    difference = abs(float(record.policy_loss) - result.policy_loss)
    yield Row(case, "policy loss", difference, scalar_tolerance(args, with_kl=False))
    yield Row(case, "loss", abs(float(record.loss) - result.loss), tolerance)
    worst, worst_name = 0.0, ""
    for name, gradient in result.gradients.items():
        largest = max(float(np.abs(gradient).max()), 1e-30)
        difference = largest_difference(record.gradients[name], gradient) / largest
        if not difference <= worst:
            worst, worst_name = difference, name
    worst_name = worst_name.removeprefix("base_model.model.").removesuffix(".default.weight")
    yield Row(case, "LoRA gradients", worst, GRADIENTS, f"relative; worst: {worst_name}")


def compare_updates(
    case: str,
    records: Sequence[StepRecord],
    last_lora: dict[str, torch.Tensor],
    args: GRPOConfig,
    tunix: TunixPolicy,
    after: Sequence[int],
    measure: str = "largest",
) -> Iterator[Row]:
    """Parameters after some of the steps: their largest difference, or, with "rms", its root mean square.

    AdamW divides a gradient by its own size. Where a gradient is almost 0, its rounding error decides which way that
    entry goes, so that single entries differ by up to a learning rate; hence the second measure.

    Tunix starts from the same LoRA and then goes its own way: its own reference log-probabilities, advantages,
    gradients, and optax's AdamW.
    """
    width, settings = args.generation_max_length, tunix_side.settings_of(args)
    weights = tunix.state_of({name: value.numpy() for name, value in records[0].lora.items()})
    step, optimizer_state = tunix_side.adamw(args), None
    loras = [record.lora for record in records[1:]] + [last_lora]
    for number, (record, lora) in enumerate(zip(records, loras, strict=True), start=1):
        batch = _tunix_batch(record, args, tunix)
        reference = None
        if args.beta:
            reference = tunix_side.token_logps(tunix.base, batch, args.generation_temperature)
        result = tunix_side.loss_and_gradients(
            tunix,
            weights,
            batch,
            tunix_side.advantages(record.batch.rewards.numpy(), args),
            reference,
            tunix_side.padded(record.batch.old_per_token_logps, width),
            settings,
        )
        weights, optimizer_state = step(weights, result.state, optimizer_state, record.learning_rate)
        if number in after:
            theirs = tunix.lora_of(weights)
            gaps = np.concatenate([(lora[name].double().numpy() - theirs[name]).ravel() for name in theirs])
            difference = float(np.abs(gaps).max() if measure == "largest" else np.sqrt(np.mean(gaps**2)))
            steps = "1 step" if number == 1 else f"{number} steps"
            yield Row(case, f"parameters after {steps}", difference, PARAMETERS, measure)
