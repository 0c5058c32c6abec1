"""Plan a job by arithmetic alone: weights, KV cache and activations against a chip's HBM. Seconds, no compiler.

Shapes and layouts are the library's own (`sharding.axes_of` over the model's parameters). What XLA keeps besides is
estimated: `SAVED` is fitted to compiled learning passes, see `tests/test_preflight.py` for how near that comes.
"""

import math

from accelerate import init_empty_weights

from tunix_torch.logprobs import LOGITS_AT_ONCE
from tunix_torch.model import add_lora, lora_config, torch_dtype
from tunix_torch.sharding import axes_of

from .models import vision_parameters
from .plan import GraphPlan, Job, Plan, Traffic
from .trace import DECODE, LEARN, OLD, OPTIMIZER, PREFILL, REFERENCE, model_of_zeros

FLOAT = 4  # bytes of LoRA matrices, their gradients, AdamW's averages, logits
# What a learning pass keeps of each token in each layer, in numbers of the base weights' type: so many times the
# hidden size, the MLP's share, the query heads' share, and the scores of every query with every key of a head.
SAVED = {"hidden": 6, "mlp": 4, "heads": 4, "scores": 2.5}


def quick_plan(job: Job) -> Plan:
    """The same graphs as `plan.plan_job`, with figures by arithmetic.

    Raises:
        ValueError: the mesh does not divide the model or the batch.
    """
    config, args, chip = job.config, job.args, job.topology.chip
    sizes = mesh_sizes(job)
    fsdp, tp = sizes["fsdp"], sizes["tp"]
    itemsize = torch_dtype(job.model.model_dtype).itemsize
    weights, head, lora = parameter_bytes(job, sizes)
    vision = vision_parameters(job.model.model_name) * itemsize  # every chip holds them, and no graph reads them
    decoder = (weights - head) / itemsize  # numbers of a chip's share of the layers

    layers, hidden, vocabulary = config.num_hidden_layers, config.hidden_size, config.vocab_size
    heads = config.num_attention_heads * config.head_dim / tp
    kv_heads = config.num_key_value_heads / (tp if config.num_key_value_heads % tp == 0 else 1)
    width, prompt = args.generation_max_length, args.max_prompt_length
    cache_width = prompt + width - 1
    prompts = _share(args.per_device_train_batch_size, fsdp)
    rows = _share(job.rows, fsdp)
    micro = args.rows_per_pass or job.rows
    passes = -(-job.rows // micro)
    micro_rows, micro_prompts = _share(micro, fsdp), _share(max(1, micro // args.num_completions_per_prompt), fsdp)
    kv_row = 2 * layers * kv_heads * config.head_dim * itemsize  # bytes a token
    cache = rows * cache_width * kv_row
    row_logits = vocabulary / tp * FLOAT

    def reduced(tokens: float, times: float) -> Traffic:
        """All-reduces of hidden states over tp: two a layer and one after the embedding."""
        count = times * (2 * layers + 1) if tp > 1 else 0
        return Traffic(count, count * 2 * tokens * hidden * itemsize * (tp - 1) / tp)

    tokens = micro_rows * width + micro_prompts * prompt  # of a micro-batch
    scores = micro_rows * width * cache_width * config.num_attention_heads / tp
    forward = 2 * tokens * decoder + 4 * scores * config.head_dim * layers + 2 * micro_rows * width * head / itemsize
    prefix = (micro_prompts * prompt + micro_rows * cache_width) * kv_row
    chunk = 4 * min(LOGITS_AT_ONCE, micro_rows * width * vocabulary / tp) * FLOAT
    one_layer = tokens * (
        SAVED["hidden"] * hidden + SAVED["mlp"] * config.intermediate_size / tp + SAVED["heads"] * heads
    )
    one_layer = (one_layer + SAVED["scores"] * scores) * itemsize
    saved = layers * (tokens * hidden * itemsize if args.gradient_checkpointing else one_layer)
    reference = GraphPlan(
        REFERENCE,
        passes,
        [],
        argument_bytes=weights,
        temporary_bytes=prefix + chunk + one_layer,
        held_bytes=3 * lora + vision,
        flops=forward,
        hbm_traffic=weights + 2 * prefix + layers * one_layer,
        collectives={"all-reduce": reduced(tokens, 1)},
    )
    graphs = [
        GraphPlan(
            PREFILL,
            1,
            [],
            argument_bytes=weights + lora,
            output_bytes=cache,
            temporary_bytes=2 * rows * row_logits,
            held_bytes=2 * lora + vision,
            flops=2 * prompts * prompt * decoder + 2 * prompts * head / itemsize,
            hbm_traffic=weights + lora + cache,
            collectives={"all-reduce": reduced(prompts * prompt, 1)},
        ),
        GraphPlan(
            DECODE,
            width - 1,
            [],
            argument_bytes=weights + lora + cache,
            temporary_bytes=3 * rows * row_logits,
            held_bytes=2 * lora + vision,
            flops=2 * rows * (decoder + head / itemsize) + 4 * rows * cache_width * heads * layers,
            hbm_traffic=weights + lora + cache,
            collectives={"all-reduce": reduced(rows, 1)},
        ),
    ]
    if args.beta > 0:
        graphs.append(reference)
    if args.num_iterations > 1:
        graphs.append(GraphPlan(**{**vars(reference), "name": OLD, "argument_bytes": weights + lora}))
    graphs.append(
        GraphPlan(
            LEARN,
            passes * args.num_iterations,
            [],
            argument_bytes=weights + 2 * lora,
            temporary_bytes=prefix + chunk + saved + 2 * one_layer,
            held_bytes=2 * lora + vision,
            flops=forward * (3 if args.gradient_checkpointing else 2),  # the base weights are given no gradient
            hbm_traffic=2 * weights + 4 * lora + 2 * (prefix + layers * one_layer),
            collectives={"all-reduce": reduced(tokens, 2)},
        )
    )
    graphs.append(
        GraphPlan(
            OPTIMIZER,
            args.num_iterations,
            [],
            argument_bytes=4 * lora,
            output_bytes=lora,
            held_bytes=weights + vision,
            hbm_traffic=7 * lora,
        )
    )
    for graph in graphs:
        graph.bound_by(chip)
    return Plan(job, graphs)


def mesh_sizes(job: Job) -> dict[str | None, int]:
    """Devices along each axis; 1 along one that the mesh has not."""
    sizes: dict[str | None, int] = {"fsdp": 1, "tp": 1, None: 1}
    if job.model.mesh is not None:
        sizes |= dict(zip(job.model.mesh[1], job.model.mesh[0], strict=True))
    prompts = job.args.per_device_train_batch_size
    if prompts % sizes["fsdp"]:
        raise ValueError(
            f"per_device_train_batch_size={prompts}: prompts are spread over fsdp={sizes['fsdp']}; "
            "give a multiple of that"
        )
    return sizes


def parameter_bytes(job: Job, sizes: dict[str | None, int]) -> tuple[float, float, float]:
    """A chip's share of the base weights, of the embedding (which is the head) among them, and of the LoRA, in bytes.

    Raises:
        ValueError: an axis of the mesh does not divide a parameter.
    """
    model = model_of_zeros(job.config, torch_dtype(job.model.model_dtype))
    with init_empty_weights(include_buffers=False):
        model = add_lora(model, lora_config(job.model))
    split_kv_heads = job.config.num_key_value_heads % sizes["tp"] == 0
    weights = head = lora = 0.0
    for name, parameter in model.named_parameters():
        axes = axes_of(name, parameter.dim(), split_kv_heads)
        for size, axis in zip(parameter.shape, axes, strict=True):
            if size % sizes[axis]:
                raise ValueError(f"mesh_shape: {axis}={sizes[axis]} does not divide the {size} of {name}")
        share = parameter.numel() / math.prod(sizes[axis] for axis in axes)
        if "lora_" in name:
            lora += share * FLOAT
        else:
            weights += share * parameter.dtype.itemsize
            if "embed_tokens" in name:
                head = share * parameter.dtype.itemsize
    return weights, head, lora


def _share(rows: int, devices: int) -> int:
    """Rows of a device: all of them where they do not divide, as `sharding.shard_rows` has it."""
    return rows // devices if rows % devices == 0 else rows
