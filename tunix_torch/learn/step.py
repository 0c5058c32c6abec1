"""The learning step: the GRPO loss of a batch and its gradient, and the log-probabilities that the loss needs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..grpo import grpo_loss
from ..model.decoding import with_fast_layers
from ..runtime import device
from .logprobs import token_logps
from .passes import Pass, in_passes


@with_fast_layers
@torch.no_grad()
def logps_without_gradient(model: nn.Module, batch: TrainBatch, args: GRPOConfig) -> Tensor:
    """Log-probabilities of the policy that is active, such as the reference: (B, C) float32, 0 where masked.

    The layout is the one that is learned with, though prompts could always be shared here: in bfloat16 the same policy
    would otherwise differ from itself by rounding.
    """
    model.eval()

    def score(part: Pass) -> Tensor:
        logps = token_logps(model, part, args.generation_temperature)[0]
        device.sync()
        return logps

    return torch.cat(in_passes(batch, args, score))


@with_fast_layers
def learn(
    model: nn.Module, batch: TrainBatch, args: GRPOConfig, backward: Callable[[Tensor], None]
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch of a batch. The gradients add up in the parameters.

    Args:
        backward: takes the loss of a micro-batch, and adds its gradient to those of the parameters.

    Returns:
        for each micro-batch, in order, what `learn_pass` returns.
    """
    model.train()
    return in_passes(batch, args, lambda part: learn_pass(model, part, args, backward))


def learn_pass(model: nn.Module, part: Pass, args: GRPOConfig, backward: Callable[[Tensor], None]) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch. `backward` is that of `learn`.

    Returns:
        the micro-batch's share of the batch's numbers, on the device, without gradient. Those named `row_...` have one
        value a row, `logps` is (B, C); the others are scalars.
    """
    logps, entropy = token_logps(model, part, args.generation_temperature)
    batch = part.batch
    terms = grpo_loss(
        logps,
        batch.old_per_token_logps,
        batch.ref_per_token_logps,
        batch.advantages,
        batch.token_weights,
        epsilon=args.epsilon,
        epsilon_high=args.clip_high,
        epsilon_c=args.epsilon_c,
        beta=args.beta,
        kl_estimator=args.kl_estimator,
        kl_clamp=args.kl_clamp_value,
        sequence_level=args.algorithm == "gspo",
    )
    backward(terms.loss)
    logps, mask = logps.detach(), batch.completion_mask
    gap = (logps - batch.sampler_logps).abs() * mask
    numbers = {
        "loss": terms.loss.detach(),
        "policy_loss": terms.policy_loss,
        "kl_loss": terms.kl_loss,
        "clipped_weight": terms.clipped_weight,
        "weight": batch.token_weights.sum(),
        "tokens": mask.sum().float(),
        "entropy": entropy.sum(),
        "sampler_gap": gap.sum(),
        "row_bad": (~(torch.isfinite(logps) & (logps <= 0))).any(dim=1),
        "row_ratio_gap": terms.ratio_gap,
        "row_sampler_gap": gap.amax(dim=1),
        "row_largest_kl": terms.largest_kl,
        "logps": logps,
    }
    device.sync()
    return numbers
