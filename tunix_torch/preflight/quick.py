"""Plan a job by arithmetic alone, in seconds and without the compiler: what takes how much of a chip's memory (HBM).

Weights and the KV cache follow from the library's own shapes and shardings (`runtime.sharding.axes_of`). What XLA
keeps besides is estimated: `SAVED_NUMBERS` was fitted to learning passes that were compiled. `tests/preflight` holds
how near the estimates come.
"""

import math
from dataclasses import dataclass, replace

from accelerate import init_empty_weights

from ..learn.logprobs import LOGITS_AT_ONCE
from ..model.attention import kept_tokens, layer_windows
from ..model.loading import add_lora, lora_config, torch_dtype
from ..runtime.sharding import MOST_WIDE_ROWS, axes_of, check_divisible
from .models import vision_parameters
from .plan import CollectiveTraffic, GraphPlan, Job, Plan
from .trace import DECODE, LEARN, OLD, OPTIMIZER, PREFILL, REFERENCE, model_of_zeros

FLOAT = 4  # bytes of a number in LoRA matrices, their gradients, AdamW's averages and logits
# How many numbers, of the base weights' type, a learning pass keeps for the backward pass in each layer: multiples of
# the hidden size, the MLP's width and the width of all queries, for each token; and of the number of attention scores.
SAVED_NUMBERS = {"hidden": 6, "mlp": 4, "heads": 4, "scores": 2.5}


@dataclass(frozen=True)
class Share:
    """One chip's part of a job: of the weights, of a step's batch, and of what a micro-batch takes.

    "Numbers" are counted without their size in bytes; the base weights, the KV cache and the hidden states have
    `itemsize` bytes each.
    """

    job: Job
    fsdp: int
    tp: int
    weight_bytes: float  # of the base model
    head_bytes: float  # the part of them that is the embedding, which is also the head
    lora_bytes: float
    vision_bytes: float  # of the vision tower, which every chip holds whole and no graph reads
    prompts: int  # of a training step
    rows: int  # completions of a training step
    micro_prompts: int  # of a micro-batch
    micro_rows: int  # completions of a micro-batch
    num_micro_batches: int  # of a training step

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the base weights, the KV cache or the hidden states."""
        return torch_dtype(self.job.model.model_dtype).itemsize

    @property
    def part_bytes(self) -> float:
        """Of the weights that a chip reads while rows are decoded, at least: its part of what is whole along fsdp."""
        return self.weight_bytes / self.fsdp

    @property
    def layer_numbers(self) -> float:
        """Numbers in the weights of all layers, without the embedding."""
        return (self.weight_bytes - self.head_bytes) / self.itemsize

    @property
    def query_width(self) -> float:
        """Numbers in the queries of one token in one layer."""
        return self.job.config.num_attention_heads * self.job.config.head_dim / self.tp

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of the keys and values of one token in all layers."""
        config = self.job.config
        heads = config.num_key_value_heads / (self.tp if config.num_key_value_heads % self.tp == 0 else 1)
        return 2 * config.num_hidden_layers * heads * config.head_dim * self.itemsize

    @property
    def key_width(self) -> int:
        """Number of keys that the last token of a row attends to."""
        return self.job.args.max_prompt_length + self.job.args.generation_max_length - 1

    @property
    def cache_bytes(self) -> float:
        """Bytes of the rollout's KV cache at its widest: keys and values of the prompts and of the rows' own tokens."""
        tokens_of_all_layers = sum(self.prompts * prompt + self.rows * own for prompt, own in self.kept_by_layer)
        return tokens_of_all_layers * self.kv_bytes_per_token / len(self.kept_by_layer)

    @property
    def kept_by_layer(self) -> list[tuple[int, int]]:
        """For each layer, of how many tokens of a prompt and of a completion it keeps keys while decoding."""
        args = self.job.args
        windows, count = layer_windows(self.job.config), (args.max_prompt_length, args.generation_max_length - 1)
        return [kept_tokens(window, *count) for window in windows]

    @property
    def micro_tokens(self) -> int:
        """Tokens of a micro-batch, in which each prompt counts once."""
        args = self.job.args
        return self.micro_rows * args.generation_max_length + self.micro_prompts * args.max_prompt_length

    @property
    def micro_scores(self) -> float:
        """Attention scores of a micro-batch in one layer."""
        width = self.job.args.generation_max_length
        return self.micro_rows * width * self.key_width * self.job.config.num_attention_heads / self.tp

    @property
    def micro_kv_bytes(self) -> float:
        """Bytes of a micro-batch's keys and values, which are kept once for each prompt and again for each row."""
        tokens = self.micro_prompts * self.job.args.max_prompt_length + self.micro_rows * self.key_width
        return tokens * self.kv_bytes_per_token

    @property
    def logits_bytes(self) -> float:
        """Bytes of the logits of one token."""
        return self.job.config.vocab_size / self.tp * FLOAT

    @property
    def live_logits_bytes(self) -> float:
        """Bytes of the logits, and of what is computed from them, that exist at once in a learning pass."""
        numbers = self.micro_rows * self.job.args.generation_max_length * self.job.config.vocab_size / self.tp
        return 4 * min(LOGITS_AT_ONCE, numbers) * FLOAT

    @property
    def saved_bytes_per_layer(self) -> float:
        """Bytes that one layer keeps of a micro-batch for the backward pass."""
        config = self.job.config
        numbers = self.micro_tokens * (
            SAVED_NUMBERS["hidden"] * config.hidden_size
            + SAVED_NUMBERS["mlp"] * config.intermediate_size / self.tp
            + SAVED_NUMBERS["heads"] * self.query_width
        )
        return (numbers + SAVED_NUMBERS["scores"] * self.micro_scores) * self.itemsize

    @property
    def forward_flops(self) -> float:
        """Operations of one forward pass over a micro-batch."""
        config, width = self.job.config, self.job.args.generation_max_length
        weights = 2 * self.micro_tokens * self.layer_numbers
        attention = 4 * self.micro_scores * config.head_dim * config.num_hidden_layers
        return weights + attention + 2 * self.micro_rows * width * self.head_bytes / self.itemsize

    def all_reduces_over_tp(self, tokens: float, times: int = 1) -> dict[str, CollectiveTraffic]:
        """Return the all-reduces of hidden states over the axis tp: two in each layer and one after the embedding.

        Args:
            tokens: whose hidden states are summed.
            times: 1 for a forward pass, 2 for a forward and a backward pass.
        """
        count = times * (2 * self.job.config.num_hidden_layers + 1) if self.tp > 1 else 0
        one = 2 * tokens * self.job.config.hidden_size * self.itemsize * (self.tp - 1) / self.tp
        return {"all-reduce": CollectiveTraffic(count, count * one)}


def quick_plan(job: Job) -> Plan:
    """Plan the same graphs as `plan.plan_job`, with figures by arithmetic.

    Raises:
        ValueError: the mesh does not divide the model or the batch.
    """
    share = share_of(job)
    graphs = [plan_prefill(share), plan_decode(share)]
    if job.args.beta > 0:
        graphs.append(plan_reference(share))
    if job.args.num_iterations > 1:
        graphs.append(replace(plan_reference(share), name=OLD, argument_bytes=share.weight_bytes + share.lora_bytes))
    graphs += [plan_learn(share), plan_optimizer(share)]
    for graph in graphs:
        graph.bound_by(job.topology.chip)
    return Plan(job, graphs)


def share_of(job: Job) -> Share:
    """Return one chip's part of a job.

    Raises:
        ValueError: the mesh does not divide the model or the batch.
    """
    sizes, args = mesh_sizes(job), job.args
    weights, head, lora = parameter_bytes(job, sizes)
    fsdp, micro = sizes["fsdp"], args.rows_per_pass or job.rows
    return Share(
        job,
        fsdp,
        sizes["tp"],
        weights,
        head,
        lora,
        vision_bytes=vision_parameters(job.model.model_name) * torch_dtype(job.model.model_dtype).itemsize,
        prompts=_rows_per_device(args.per_device_train_batch_size, fsdp),
        rows=_rows_per_device(job.rows, fsdp),
        micro_prompts=_rows_per_device(max(1, micro // args.num_completions_per_prompt), fsdp),
        micro_rows=_rows_per_device(micro, fsdp),
        num_micro_batches=-(-job.rows // micro),
    )


def plan_prefill(share: Share) -> GraphPlan:
    """Plan the graph that runs each prompt through the model once and returns the KV cache."""
    tokens = share.prompts * share.job.args.max_prompt_length
    return GraphPlan(
        PREFILL,
        1,
        [],
        argument_bytes=share.weight_bytes + share.lora_bytes,
        output_bytes=share.cache_bytes,
        temporary_bytes=2 * share.rows * share.logits_bytes,
        held_bytes=2 * share.lora_bytes + share.vision_bytes,
        flops=2 * tokens * share.layer_numbers + 2 * share.prompts * share.head_bytes / share.itemsize,
        hbm_traffic=share.weight_bytes + share.lora_bytes + share.cache_bytes,
        collectives=share.all_reduces_over_tp(tokens),
    )


def plan_decode(share: Share) -> GraphPlan:
    """Plan the graph that decodes one token of every row."""
    copies = (
        share.part_bytes if share.fsdp > 1 and share.job.rows <= MOST_WIDE_ROWS else 0.0
    )  # see model/wide_layers.py
    attention = 4 * share.rows * share.query_width * sum(prompt + own for prompt, own in share.kept_by_layer)
    return GraphPlan(
        DECODE,
        share.job.args.generation_max_length - 1,
        [],
        argument_bytes=share.weight_bytes + copies + share.lora_bytes + share.cache_bytes,
        temporary_bytes=3 * share.rows * share.logits_bytes,
        held_bytes=2 * share.lora_bytes + share.vision_bytes,
        flops=2 * share.rows * (share.layer_numbers + share.head_bytes / share.itemsize) + attention,
        hbm_traffic=(copies or share.weight_bytes) + share.lora_bytes + share.cache_bytes,
        collectives=share.all_reduces_over_tp(share.rows),
    )


def plan_reference(share: Share) -> GraphPlan:
    """Plan the graph of a micro-batch's log-probabilities under the base model."""
    saved = share.job.config.num_hidden_layers * share.saved_bytes_per_layer
    return GraphPlan(
        REFERENCE,
        share.num_micro_batches,
        [],
        argument_bytes=share.weight_bytes,
        temporary_bytes=share.micro_kv_bytes + share.live_logits_bytes + share.saved_bytes_per_layer,
        held_bytes=3 * share.lora_bytes + share.vision_bytes,
        flops=share.forward_flops,
        hbm_traffic=share.weight_bytes + 2 * share.micro_kv_bytes + saved,
        collectives=share.all_reduces_over_tp(share.micro_tokens),
    )


def plan_learn(share: Share) -> GraphPlan:
    """Plan the graph of a learning pass: the forward and the backward pass of a micro-batch."""
    args, layers = share.job.args, share.job.config.num_hidden_layers
    hidden_states = share.micro_tokens * share.job.config.hidden_size * share.itemsize
    activations = layers * share.saved_bytes_per_layer
    saved = layers * hidden_states if args.gradient_checkpointing else activations
    return GraphPlan(
        LEARN,
        share.num_micro_batches * args.num_iterations,
        [],
        argument_bytes=share.weight_bytes + 2 * share.lora_bytes,
        temporary_bytes=share.micro_kv_bytes + share.live_logits_bytes + saved + 2 * share.saved_bytes_per_layer,
        held_bytes=2 * share.lora_bytes + share.vision_bytes,
        # a backward pass costs as much as a forward pass, since the base weights get no gradient
        flops=share.forward_flops * (3 if args.gradient_checkpointing else 2),
        hbm_traffic=2 * share.weight_bytes + 4 * share.lora_bytes + 2 * (share.micro_kv_bytes + activations),
        collectives=share.all_reduces_over_tp(share.micro_tokens, 2),
    )


def plan_optimizer(share: Share) -> GraphPlan:
    """Plan the graph of AdamW's step on the LoRA matrices."""
    return GraphPlan(
        OPTIMIZER,
        share.job.args.num_iterations,
        [],
        argument_bytes=4 * share.lora_bytes,
        output_bytes=share.lora_bytes,
        held_bytes=share.weight_bytes + share.vision_bytes,
        hbm_traffic=7 * share.lora_bytes,
    )


def mesh_sizes(job: Job) -> dict[str | None, int]:
    """Return the number of devices along each axis of the mesh, which is 1 for an axis that the mesh lacks.

    Raises:
        ValueError: fsdp does not divide the prompts of a step.
    """
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
    """Return the bytes on one chip of the base weights, of the embedding among them, and of the LoRA.

    Raises:
        ValueError: an axis of the mesh does not divide a parameter.
    """
    model = model_of_zeros(job.config, torch_dtype(job.model.model_dtype))
    with init_empty_weights(include_buffers=False):
        model = add_lora(model, lora_config(job.model))
    split_kv_heads = job.config.num_key_value_heads % sizes["tp"] == 0
    layout = [(name, p, axes_of(name, p.dim(), split_kv_heads)) for name, p in model.named_parameters()]
    check_divisible(layout, sizes)
    weights = head = lora = 0.0
    for name, parameter, axes in layout:
        share = parameter.numel() / math.prod(sizes[axis] for axis in axes)
        if "lora_" in name:
            lora += share * FLOAT
        else:
            weights += share * parameter.dtype.itemsize
            if "embed_tokens" in name:
                head = share * parameter.dtype.itemsize
    return weights, head, lora


def _rows_per_device(rows: int, devices: int) -> int:
    """Return how many of these rows one device holds, as `runtime.sharding.shard_rows` spreads them.

    Where they do not divide by the number of devices, every device holds all of them.
    """
    return rows // devices if rows % devices == 0 else rows
