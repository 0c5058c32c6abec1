"""The learning step: the GRPO loss of a batch and its gradient, and the log-probabilities that the loss needs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..config.loss import loss_settings
from ..grpo import grpo_loss
from ..model.decoding import with_fast_layers
from ..model.teacher import Teacher
from ..runtime import device
from .corrections import policy_weights, sampler_gap, sampler_ratios
from .distillation import token_scores
from .entropy import keep_high_entropy
from .equal_rewards import learn_in_passes
from .logprobs import token_logps
from .metrics import loss_numbers
from .passes import Pass, in_passes

Backward = Callable[[Tensor], None]


def logps_without_gradient(model: nn.Module, batch: TrainBatch, args: GRPOConfig) -> Tensor:
    """Log-probabilities by the model as it is now, such as the reference policy: (B, C) float32, 0 where masked."""
    return scores_without_gradient(model, batch, args)[0]


@with_fast_layers
@torch.no_grad()
def scores_without_gradient(model: nn.Module, batch: TrainBatch, args: GRPOConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies by the model as it is now: (B, C) float32 each, 0 where masked.

    Rows are laid out as for learning, even where sharing prompts would be cheaper: another layout rounds differently,
    so that in bfloat16 a policy would differ from itself.
    """
    model.eval()

    def compute(part: Pass) -> tuple[Tensor, Tensor]:
        scores = token_logps(model, part, args.generation_temperature)
        device.sync()
        return scores

    parts = batch.split(args.rows_per_step)  # where steps share a rollout, each is laid out as it will be for learning
    logps, entropy = zip(*(scores for part in parts for scores in in_passes(part, args, compute)), strict=True)
    return torch.cat(logps), torch.cat(entropy)


@with_fast_layers
def learn(
    model: nn.Module, batch: TrainBatch, args: GRPOConfig, backward: Backward, teacher: Teacher | None = None
) -> list[dict[str, Tensor]]:
    """Forward and backward of every micro-batch of a batch. The gradients add up in the parameters.

    Args:
        backward: adds the gradient of a micro-batch's loss to the parameters' (`AdapterTrainer.backward`).
        teacher: its reverse KL is added to the loss; see `distillation.py`.

    Returns:
        for each micro-batch, in order, what `learn_micro_batch` returns; or one of all, see `learn_in_passes`.
    """
    if args.top_entropy_quantile < 1:
        batch = keep_high_entropy(batch, scores_without_gradient(model, batch, args)[1], args.top_entropy_quantile)
    model.train()
    return learn_in_passes(batch, args, lambda part: learn_micro_batch(model, part, args, backward, teacher))


def learn_micro_batch(
    model: nn.Module, part: Pass, args: GRPOConfig, backward: Backward, teacher: Teacher | None = None
) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch. `backward` and `teacher` are those of `learn`.

    Returns:
        numbers of the micro-batch, on the device, without gradient. Those named `row_...` have one value a row, `logps`
        is (B, C), and the others are scalars that add up over micro-batches.
    """
    batch = part.batch
    bonus = batch.entropy_weights is not None
    logps, entropy, teacher_kl = token_scores(model, part, args.generation_temperature, teacher, bonus)
    ratios = sampler_ratios(batch, logps.detach(), args)
    terms = grpo_loss(
        logps,
        batch.old_per_token_logps,
        batch.ref_per_token_logps,
        batch.advantages,
        batch.token_weights,
        policy_weights=policy_weights(batch, logps.detach(), ratios, args),
        sampler_ratios=ratios,
        entropy=entropy,
        entropy_weights=batch.entropy_weights,
        **loss_settings(args),
    )
    loss, distance = terms.loss, {}
    if teacher_kl is not None:
        teacher_loss = (teacher_kl * batch.token_weights).sum()
        loss, distance = loss + args.distillation_coef * teacher_loss, {"teacher_kl": teacher_loss.detach()}
    if torch.is_grad_enabled():
        backward(loss)
    logps, mask = logps.detach(), batch.completion_mask
    gap = sampler_gap(batch, logps, args)
    numbers = {
        "loss": loss.detach(),
        **distance,
        "policy_loss": terms.policy_loss,
        "kl_loss": terms.kl_loss,
        "clipped_weight": terms.clipped_weight,
        "weight": batch.token_weights.sum(),
        "tokens": mask.sum().float(),
        "entropy": entropy.detach().sum(),
        "sampler_gap": gap.sum(),
        "row_bad": (~(torch.isfinite(logps) & (logps <= 0))).any(dim=1),
        "row_ratio_gap": terms.ratio_gap,
        "row_sampler_gap": gap.amax(dim=1),
        "row_largest_kl": terms.largest_kl,
        "logps": logps,
    } | loss_numbers(batch, terms, logps, entropy.detach(), ratios, args)
    device.sync()
    return numbers
