"""Learning from a batch: its micro-batches, the GRPO loss of each and its gradient, and policies' log-probabilities."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import device
from .batch import TrainBatch
from .config import GRPOConfig
from .grpo import grpo_loss
from .logprobs import token_logps
from .packing import pack
from .sharding import shard_rows

SHORTEST_PACKED = 128  # tokens: where completions can't be longer, a second shape is not worth compiling


def micro_batches(batch: TrainBatch, args: GRPOConfig) -> list[TrainBatch]:
    """Whole groups of rows, cut before their graphs begin: so that on XLA all of them run the same compiled graph."""
    if device.KIND == "cpu" and not args.gradient_checkpointing:  # as many rows as their real lengths allow
        tokens = int(batch.completion_mask.sum()) / len(batch.prompt_ids)
        parts = batch.split(args.rows_in_pass_of(tokens))
    else:
        parts = [_packed(part, args) for part in batch.split(args.rows_per_pass)]
    for part in parts:
        for tensor in part.tensors():
            shard_rows(tensor)
    device.sync()
    return parts


def _packed(part: TrainBatch, args: GRPOConfig) -> TrainBatch:
    """On XLA, where completions keep their widest shape: a micro-batch whose completions fit into half as many rows."""
    (num_rows, width), num_prompts = part.completion_ids.shape, len(part.prompt_ids)
    if not may_pack(args) or part.lengths is None or num_rows == num_prompts:
        return part
    group_size = num_rows // num_prompts
    packed = pack(part.lengths.tolist(), group_size, -(-group_size // 2), width)
    if packed is None:
        return part
    packing, starts = (tensor.to(args.device) for tensor in packed)
    return replace(part, packing=packing, starts=starts)


def may_pack(args: GRPOConfig) -> bool:
    """Whether a learning pass may have two shapes: of whole rows, and of half as many with completions packed."""
    fixed = device.KIND == "xla" and not device.is_recording()  # a plan looks at the largest
    return fixed and not args.gradient_checkpointing and args.generation_max_length >= SHORTEST_PACKED


def rehearsals(batch: TrainBatch, args: GRPOConfig) -> list[list[TrainBatch]]:
    """Micro-batches that weigh nothing: two of each shape, where passes may have two shapes."""
    if not may_pack(args):
        return []
    parts, shapes = (batch.split(args.rows_per_pass) * 2)[:2], []
    for length in (batch.completion_ids.shape[1], 1):
        of_length = []
        for part in parts:
            mask = torch.zeros_like(part.completion_mask)
            mask[:, :length] = True
            weights, lengths = torch.zeros_like(part.token_weights), torch.full_like(part.lengths, length)
            of_length.append(replace(part, completion_mask=mask, token_weights=weights, lengths=lengths))
        shapes.append(of_length)
    return shapes


def policy_logps(model: nn.Module, batch: TrainBatch, args: GRPOConfig) -> tuple[Tensor, Tensor]:
    """`token_logps` of the policy that is active, at the temperature of the rollout: logps and entropy, (B, C)."""
    # layers under gradient checkpointing drop any KV cache, so no prefix can be shared then
    return token_logps(model, batch, args.generation_temperature, share_prefix=not args.gradient_checkpointing)


@torch.no_grad()
def logps_without_gradient(model: nn.Module, batch: TrainBatch, args: GRPOConfig) -> Tensor:
    """(B, C) float32, in micro-batches, in evaluation mode: of the reference, or of the policy before it learns."""
    model.eval()
    parts = []
    for part in micro_batches(batch, args):
        parts.append(policy_logps(model, part, args)[0])
        device.sync()
    return torch.cat(parts)


def learn(
    model: nn.Module, part: TrainBatch, args: GRPOConfig, backward: Callable[[Tensor], None]
) -> dict[str, Tensor]:
    """Forward and backward of one micro-batch. `backward` takes the loss, and adds its gradient to the parameters'.

    Returns:
        the micro-batch's share of the batch's numbers, on the device, without gradient. Those named `row_...` have one
        value a row, `logps` is (B, C); the others are scalars.
    """
    logps, entropy = policy_logps(model, part, args)
    terms = grpo_loss(
        logps,
        part.old_per_token_logps,
        part.ref_per_token_logps,
        part.advantages,
        part.token_weights,
        epsilon=args.epsilon,
        epsilon_high=args.clip_high,
        epsilon_c=args.epsilon_c,
        beta=args.beta,
        kl_estimator=args.kl_estimator,
        kl_clamp=args.kl_clamp_value,
        sequence_level=args.algorithm == "gspo",
    )
    backward(terms.loss)
    logps, mask = logps.detach(), part.completion_mask
    gap = (logps - part.sampler_logps).abs() * mask
    numbers = {
        "loss": terms.loss.detach(),
        "policy_loss": terms.policy_loss,
        "kl_loss": terms.kl_loss,
        "clipped_weight": terms.clipped_weight,
        "weight": part.token_weights.sum(),
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
