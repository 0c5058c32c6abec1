"""Chooses the shapes that the rows of a rollout take one after the other, as their caches fill and rows end."""

import torch
from torch import Tensor

from ..runtime import device, mesh

SHORTEST_HALVED = 128  # tokens: where completions can't be this long, more decode steps are not worth compiling
LEAVE_AT = 7 / 8  # where a new shape costs nothing, ended rows leave once at most this share of the rows goes on


def cache_widths(room: int) -> list[int]:
    """Widths through which a static KV cache of up to `room` tokens a row grows: at most four, the last is `room`.

    All but the last are multiples of 128, a TPU's lanes, and no increase is much smaller than the others.
    """
    portion = max(1, -(-room // (4 * 128))) * 128
    return [*range(portion, room - portion // 2 + 1, portion), room]


def group_sizes(group_size: int, num_prompts: int, num_tokens: int) -> list[int]:
    """Numbers of rows of each prompt for which there are steps: all and, where completions may be long, 1/2 and 1/4.

    On a mesh every device must have as many rows as the others, so a number that does not allow this is left out.
    """
    sizes = [group_size]
    while num_tokens >= SHORTEST_HALVED and len(sizes) < 3 and sizes[-1] > 1:
        half = -(-sizes[-1] // 2)
        if num_prompts * half % mesh.axis_size("fsdp"):
            break
        sizes.append(half)
    return sizes


def make_ladder(num_prompts: int, group_size: int, num_tokens: int, interval: int) -> "EveryShape | FewShapes":
    """Make the ladder of shapes for this machine's decode step. For the arguments see `FewShapes`."""
    if device.step_kind() == "eager":
        return EveryShape()
    return FewShapes(num_prompts, group_size, num_tokens, interval)


class EveryShape:
    """A ladder for eager steps: each number of rows and each cache width is a rung, since a new shape costs nothing."""

    def looks(self, num_decoded: int) -> bool:
        """Whether the host looks which rows have ended, after `num_decoded` steps."""
        return True

    def width(self, group_size: int, num_tokens: int) -> int:
        """The width of the cache where each row needs room for `num_tokens` tokens."""
        return num_tokens

    def rows_that_stay(self, ended: Tensor) -> Tensor | None:
        """The rows to continue with, (fewer,) int64, where `ended` (R,) bool leaves some. None: continue with all."""
        num_left = len(ended) - int(ended.sum())
        return None if num_left > LEAVE_AT * len(ended) else (~ended).nonzero()[:, 0]


class FewShapes:
    """A ladder of few rungs, since each rung needs a step of its own that is compiled or recorded as a graph.

    The cache grows in portions. When no group has more than half of its rows left, every group goes on with a half,
    in which those that are left come first. Prompts keep their places, and so their keys and values stay where they
    are. Half groups use only every second width and quarters only one, since a cache that is too wide costs few rows
    little.

    Args:
        num_prompts, group_size: N and G.
        num_tokens: C, that is C - 1 steps.
        interval: the host looks which rows have ended once in so many steps, since it must wait for the answer.
    """

    def __init__(self, num_prompts: int, group_size: int, num_tokens: int, interval: int) -> None:
        self.num_prompts, self.interval = num_prompts, interval
        plans = device.planner() is not None  # a plan of a job's memory looks at the largest shape only
        widths = [num_tokens - 1] if plans else cache_widths(num_tokens - 1)
        self.sizes = group_sizes(group_size, num_prompts, 0 if plans else num_tokens)
        self.widths = {size: widths[::-1][:: 2**level][::-1] for level, size in enumerate(self.sizes)}

    def looks(self, num_decoded: int) -> bool:
        """Whether the host looks which rows have ended, after `num_decoded` steps."""
        return num_decoded > 0 and num_decoded % self.interval == 0

    def until_look(self, num_decoded: int) -> int:
        """The number of steps until the host looks, after `num_decoded` steps."""
        return self.interval - num_decoded % self.interval

    def width(self, group_size: int, num_tokens: int) -> int:
        """The smallest width of the cache that has room for `num_tokens` tokens of each row."""
        return next(width for width in self.widths[group_size] if width >= num_tokens)

    def smaller(self, group_size: int) -> int | None:
        """The next smaller number of rows of each group, or None where there is no such rung."""
        return next((size for size in self.sizes if size < group_size), None)

    def rows_that_stay(self, ended: Tensor) -> Tensor | None:
        """The rows to continue with, (fewer,) int64, where `ended` (R,) bool leaves some. None: continue with all."""
        ended = ended.view(self.num_prompts, -1)
        size = self.smaller(ended.shape[1])
        if size is None or int((~ended).sum(dim=1).max()) > size:
            return None
        return self.in_groups(ended.int().argsort(dim=1, stable=True)[:, :size], ended.shape[1])

    def first_rows(self, group_size: int, size: int) -> Tensor:
        """The first `size` rows of every group of `group_size`, (N * size,) int64."""
        return self.in_groups(torch.arange(size).expand(self.num_prompts, -1), group_size)

    def in_groups(self, places: Tensor, group_size: int) -> Tensor:
        """The numbers of rows, (N * n,) int64, that have these places, (N, n), in groups of this size."""
        return (torch.arange(self.num_prompts)[:, None] * group_size + places).flatten()
