"""Groups whose rewards are all equal: their advantages are 0, so they are computed without a gradient.

A third to two thirds of the groups of a step are such groups, as a rule. Where nothing but advantages makes a gradient
(no KL penalty, no entropy bonus, no teacher), the gradient of their rows is exactly 0. A backward pass takes about
twice as long as the forward pass, and the memory of all activations. The forward pass stays: what is logged and checked
covers every row.
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..batch import IN_MAIN_MEMORY, TrainBatch
from ..config.grpo import GRPOConfig
from ..runtime import device
from .passes import Pass, in_passes, lay_out, run_passes

ROUNDING = 8 * 2.0**-52  # rewards that differ by less, relative to the largest, count as equal: it is float64 rounding


def all_equal(grouped: Tensor) -> Tensor:
    """Whether the rewards of each group differ by no more than rounding: (N, G, ...) -> (N, 1, ...) bool. NaN counts as
    no reward."""
    least, most = (
        grouped.nan_to_num(math.inf).amin(1, keepdim=True),
        grouped.nan_to_num(-math.inf).amax(1, keepdim=True),
    )
    return most - least <= ROUNDING * grouped.nan_to_num(0.0).abs().amax(dim=1, keepdim=True)


def learn_in_passes(
    batch: TrainBatch, args: GRPOConfig, compute: Callable[[Pass], dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """`in_passes`, in which `compute` runs without a gradient for the rows that have none.

    Returns:
        what `compute` returns for each pass. Where rows were computed apart, it is one dict: numbers of rows are in the
        order of the batch, and scalars are sums.
    """
    without = groups_without_gradient(batch, args)
    if without is None:
        return in_passes(batch, args, compute)
    groups = [(~without).nonzero()[:, 0], without.nonzero()[:, 0]]
    learned, others = (lay_out(_of_groups(batch, some), args) for some in groups)

    def compute_part(part: Pass) -> dict[str, Tensor]:
        with torch.set_grad_enabled(part.learns):
            return compute(part)

    results = run_passes([*learned, *(replace(part, learns=False) for part in others)], compute_part)
    order = _rows_of(torch.cat(groups), len(batch.advantages) // len(without)).argsort()
    order = device.upload(order, batch.advantages.device)
    return [
        {
            name: sum(result[name] for result in results)
            if value.ndim == 0
            else torch.cat([result[name] for result in results])[order]
            for name, value in results[0].items()
        }
    ]


def groups_without_gradient(batch: TrainBatch, args: GRPOConfig) -> Tensor | None:
    """Which groups have a gradient of 0: (N,) bool, some True and some False, in main memory. None: all rows are
    computed alike, since others make a gradient as well, or shapes are fixed, or all groups are of one kind.
    """
    others = args.beta > 0 or args.teacher is not None or batch.entropy_weights is not None
    by_totals = batch.rewards is not None and args.multi_objective_aggregation == "sum_then_normalize"
    # Where processes split the weights, each must run the layers as often as the others.
    if others or not by_totals or device.static_shapes() or args.splitting is not None:
        return None
    equal = all_equal(batch.rewards.view(len(batch.prompt_ids), -1)).flatten()
    return None if equal.all() or not equal.any() else equal


def _rows_of(groups: Tensor, group_size: int) -> Tensor:
    """The numbers of the rows of these groups, (K,) -> (K * G,)."""
    return (groups[:, None] * group_size + torch.arange(group_size)).flatten()


def _of_groups(batch: TrainBatch, groups: Tensor) -> TrainBatch:
    """The rows of these groups, given by their numbers, (K,) int64 in main memory."""
    rows = _rows_of(groups, len(batch.advantages) // len(batch.prompt_ids))
    place = batch.advantages.device
    on_device = {name: device.upload(some, place) for name, some in (("groups", groups), ("rows", rows))}
    columns = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for name, value in columns.items():
        if name in IN_MAIN_MEMORY:
            columns[name] = value if value is None else value[rows]
        elif value is not None:
            columns[name] = value[on_device["groups" if name.startswith("prompt_") else "rows"]]
    return TrainBatch(**columns)
