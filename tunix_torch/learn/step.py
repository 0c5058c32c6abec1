"""The learning step: the GRPO loss of a batch and its gradient, and the log-probabilities that the loss needs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..grpo import grpo_loss
from ..model.decoding import with_fast_layers
from ..model.teacher import Teacher
from ..runtime import device
from .distillation import token_scores
from .logprobs import token_logps
from .passes import Pass, in_passes

Backward = Callable[[Tensor], None]


@with_fast_layers
@torch.no_grad()
def logps_without_gradient(model: nn.Module, batch: TrainBatch, args: GRPOConfig) -> Tensor:
    """Log-probabilities by the model as it is now, such as the reference policy: (B, C) float32, 0 where masked.

    Rows are laid out as for learning, even where sharing prompts would be cheaper: another layout rounds differently,
    so that in bfloat16 a policy would differ from itself.
    """
    model.eval()

    def compute_logps(part: Pass) -> Tensor:
        logps = token_logps(model, part, args.generation_temperature)[0]
        device.sync()
        return logps

    return torch.cat(in_passes(batch, args, compute_logps))


@with_fast_layers
def learn(
    model: nn.Module, batch: TrainBatch, args: GRPOConfig, backward: Backward, teacher: Teacher | None = None
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch of a batch. The gradients add up in the parameters.

    Args:
        backward: computes the gradient of a micro-batch's loss and adds it to the parameters'
            (`AdapterTrainer.backward`).
        teacher: its reverse KL is added to the loss; see `distillation.py`.

    Returns:
        for each micro-batch, in order, what `learn_micro_batch` returns.
    """
    model.train()
    return in_passes(batch, args, lambda part: learn_micro_batch(model, part, args, backward, teacher))


def learn_micro_batch(
    model: nn.Module, part: Pass, args: GRPOConfig, backward: Backward, teacher: Teacher | None = None
) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch. `backward` and `teacher` are those of `learn`.

    Returns:
        numbers of the micro-batch, on the device, without gradient. Those named `row_...` have one value a row, `logps`
        is (B, C), and the others are scalars that add up over micro-batches.
    """
    logps, entropy, teacher_kl = token_scores(model, part, args.generation_temperature, teacher)
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
    loss, distance = terms.loss, {}
    if teacher_kl is not None:
        teacher_loss = (teacher_kl * batch.token_weights).sum()
        loss, distance = loss + args.distillation_coef * teacher_loss, {"teacher_kl": teacher_loss.detach()}
    backward(loss)
    logps, mask = logps.detach(), batch.completion_mask
    gap = (logps - batch.sampler_logps).abs() * mask
    numbers = {
        "loss": loss.detach(),
        **distance,
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
