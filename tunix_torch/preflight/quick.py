"""Plan a job by arithmetic alone: weights, KV cache and activations against a chip's HBM. Seconds, no compiler.

Shapes and layouts are the library's own (`sharding.axes_of` over the model's parameters). What XLA keeps besides is
estimated: `SAVED` is fitted to compiled learning passes, see `test_preflight.py` for how near that comes.
"""

import math
from dataclasses import dataclass, replace

from accelerate import init_empty_weights

from ..learn.logprobs import LOGITS_AT_ONCE
from ..model.attention import kept_tokens, layer_windows
from ..model.loading import add_lora, lora_config, torch_dtype
from ..runtime.sharding import axes_of, check_divisible
from .models import vision_parameters
from .plan import GraphPlan, Job, Plan, Traffic
from .trace import DECODE, LEARN, OLD, OPTIMIZER, PREFILL, REFERENCE, model_of_zeros

FLOAT = 4  # bytes of LoRA matrices, their gradients, AdamW's averages, logits
# What a learning pass keeps of each token in each layer, in numbers of the base weights' type: so many times the
# hidden size, the MLP's share, the query heads' share, and the scores of every query with every key of a head.
SAVED = {"hidden": 6, "mlp": 4, "heads": 4, "scores": 2.5}


@dataclass(frozen=True)
class Share:
    """What one chip has of a job."""

    job: Job
    tp: int
    # bytes
    weights: float  # of the base model
    head: float  # of the embedding, which is the head, among them
    lora: float
    vision: float  # every chip holds it, and no graph reads it
    # of a step, and of a micro-batch of it
    prompts: int
    rows: int
    micro_prompts: int
    micro_rows: int
    passes: int  # micro-batches a step

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the base weights, the KV cache and the hidden states."""
        return torch_dtype(self.job.model.model_dtype).itemsize

    @property
    def decoder(self) -> float:
        """Numbers in the layers' weights."""
        return (self.weights - self.head) / self.itemsize

    @property
    def heads(self) -> float:
        """Numbers in a token's queries."""
        return self.job.config.num_attention_heads * self.job.config.head_dim / self.tp

    @property
    def kv_row(self) -> float:
        """Bytes of a token's keys and values in all layers."""
        config = self.job.config
        heads = config.num_key_value_heads / (self.tp if config.num_key_value_heads % self.tp == 0 else 1)
        return 2 * config.num_hidden_layers * heads * config.head_dim * self.itemsize

    @property
    def key_width(self) -> int:
        """Tokens that the last one of a row looks at."""
        return self.job.args.max_prompt_length + self.job.args.generation_max_length - 1

    @property
    def cache(self) -> float:
        """Bytes of the rollout's KV cache: that of the prompts, and at its widest that of the rows' own tokens."""
        tokens = sum(self.prompts * prompt + self.rows * own for prompt, own in self.kept)  # in all layers together
        return tokens * self.kv_row / len(self.kept)

    @property
    def kept(self) -> list[tuple[int, int]]:
        """Of each layer, how many of a prompt's tokens and of a row's own it keeps while rows are decoded."""
        args = self.job.args
        windows, count = layer_windows(self.job.config), (args.max_prompt_length, args.generation_max_length - 1)
        return [kept_tokens(window, *count) for window in windows]

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch; each prompt counts once."""
        args = self.job.args
        return self.micro_rows * args.generation_max_length + self.micro_prompts * args.max_prompt_length

    @property
    def scores(self) -> float:
        """Attention scores of a micro-batch in one layer."""
        width = self.job.args.generation_max_length
        return self.micro_rows * width * self.key_width * self.job.config.num_attention_heads / self.tp

    @property
    def prefix(self) -> float:
        """Bytes of a micro-batch's keys and values: the prompts' own, and again with each row."""
        return (self.micro_prompts * self.job.args.max_prompt_length + self.micro_rows * self.key_width) * self.kv_row

    @property
    def logits(self) -> float:
        """Bytes of one row's logits."""
        return self.job.config.vocab_size / self.tp * FLOAT

    @property
    def chunk(self) -> float:
        """Bytes of the logits that are alive at once while a micro-batch is scored."""
        numbers = self.micro_rows * self.job.args.generation_max_length * self.job.config.vocab_size / self.tp
        return 4 * min(LOGITS_AT_ONCE, numbers) * FLOAT

    @property
    def one_layer(self) -> float:
        """Bytes that a layer leaves of a micro-batch for the backward pass."""
        config = self.job.config
        numbers = self.tokens * (
            SAVED["hidden"] * config.hidden_size
            + SAVED["mlp"] * config.intermediate_size / self.tp
            + SAVED["heads"] * self.heads
        )
        return (numbers + SAVED["scores"] * self.scores) * self.itemsize

    @property
    def forward_flops(self) -> float:
        """Of one forward pass over a micro-batch."""
        config, width = self.job.config, self.job.args.generation_max_length
        layers = 2 * self.tokens * self.decoder + 4 * self.scores * config.head_dim * config.num_hidden_layers
        return layers + 2 * self.micro_rows * width * self.head / self.itemsize

    def reduced(self, tokens: float, times: int = 1) -> dict[str, Traffic]:
        """All-reduces of hidden states over tp: two a layer and one after the embedding."""
        count = times * (2 * self.job.config.num_hidden_layers + 1) if self.tp > 1 else 0
        one = 2 * tokens * self.job.config.hidden_size * self.itemsize * (self.tp - 1) / self.tp
        return {"all-reduce": Traffic(count, count * one)}


def quick_plan(job: Job) -> Plan:
    """The same graphs as `plan.plan_job`, with figures by arithmetic.

    Raises:
        ValueError: the mesh does not divide the model or the batch.
    """
    share = share_of(job)
    graphs = [prefill(share), decode(share)]
    if job.args.beta > 0:
        graphs.append(reference(share))
    if job.args.num_iterations > 1:
        graphs.append(replace(reference(share), name=OLD, argument_bytes=share.weights + share.lora))
    graphs += [learn(share), optimizer(share)]
    for graph in graphs:
        graph.bound_by(job.topology.chip)
    return Plan(job, graphs)


def share_of(job: Job) -> Share:
    """What one chip has of a job.

    Raises:
        ValueError: the mesh does not divide the model or the batch.
    """
    sizes, args = mesh_sizes(job), job.args
    weights, head, lora = parameter_bytes(job, sizes)
    fsdp, micro = sizes["fsdp"], args.rows_per_pass or job.rows
    return Share(
        job,
        sizes["tp"],
        weights,
        head,
        lora,
        vision=vision_parameters(job.model.model_name) * torch_dtype(job.model.model_dtype).itemsize,
        prompts=_rows_of(args.per_device_train_batch_size, fsdp),
        rows=_rows_of(job.rows, fsdp),
        micro_prompts=_rows_of(max(1, micro // args.num_completions_per_prompt), fsdp),
        micro_rows=_rows_of(micro, fsdp),
        passes=-(-job.rows // micro),
    )


def prefill(share: Share) -> GraphPlan:
    """Prompts through the model, once each: the cache comes out."""
    tokens = share.prompts * share.job.args.max_prompt_length
    return GraphPlan(
        PREFILL,
        1,
        [],
        argument_bytes=share.weights + share.lora,
        output_bytes=share.cache,
        temporary_bytes=2 * share.rows * share.logits,
        held_bytes=2 * share.lora + share.vision,
        flops=2 * tokens * share.decoder + 2 * share.prompts * share.head / share.itemsize,
        hbm_traffic=share.weights + share.lora + share.cache,
        collectives=share.reduced(tokens),
    )


def decode(share: Share) -> GraphPlan:
    """One token of every row."""
    attention = 4 * share.rows * share.heads * sum(prompt + own for prompt, own in share.kept)
    return GraphPlan(
        DECODE,
        share.job.args.generation_max_length - 1,
        [],
        argument_bytes=share.weights + share.lora + share.cache,
        temporary_bytes=3 * share.rows * share.logits,
        held_bytes=2 * share.lora + share.vision,
        flops=2 * share.rows * (share.decoder + share.head / share.itemsize) + attention,
        hbm_traffic=share.weights + share.lora + share.cache,
        collectives=share.reduced(share.rows),
    )


def reference(share: Share) -> GraphPlan:
    """Log-probabilities of a micro-batch by the base model."""
    return GraphPlan(
        REFERENCE,
        share.passes,
        [],
        argument_bytes=share.weights,
        temporary_bytes=share.prefix + share.chunk + share.one_layer,
        held_bytes=3 * share.lora + share.vision,
        flops=share.forward_flops,
        hbm_traffic=share.weights + 2 * share.prefix + share.job.config.num_hidden_layers * share.one_layer,
        collectives=share.reduced(share.tokens),
    )


def learn(share: Share) -> GraphPlan:
    """Forward and backward of a micro-batch."""
    args, layers = share.job.args, share.job.config.num_hidden_layers
    hidden_states = share.tokens * share.job.config.hidden_size * share.itemsize
    saved = layers * (hidden_states if args.gradient_checkpointing else share.one_layer)
    return GraphPlan(
        LEARN,
        share.passes * args.num_iterations,
        [],
        argument_bytes=share.weights + 2 * share.lora,
        temporary_bytes=share.prefix + share.chunk + saved + 2 * share.one_layer,
        held_bytes=2 * share.lora + share.vision,
        # the base weights are given no gradient
        flops=share.forward_flops * (3 if args.gradient_checkpointing else 2),
        hbm_traffic=2 * share.weights + 4 * share.lora + 2 * (share.prefix + layers * share.one_layer),
        collectives=share.reduced(share.tokens, 2),
    )


def optimizer(share: Share) -> GraphPlan:
    """AdamW on the LoRA matrices."""
    return GraphPlan(
        OPTIMIZER,
        share.job.args.num_iterations,
        [],
        argument_bytes=4 * share.lora,
        output_bytes=share.lora,
        held_bytes=share.weights + share.vision,
        hbm_traffic=7 * share.lora,
    )


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


def _rows_of(rows: int, devices: int) -> int:
    """Rows of a device: all of them where they do not divide, as `sharding.shard_rows` has it."""
    return rows // devices if rows % devices == 0 else rows
