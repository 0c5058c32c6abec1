"""Learning from a batch: its micro-batches, the GRPO loss of each and its gradient, and policies' log-probabilities."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..grpo import grpo_loss
from ..runtime import device, mesh
from ..runtime.sharding import shard_rows
from .logprobs import token_logps
from .packing import pack

SHORTEST_PACKED = 128  # tokens: where completions can't be longer, a second shape is not worth compiling


def micro_batches(batch: TrainBatch, args: GRPOConfig) -> list[TrainBatch]:
    """Cut before their graphs begin: so that on XLA they have one shape, or two where completions are packed."""
    if device.KIND == "cpu" and not args.gradient_checkpointing:  # as many rows as their real lengths allow
        tokens = int(batch.completion_mask.sum()) / len(batch.prompt_ids)
        parts = batch.split(args.rows_in_pass_of(tokens))
    else:
        parts = [_packed(part) for part in batch.split(args.rows_per_pass)]
    for part in parts:
        for tensor in part.tensors():
            shard_rows(tensor)
    device.sync()
    return parts


def may_pack(args: GRPOConfig) -> bool:
    """Whether completions may be packed: on XLA, where they keep their widest shape. Then a batch has their lengths."""
    fixed = device.KIND == "xla" and device.planner() is None  # a plan looks at the largest
    return fixed and not args.gradient_checkpointing and args.generation_max_length >= SHORTEST_PACKED


def _packed(part: TrainBatch) -> TrainBatch:
    """A micro-batch with its completions in half as many rows, where they fit."""
    num_bins = _num_bins(part)
    if num_bins is None:
        return part
    num_rows, width = part.completion_ids.shape
    packed = pack(part.lengths.tolist(), num_rows // len(part.prompt_ids), num_bins, width)
    if packed is None:
        return part
    packing, starts = (tensor.to(part.completion_ids.device) for tensor in packed)
    return replace(part, packing=packing, starts=starts)


def _num_bins(part: TrainBatch) -> int | None:
    """Half the rows of each prompt; None where lengths are not known, or no device would have fewer rows."""
    num_prompts, rows = len(part.prompt_ids), len(part.completion_ids) // len(part.prompt_ids)
    num_bins = -(-rows // 2)
    if part.lengths is None or num_bins == rows or num_prompts * num_bins % mesh.axis_size("fsdp"):
        return None
    return num_bins


def rehearsals(batch: TrainBatch, args: GRPOConfig) -> list[list[TrainBatch]]:
    """What compiles all that packing may need: for either shape, micro-batches that weigh nothing.

    The first of them makes gradients; those after it, where a step has such passes, add to what is there.
    """
    parts, width = batch.split(args.rows_per_pass), batch.completion_ids.shape[1]
    if all(_num_bins(part) is None for part in parts):
        return []
    adding = len(parts) > 1 or args.gradient_accumulation_steps > 1
    parts = parts[:1] + list({len(part.completion_ids): part for part in parts}.values()) * adding
    return [[_of_length(part, length) for part in parts] for length in (width, 1)]


def _of_length(part: TrainBatch, length: int) -> TrainBatch:
    """A micro-batch without weight, whose completions have so many tokens."""
    mask = torch.zeros_like(part.completion_mask)
    mask[:, :length] = True
    weights, lengths = torch.zeros_like(part.token_weights), torch.full_like(part.lengths, length)
    return replace(part, completion_mask=mask, token_weights=weights, lengths=lengths)


def policy_logps(model: nn.Module, batch: TrainBatch, args: GRPOConfig) -> tuple[Tensor, Tensor]:
    """`token_logps` of the policy that is active, at the temperature of the rollout: logps and entropy, (B, C)."""
    # layers under gradient checkpointing drop any KV cache, so no prefix can be shared then; nor is it without a
    # gradient, for in bfloat16 the same policy would then differ from itself by rounding
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
