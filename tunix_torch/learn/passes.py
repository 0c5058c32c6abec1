"""How a batch is laid out for the model: which rows are computed together, and where each result is found.

A batch is cut into micro-batches, and each of them becomes a `Pass`. There are four ways to lay out its completions:

- plain rows: a row is a prompt and one completion. Gradient checkpointing needs this, since its layers drop KV caches.
  Given rows, which have one completion each, are computed so where weights are split over processes.

In the others each prompt is computed once and its completions continue its KV cache. Gradients are exact all the same:

- padded rows: a row is one completion, as wide as the batch has room for.
- bucketed rows: completions of similar length form a block of their width, so that little padding is computed. Shapes
  follow the data, so this is for devices that compile nothing.
- packed rows: several completions of a prompt share a row. This is how fixed shapes hold little padding.

Supervised fine-tuning has another one, where `data/packs.py` has packed its rows:

- packs: a row holds several texts, each with its prompt. Nothing is shared, and layers may be recomputed.

Everything about a layout follows from the lengths of the completions, which lie in main memory. Building one therefore
never waits for the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..batch import TrainBatch
from ..config.grpo import GRPOConfig
from ..runtime import device, mesh, phases, together
from ..runtime.memory import noting_what_takes_less
from ..runtime.sharding import shard_rows
from .packing import first_fit

SHORTEST_PACKED = 128  # tokens: where no completion can be this long, a second shape is not worth its compilation
_SHORT = 16  # tokens: completions under this many share one bucket

T = TypeVar("T")


@dataclass
class Block:
    """R rows of W tokens that are computed together. Each row continues a prompt."""

    prompts: Tensor | int  # (R,) int64: the prompt of each row; or how many rows, side by side, every prompt has
    tokens: Tensor | None = None  # (R, W) int64: which token of the completions stands here; None: all, as they are
    kept: Tensor | None = None  # (K,) int64: those of the R * W tokens whose results are kept; None: all
    segments: Tensor | None = None  # (R, W) int64: the completion of each token; None: a row holds one completion
    offsets: Tensor | None = None  # (R, W) int64: the place of each token in its completion; given with segments

    def by_row(self, of_prompts: Tensor) -> Tensor:
        """Give each row the entry of its prompt: (N, ...) -> (R, ...)."""
        if isinstance(self.prompts, int):  # on a mesh each device keeps its rows
            return of_prompts.repeat_interleave(self.prompts, dim=0)
        return of_prompts[self.prompts]


@dataclass
class Pass:
    """A micro-batch of N prompts and B completions of C tokens, as the model computes it.

    Tokens of completions are numbered row by row, `row * C + column`, and results block by block. With `parts` > 1 the
    tokens and the results are cut into so many equal parts, and the numbers begin anew in each: one part for each
    prompt lets every device of a mesh look up its own.
    """

    batch: TrainBatch
    blocks: list[Block]  # one that is kept whole, or any number of which some tokens are kept
    shares_prompts: bool = True  # each prompt is computed once; False: every row begins with its prompt
    source: Tensor | None = None  # (B, C) int64: which result belongs to each token; None: results are (B, C) already
    parts: int = 1
    learns: bool = True  # False: what it adds to the gradient is 0, see `equal_rewards.py`

    def ids_of(self, block: Block) -> Tensor:
        """The tokens of a block: (R, W) int64."""
        ids = self.batch.completion_ids
        return ids if block.tokens is None else _look_up(ids, block.tokens, self.parts)

    def in_place(self, results: Tensor) -> Tensor:
        """Put the results of the kept tokens of all blocks in their tokens' places: (B, C). Padding has any values."""
        return results if self.source is None else _look_up(results, self.source, self.parts)


def _look_up(table: Tensor, numbers: Tensor, parts: int) -> Tensor:
    """The entries of a table that have these numbers in each of its equal parts: of the shape of `numbers`."""
    return table.reshape(parts, -1).gather(1, numbers.reshape(parts, -1)).view(numbers.shape)


# ---- passes of a batch ----


def in_passes(batch: TrainBatch, args: GRPOConfig, compute: Callable[[Pass], T]) -> list[T]:
    """Return what `compute` returns for each pass of a batch. All forward and backward passes of learning run in here,
    or in `run_passes`.

    `compute` ends with `device.sync()`, so that on XLA each pass is a graph of its own.
    """
    return run_passes(lay_out(batch, args), compute)


def run_passes(passes: Sequence[Pass], compute: Callable[[Pass], T]) -> list[T]:
    """`in_passes` of a batch that is laid out already."""
    results, done, total = [], 0, sum(len(part.batch.completion_ids) for part in passes)
    for part in passes:
        results.append(compute(part))
        done += len(part.batch.completion_ids)
        phases.advance(phases.ROWS, done, total)
    return results


def lay_out(batch: TrainBatch, args: GRPOConfig) -> list[Pass]:
    """The passes of a batch: on XLA all of one shape, or of two where completions are packed."""
    if device.static_shapes() or args.gradient_checkpointing or args.splitting is not None:
        rows = args.rows_per_pass
    else:  # as many rows as their real lengths allow
        rows = args.rows_in_pass_of(int(batch.lengths.sum()) / len(batch.prompt_ids))
    parts = batch.split(rows)
    if device.computes_views_again():  # a part that stands alone here may be a view as well
        parts = [_with_own_tensors(part) for part in parts]
    passes = [_laid_out(part, args) for part in parts]
    for part in parts:
        for tensor in part.tensors():
            shard_rows(tensor)
    device.sync()  # the graphs of the passes begin after this cut, so that they are alike
    return passes


def _with_own_tensors(part: TrainBatch) -> TrainBatch:
    """A micro-batch that is no view of its batch, so that all micro-batches have the same graph."""
    columns = {field.name: getattr(part, field.name) for field in fields(part)}
    return TrainBatch(**{name: value if value is None else value.clone() for name, value in columns.items()})


def _laid_out(part: TrainBatch, args: GRPOConfig) -> Pass:
    """A micro-batch as one pass. Processes that gather each other's weights must run the layers equally often, so there
    is one block, whatever the lengths are."""
    if args.gradient_checkpointing or (args.splitting is not None and not args.use_grpo):
        return plain_rows(part)
    return padded_rows(part) if args.splitting is not None else shared_prompts(part, _packs(args))


def columns_in_use(mask: Tensor, args: GRPOConfig) -> int:
    """How many columns of a rollout are learned from, by its `completion_mask`, (B, C) on the CPU. Those in which all
    rows are padding are left out where a new shape compiles nothing."""
    if device.static_shapes():
        return mask.shape[1]
    width = max(1, int(mask.any(dim=0).sum()))
    return width if args.splitting is None else max(together.gather(width))


def plain_rows(batch: TrainBatch) -> Pass:
    """A micro-batch in which each row is a prompt and one completion."""
    return Pass(batch, [Block(_group_size(batch))], shares_prompts=False)


def shared_prompts(batch: TrainBatch, may_pack: bool = False) -> Pass:
    """A micro-batch in which completions continue their prompts, with as little padding as this device allows.

    Args:
        may_pack: where shapes are static, completions may be packed into half as many rows, if they fit.
    """
    if not device.static_shapes():
        return bucketed_rows(batch)
    num_bins = _num_bins(batch) if may_pack else None
    packed = None if num_bins is None else packed_rows(batch, num_bins)
    return packed or padded_rows(batch)


def padded_rows(batch: TrainBatch) -> Pass:
    """A micro-batch in which each completion continues its prompt in a row of C tokens."""
    return Pass(batch, [Block(_group_size(batch))])


def lay_out_packs(batch: TrainBatch, segments: Tensor, offsets: Tensor, rows_per_pass: int | None) -> list[Pass]:
    """The passes of a batch whose rows are packs, on XLA all of one shape.

    Args:
        batch: N packs of W tokens, as completions without prompts.
        segments, offsets: (N, W) int64, the text of each token, -1 at padding, and its place in this text.
        rows_per_pass: how many packs are computed together; None: all.
    """
    parts = batch.split(rows_per_pass)
    sizes = [len(part.completion_ids) for part in parts]
    passes = []
    for part, of_part, places in zip(parts, segments.split(sizes), offsets.split(sizes), strict=True):
        for tensor in (*part.tensors(), of_part, places):
            shard_rows(tensor)
        passes.append(Pass(part, [Block(1, segments=of_part, offsets=places)], shares_prompts=False))
    device.sync()
    return passes


def bucketed_rows(batch: TrainBatch) -> Pass:
    """A micro-batch in which completions of similar length are computed together. Only their tokens are kept."""
    num_rows, width = batch.completion_ids.shape
    lengths = batch.lengths.clamp(min=1)  # an empty completion keeps one token, which is masked in the end
    upload, columns = _uploader(batch), torch.arange(width)
    blocks, starts, num_kept = [], torch.zeros(num_rows, dtype=torch.int64), 0
    for bucket, longest in length_buckets(lengths.tolist()):
        rows = torch.tensor(bucket)
        ends = lengths[rows].cumsum(0)
        starts[rows] = num_kept + ends - lengths[rows]
        num_kept += int(ends[-1])
        tokens = rows[:, None] * width + columns[:longest]  # (R, longest)
        kept = (columns[:longest] < lengths[rows, None]).flatten().nonzero()[:, 0]
        blocks.append(Block(upload(rows // _group_size(batch)), upload(tokens), upload(kept)))
    source = (starts[:, None] + columns).clamp(max=num_kept - 1)  # (B, C)
    return Pass(batch, blocks, source=upload(source))


def length_buckets(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Sort rows into buckets of similar length: (rows, their greatest length) for each bucket, the longest first.

    A bucket's shortest row has more than 3/4 of its longest's tokens, or all of its rows are short.
    """
    buckets: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not buckets or max(lengths[row], _SHORT) * 4 <= 3 * buckets[-1][1]:
            buckets.append(([], lengths[row]))
        buckets[-1][0].append(row)
    return buckets


def packed_rows(batch: TrainBatch, num_bins: int) -> Pass | None:
    """A micro-batch in which each prompt's completions lie in `num_bins` rows of C tokens; None: they do not fit."""
    num_prompts, width = len(batch.prompt_ids), batch.completion_ids.shape[1]
    fitted = [first_fit(group, num_bins, width) for group in batch.lengths.view(num_prompts, -1).tolist()]
    if None in fitted:
        return None
    columns, starts = torch.arange(width), torch.tensor(fitted)  # (C,) and (N, G)
    tokens = torch.full((num_prompts, num_bins * width), -1)
    for in_group, group, of_group in zip(tokens, fitted, batch.lengths.view(num_prompts, -1).tolist(), strict=True):
        for row, (start, length) in enumerate(zip(group, of_group, strict=True)):
            in_group[start : start + length] = row * width + columns[:length]
    tokens = tokens.view(-1, width)  # (N * bins, C), -1 at padding
    source = (starts.view(-1, 1) + columns).clamp(max=num_bins * width - 1)  # (B, C)
    upload = _uploader(batch)
    block = Block(
        num_bins,
        tokens=upload(tokens.clamp(min=0)),
        segments=upload(tokens // width),  # -1 at padding
        offsets=upload(tokens % width),
    )
    return Pass(batch, [block], source=upload(source), parts=num_prompts)


def _group_size(batch: TrainBatch) -> int:
    """Completions of each prompt."""
    return len(batch.completion_ids) // len(batch.prompt_ids)


def _uploader(batch: TrainBatch) -> Callable[[Tensor], Tensor]:
    """A function that copies what is known about rows to where the batch is."""
    place = batch.completion_ids.device
    return lambda tensor: shard_rows(device.upload(tensor, place))


# ---- two shapes where shapes are static ----


def _packs(args: GRPOConfig) -> bool:
    """Whether completions may be packed. A plan looks at the largest shape only; only GRPO rehearses a second one."""
    long_enough = args.use_grpo and args.generation_max_length >= SHORTEST_PACKED
    return device.static_shapes() and long_enough and not (args.gradient_checkpointing or device.planner() is not None)


def _num_bins(part: TrainBatch) -> int | None:
    """Half as many rows for each prompt as it has completions; None: devices could not share fewer rows equally."""
    num_bins = -(-_group_size(part) // 2)
    if num_bins == _group_size(part) or len(part.prompt_ids) * num_bins % mesh.axis_size("fsdp"):
        return None
    return num_bins


def rehearsals(batch: TrainBatch, args: GRPOConfig) -> list[list[TrainBatch]]:
    """Zero-weight micro-batches that compile both learning shapes in advance: a list of them for each shape.

    Learning from the first of a list makes gradients. The others, where a step has such passes, add to those.
    """
    parts, width = batch.split(args.rows_per_pass), batch.completion_ids.shape[1]
    if not _packs(args) or all(_num_bins(part) is None for part in parts):
        return []
    adding = len(parts) > 1 or args.gradient_accumulation_steps > 1
    parts = parts[:1] + list({len(part.completion_ids): part for part in parts}.values()) * adding
    return [[_of_length(part, length) for part in parts] for length in (width, 1)]


@noting_what_takes_less("learning")
def rehearse(
    batch: TrainBatch, args: GRPOConfig, learn_from: Callable[[TrainBatch], Any], forget: Callable[[], None]
) -> None:
    """Compile every shape that a learning pass may take, so that none is new later. CPU and CUDA need none of this.

    Args:
        learn_from: does all that learning from a micro-batch takes, without the optimizer's step.
        forget: drops the gradients.
    """
    with device.random_numbers_kept():
        for parts in rehearsals(batch, args):
            for part in parts:
                learn_from(part)
            forget()


def _of_length(part: TrainBatch, length: int) -> TrainBatch:
    """The micro-batch with weights of zero and `length` tokens in each completion."""
    mask = torch.zeros_like(part.completion_mask)
    mask[:, :length] = True
    weights, lengths = torch.zeros_like(part.token_weights), torch.full_like(part.lengths, length)
    return replace(part, completion_mask=mask, token_weights=weights, lengths=lengths)
