"""Rows that are decoded with static shapes, as XLA and CUDA graphs need: few widths of a cache, few sizes of groups."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..model.attention import PrefixCache, kept_tokens
from ..runtime import device, mesh
from ..runtime.sharding import shard_rows

SHORTEST_HALVED = 128  # tokens: where completions can't be longer, more decode steps are not worth compiling


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


class StaticRows:
    """N groups of rows and their KV cache. Shapes change seldom, and always to one of a few, each with its own step.

    The cache grows in portions. When no group has more than half of its rows left, every group goes on with a half,
    in which those that are left come first: prompts keep their places, and so their keys and values stay where they
    are. Fewer rows may as well have a wider cache, so that halves need only every second of the widths, quarters one.

    Args:
        ids, logps: (B, C), of which the first column is filled in.
        ended: (B,) bool, after the first token.
        prompt_mask: (B, P) bool.
        uniforms: (B, C) float32.
        prefix: the KV cache of the prompts; emptied.
        windows: of all layers, see `attention.layer_windows`.
    """

    def __init__(
        self,
        ids: Tensor,
        logps: Tensor,
        ended: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        prefix: PrefixCache,
        windows: Sequence[int | None],
    ) -> None:
        self.num_prompts, room = prefix.num_rows, ids.shape[1] - 1
        self.windows = [windows[i] for i in prefix.layers]
        # All keys, and all values; the pre-flight can't hold them as what they are, views of the projections' results.
        self.of_prompts = [[x.clone() for x in tensors] for tensors in zip(*prefix.layers.values(), strict=True)]
        prefix.layers.clear()
        self.first = ids, logps, ended, prompt_mask, prompt_mask.sum(-1, keepdim=True), uniforms
        for tensor in self.first:
            shard_rows(tensor)
        for tensors in self.of_prompts:
            for tensor in tensors:
                shard_rows(tensor, heads_dim=1)
        plans = device.planner() is not None  # a plan looks at the largest
        widths = [room] if plans else cache_widths(room)
        self.sizes = group_sizes(len(ids) // self.num_prompts, self.num_prompts, 0 if plans else ids.shape[1])
        self.widths = [widths[::-1][:: 2**level][::-1] for level in range(len(self.sizes))]

    def begin(self, level: int = 0, width: int | None = None) -> None:
        """Empty caches, for the first rows of each group: as many as that level's size.

        Again only with steps that leave their arguments as they are, as `decode` says.
        """
        self.level, self.width, self.used = level, width or self.widths[level][0], 0
        num_rows = self.num_prompts * self.sizes[level]
        self.own: list[list[Tensor]] = []  # what was there before makes room
        self.whole, self.chosen = self.first[:2], None  # of all rows; those that are decoded, None: all
        self.tensors = self.first
        if level:
            self.chosen = self._in_groups(torch.arange(self.sizes[level]).expand(self.num_prompts, -1), self.sizes[0])
            self._select(self.chosen)
        self.step = torch.zeros(1, dtype=torch.int64, device=self.first[0].device)
        self.own = [
            [x.new_zeros(num_rows, x.shape[1], k, x.shape[3]) for x, k in zip(xs, self._kept(self.width), strict=True)]
            for xs in self.of_prompts
        ]
        for tensors in self.own:
            for tensor in tensors:
                shard_rows(tensor, heads_dim=1)
        device.sync()

    def decode(self, decode_step: Callable[..., tuple[Tensor, ...]]) -> None:
        """One more token of every row. The step takes and returns ids, logps, ended and its own number.

        It may give back the tensors that it was given, changed.
        """
        if self.used == self.width:
            self._grow()
        ids, logps, ended, *given = self.tensors
        ids, logps, ended, self.step = decode_step(ids, logps, ended, self.step, *given, *self.of_prompts, *self.own)
        self.tensors = ids, logps, ended, *given
        self.used += 1

    def drop_ended(self) -> bool:
        """Let rows leave that have ended, where they are enough. False: all have. The host waits here."""
        ended = self.tensors[2].cpu().view(self.num_prompts, -1)
        most_left = int((~ended).sum(dim=1).max())
        while most_left and self.level + 1 < len(self.sizes) and most_left <= self.sizes[self.level + 1]:
            order = ended.int().argsort(dim=1, stable=True)[:, : self.sizes[self.level + 1]]
            self._halve(order)
            ended = ended.gather(1, order)
        return most_left > 0

    def results(self) -> tuple[Tensor, Tensor]:
        """ids and logps of all rows, (B, C)."""
        if self.chosen is None:
            return self.tensors[:2]
        self._put_back()
        device.sync()
        return self.whole

    def rehearse(self, decode_step: Callable[..., tuple[Tensor, ...]]) -> None:
        """Have all compiled that rows may come to need, whatever their lengths."""
        for level, widths in enumerate(self.widths):
            for width in widths:
                self.begin(level, width)
                self.decode(decode_step)
                self.results()
                if width < widths[-1]:
                    self._grow()
                if level + 1 < len(self.sizes):
                    self.begin(level, width)
                    self._halve(torch.arange(self.sizes[level + 1]).expand(self.num_prompts, -1))

    def _kept(self, width: int) -> list[int]:
        """Of each layer, its width where those without a window have this one.

        A layer with a window keeps no more of a row: then the newest token takes the place of the oldest.
        """
        return [kept_tokens(window, 0, width)[1] for window in self.windows]

    def _in_groups(self, places: Tensor, group_size: int) -> Tensor:
        """Rows, (N * n,) int64, by their places in groups of this size, (N, n)."""
        return (torch.arange(self.num_prompts)[:, None] * group_size + places).flatten()

    def _grow(self) -> None:
        self.width = next(width for width in self.widths[self.level] if width > self.width)
        self._change_caches()

    def _halve(self, places: Tensor) -> None:
        """Go on with some rows of each group, by their places in it, (N, the next level's size)."""
        rows = self._in_groups(places, self.sizes[self.level])
        if self.chosen is None:
            self.whole, self.chosen = self.tensors[:2], rows
        else:
            self._put_back()
            self.chosen = self.chosen[rows]
        self.level += 1
        self.width = next(width for width in self.widths[self.level] if width >= self.width)
        index = self._select(rows)
        device.sync()
        self._change_caches(index)

    def _select(self, rows: Tensor) -> Tensor:
        """Keep these rows, but in the caches. Returns them as they are on the device."""
        index = rows.to(self.first[0].device)
        self.tensors = tuple(shard_rows(tensor.index_select(0, index)) for tensor in self.tensors)
        return index

    def _put_back(self) -> None:
        """What was decoded, where it belongs among all rows."""
        index = self.chosen.to(self.first[0].device)
        self.whole = tuple(
            shard_rows(whole.index_copy(0, index, tensor))
            for whole, tensor in zip(self.whole, self.tensors[:2], strict=True)
        )

    def _change_caches(self, index: Tensor | None = None) -> None:
        """Some rows of the caches, None: all, with room for `width` tokens.

        One after the other, with no name for what is between: one at a time is there twice.
        """
        for tensors in self.own:
            for i, (tensor, width) in enumerate(zip(tensors, self._kept(self.width), strict=True)):
                more = (0, 0, 0, width - tensor.shape[2])
                if index is not None:
                    tensors[i] = shard_rows(nn.functional.pad(tensor.index_select(0, index), more), heads_dim=1)
                elif any(more):
                    tensors[i] = shard_rows(nn.functional.pad(tensor, more), heads_dim=1)
                device.sync()
