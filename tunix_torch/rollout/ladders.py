"""Which shapes the rows of a rollout take one after the other, as their caches fill and rows end."""

import torch
from torch import Tensor

from ..runtime import device, mesh

SHORTEST_HALVED = 128  # tokens: where completions can't be longer, more decode steps are not worth compiling
LEAVE_AT = 7 / 8  # where any number of rows will do, those that have ended leave when so few are left


def cache_widths(room: int) -> list[int]:
    """Widths through which a static KV cache of up to `room` tokens a row grows: at most four, the last is `room`.

    All but the last are multiples of 128, a TPU's lanes, and no step is much smaller than the others.
    """
    portion = max(1, -(-room // (4 * 128))) * 128
    return [*range(portion, room - portion // 2 + 1, portion), room]


def group_sizes(group_size: int, num_prompts: int, num_tokens: int) -> list[int]:
    """How many rows of every prompt are decoded: all, and as they end a half and a quarter, where `num_tokens` is long.

    On a mesh every device must have as many rows as the others.
    """
    sizes = [group_size]
    while num_tokens >= SHORTEST_HALVED and len(sizes) < 3 and sizes[-1] > 1:
        half = -(-sizes[-1] // 2)
        if num_prompts * half % mesh.axis_size("fsdp"):
            break
        sizes.append(half)
    return sizes


def make_ladder(num_prompts: int, group_size: int, num_tokens: int, interval: int) -> "EveryShape | FewShapes":
    """The ladder for this machine's decode step; for the arguments see `FewShapes`."""
    if device.step_kind() == "eager":
        return EveryShape()
    return FewShapes(num_prompts, group_size, num_tokens, interval)


class EveryShape:
    """Every number of rows and every width of the cache is a rung, where a new shape costs nothing."""

    def looks(self, num_decoded: int) -> bool:
        """Whether to look which rows have ended, after so many steps."""
        return True

    def width(self, group_size: int, num_tokens: int) -> int:
        """How wide the cache is that has room for so many tokens."""
        return num_tokens

    def rows_that_stay(self, ended: Tensor) -> Tensor | None:
        """The rows to continue with, (fewer,) int64, where `ended` (R,) bool leaves some. None: continue with all."""
        num_left = len(ended) - int(ended.sum())
        return None if num_left > LEAVE_AT * len(ended) else (~ended).nonzero()[:, 0]


class FewShapes:
    """Few rungs, where each has a step that is compiled, or recorded as a graph.

    The cache grows in portions. When no group has more than half of its rows left, every group goes on with a half,
    in which those that are left come first. Prompts keep their places, and so their keys and values stay where they
    are. Half groups use only every second width and quarters only one, since a wider cache
    costs few rows little.

    Args:
        num_prompts, group_size: N and G.
        num_tokens: C, that is C - 1 steps.
        interval: after so many steps each the host looks which rows have ended, for which it waits.
    """

    def __init__(self, num_prompts: int, group_size: int, num_tokens: int, interval: int) -> None:
        self.num_prompts, self.interval = num_prompts, interval
        plans = device.planner() is not None  # a plan of a job's memory looks at the largest shape only
        widths = [num_tokens - 1] if plans else cache_widths(num_tokens - 1)
        self.sizes = group_sizes(group_size, num_prompts, 0 if plans else num_tokens)
        self.widths = {size: widths[::-1][:: 2**level][::-1] for level, size in enumerate(self.sizes)}

    def looks(self, num_decoded: int) -> bool:
        """Whether to look which rows have ended, after so many steps."""
        return num_decoded > 0 and num_decoded % self.interval == 0

    def width(self, group_size: int, num_tokens: int) -> int:
        """How wide the cache is that has room for so many tokens of each row."""
        return next(width for width in self.widths[group_size] if width >= num_tokens)

    def smaller(self, group_size: int) -> int | None:
        """The next smaller number of rows a group; None: there is no such rung."""
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
        """Rows, (N * n,) int64, by their places in groups of this size, (N, n)."""
        return (torch.arange(self.num_prompts)[:, None] * group_size + places).flatten()
