"""Several completions of a prompt in one row, so that fixed shapes hold little padding: where they are short."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pack(lengths: Sequence[int], group_size: int, num_bins: int, width: int) -> tuple[Tensor, Tensor] | None:
    """Lay the completions of each group into so many bins of `width` tokens, longest first, each where it fits first.

    Args:
        lengths: tokens of each completion, those of a group side by side.

    Returns:
        packing (groups * bins, width) int64: which token lies there, as `row in its group * width + place in the row`,
        or -1; starts (rows,) int64: where each completion begins in its group's bins, counted through. None: a group
        does not fit.
    """
    num_groups = len(lengths) // group_size
    packing = torch.full((num_groups, num_bins * width), -1)
    starts = torch.zeros(num_groups, group_size, dtype=torch.int64)
    for group in range(num_groups):
        of_rows, room = lengths[group * group_size : (group + 1) * group_size], [width] * num_bins
        for row in sorted(range(group_size), key=lambda row: -of_rows[row]):
            length = of_rows[row]
            bin_ = next((i for i in range(num_bins) if room[i] >= length), None)
            if bin_ is None:
                return None
            start = (bin_ + 1) * width - room[bin_]
            packing[group, start : start + length] = row * width + torch.arange(length)
            starts[group, row] = start
            room[bin_] -= length
    return packing.view(num_groups * num_bins, width), starts.flatten()
