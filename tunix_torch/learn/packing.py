"""Chooses which completions of a prompt share a row of fixed width, so that short ones leave little padding."""

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], num_bins: int, width: int) -> list[int] | None:
    """Lay completions into bins of `width` tokens: the longest first, each in the first bin that has room for it.

    Args:
        lengths: tokens of each completion of one prompt.

    Returns:
        the place at which each completion begins, where bins follow each other, so that `start // width` is its bin.
        None: they do not fit.
    """
    starts, room = [0] * len(lengths), [width] * num_bins
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        bin_ = next((i for i in range(num_bins) if room[i] >= lengths[row]), None)
        if bin_ is None:
            return None
        starts[row] = (bin_ + 1) * width - room[bin_]
        room[bin_] -= lengths[row]
    return starts
