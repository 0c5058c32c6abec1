"""Memory for the keys and values of the tokens that rows have decoded, in the shape that the next step takes.

Both classes have each layer's keys in `tensors[0]` and its values in `tensors[1]`, (rows, KV heads, tokens, head dim).
A layer with a sliding window never has more tokens than its window, as the newest one replaces the oldest.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ..model.attention import kept_tokens
from ..runtime import device
from ..runtime.sharding import shard_rows

Memory = dict[tuple[str, int], Tensor]  # each tensor has a name and a number


class WholeTensors:
    """Tensors of exactly the present shape, as a compiled step takes them: each change of the shape copies them.

    Args:
        prompts: keys and values of the prompts, for each layer that has a cache.
        windows: the window of each of these layers, see `attention.layer_windows`.
    """

    def __init__(self, prompts: Sequence[Sequence[Tensor]], windows: Sequence[int | None]) -> None:
        self.prompts, self.windows = prompts, windows
        self.tensors: list[list[Tensor]] = []

    def begin(self, num_rows: int, width: int) -> None:
        """Begin with empty caches that have room for `width` tokens of each row."""
        self.tensors = []  # the earlier tensors are freed before new ones are made
        widths = _kept(self.windows, width)
        self.tensors = [
            [x.new_zeros(num_rows, x.shape[1], k, x.shape[3]) for x, k in zip(xs, widths, strict=True)]
            for xs in self.prompts
        ]
        for tensors in self.tensors:
            for tensor in tensors:
                shard_rows(tensor, heads_dim=1)

    def resize(self, width: int, num_used: int, rows: Tensor | None = None) -> None:
        """Make room for `width` tokens of each row, and keep only the rows `rows`, (fewer,) int64; None: keep all.

        Tensors are replaced one by one, so that only one at a time exists twice.
        """
        for tensors in self.tensors:
            for i, (tensor, kept) in enumerate(zip(tensors, _kept(self.windows, width), strict=True)):
                more = (0, 0, 0, kept - tensor.shape[2])
                if rows is not None:
                    tensors[i] = shard_rows(nn.functional.pad(tensor.index_select(0, rows), more), heads_dim=1)
                elif any(more):
                    tensors[i] = shard_rows(nn.functional.pad(tensor, more), heads_dim=1)
                device.sync()


class Views:
    """Views of tensors that have room for all tokens of all rows: addresses stay, and only rows that move are copied.

    Args:
        prompts, windows: see `WholeTensors`.
        num_rows, room: the most rows, and the most tokens of a row, that there can be.
        are_cleared: whether to begin with zeros. A step with a mask reads memory that is not written yet, which must at
            least be finite.
        memory: where the tensors are kept for later rows of the same shapes; None: they are not kept.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[Tensor]],
        windows: Sequence[int | None],
        num_rows: int,
        room: int,
        are_cleared: bool,
        memory: Memory | None,
    ) -> None:
        self.windows, self.are_cleared = windows, are_cleared
        memory, widths = {} if memory is None else memory, _kept(windows, room)
        for name, xs in zip(("own keys", "own values"), prompts, strict=True):
            for i, (x, width) in enumerate(zip(xs, widths, strict=True)):
                if (name, i) not in memory:
                    memory[name, i] = x.new_empty(num_rows, x.shape[1], width, x.shape[3])
        self.whole = [[memory[name, i] for i in range(len(windows))] for name in ("own keys", "own values")]
        self.rows: list[list[Tensor]] = []  # all memory of the rows that go on
        self.tensors: list[list[Tensor]] = []  # the part of it that a step reads

    def begin(self, num_rows: int, width: int) -> None:
        """Begin with empty caches that have room for `width` tokens of each row."""
        if self.are_cleared:
            for tensors in self.whole:
                for tensor in tensors:
                    tensor.zero_()
        self.rows = [[tensor[:num_rows] for tensor in tensors] for tensors in self.whole]
        self.resize(width, 0)

    def resize(self, width: int, num_used: int, rows: Tensor | None = None) -> None:
        """Do what `WholeTensors.resize` does, where `num_used` tokens of each row have been written."""
        if rows is not None:
            used = _kept(self.windows, num_used)
            for tensors in self.rows:
                for i, (tensor, kept) in enumerate(zip(tensors, used, strict=True)):
                    tensors[i] = tensor[: len(rows)]
                    tensors[i][:, :, :kept] = tensor[:, :, :kept].index_select(0, rows)
        widths = _kept(self.windows, width)
        self.tensors = [[x.narrow(2, 0, k) for x, k in zip(xs, widths, strict=True)] for xs in self.rows]


def _kept(windows: Sequence[int | None], width: int) -> list[int]:
    """The number of tokens of a row that each layer keeps, where a layer without a window keeps `width`."""
    return [kept_tokens(window, 0, width)[1] for window in windows]
