"""The rows of a rollout while they are decoded: their tokens, their KV caches, and which of them still go on."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..model.caches import PrefixCache, RaggedGroups
from ..runtime import compiled, device, phases, together
from ..runtime.sharding import shard_rows
from .ladders import FewShapes, make_ladder
from .own_tokens import Memory, Views, WholeTensors


class Rows:
    """N groups of G rows, side by side, that are decoded together: `while rows.left(): rows.decode(step)`.

    As rows end and caches fill, all tensors go from one shape to the next of a ladder, see `ladders.py`. Where shapes
    may follow the data, every shape is a rung: rows leave soon after they have ended, prompts without rows leave too,
    and a step reads only the tokens that are there. Elsewhere there are few rungs, and a step reads whole tensors with
    a mask.

    Args:
        tokens, logps: the first token of each row and its log-probability, (B,) int64 and float32.
        ended: (B,) bool, whether the first token has ended its row.
        prompt_mask: (N, P) bool.
        uniforms: (B, C) float32.
        prefix: the KV cache of the prompts. It is emptied, since the rows keep its content from now on.
        windows: the windows of all layers, see `attention.layer_windows`.
        pad_token_id: fills the places where nothing has been decoded.
        interval: where the host must wait to see which rows have ended, it looks once in so many tokens.
        seen: (B, V) bool, the tokens that each row has had before its first one, where a step needs them. The step
            adds the token that it is fed.
        memory: tensors of earlier rows of the same shapes, used again so that a recorded step finds its arguments at
            the same addresses; empty for the first such rows. None: a step takes its arguments from any address.
        in_step: all who take part go on until the last row of everyone has ended.
    """

    def __init__(
        self,
        tokens: Tensor,
        logps: Tensor,
        ended: Tensor,
        prompt_mask: Tensor,
        uniforms: Tensor,
        prefix: PrefixCache,
        windows: Sequence[int | None],
        pad_token_id: int,
        interval: int,
        memory: Memory | None = None,
        seen: Tensor | None = None,
        in_step: bool = False,
    ) -> None:
        num_rows, num_tokens = uniforms.shape
        self.in_step = in_step
        self.num_prompts, self.room, self.memory = prefix.num_rows, num_tokens - 1, memory
        self.most = num_rows // self.num_prompts  # rows of each group
        self.windows = [windows[i] for i in prefix.layers]
        self.ladder = make_ladder(self.num_prompts, self.most, num_tokens, interval)
        self.has_few_shapes, is_compiled = isinstance(self.ladder, FewShapes), device.step_kind() == "compiled"
        prompts = [list(tensors) for tensors in zip(*prefix.layers.values(), strict=True)]  # all keys, then all values
        prefix.layers.clear()
        if is_compiled:  # these are views of the projections' results, which the pre-flight can't hold
            prompts = [[x.clone() for x in tensors] for tensors in prompts]
        ids = nn.functional.pad(tokens[:, None], (0, self.room), value=pad_token_id)  # (B, C)
        logps = nn.functional.pad(logps[:, None], (0, self.room))
        prompt_mask = prompt_mask.repeat_interleave(self.most, dim=0)  # (B, P)
        first = ids, logps, ended, prompt_mask, prompt_mask.sum(-1, keepdim=True), uniforms
        first += () if seen is None else (seen,)
        self.first = self._hold("rows", first)
        self.prompts = [self._hold(name, x, 1) for name, x in zip(("keys", "values"), prompts, strict=True)]
        if is_compiled:
            self.own = WholeTensors(self.prompts, self.windows)
        else:
            self.own = Views(self.prompts, self.windows, num_rows, self.room, self.has_few_shapes, memory)
        self.begin()

    # ---- the loop ----

    def left(self) -> bool:
        """Whether any row goes on. When the host looks which rows have ended, these leave if a smaller rung fits."""
        if self.used == self.room:
            return False
        if not self.ladder.looks(self.used):
            return True
        ended = self.tensors[2].cpu()  # the host waits here
        all_ended = bool(ended.all())
        if not together.anyone(not all_ended) if self.in_step else all_ended:
            return False
        while not all_ended and (rows := self.ladder.rows_that_stay(ended)) is not None:
            self._keep(rows)
            ended = ended[rows]
        return True

    def decode(self, step: Callable[..., tuple[Tensor, ...]], most: int | None = None) -> None:
        """Decode one more token of every row; where one call of a step can run it many times, all tokens until the host
        looks or the caches are full, and at most `most`.

        The step takes ids, logps, ended, the number of tokens that a row has in the caches, (1,) int64, prompt_mask,
        lengths of prompts (R, 1), uniforms, a list that is empty or holds the seen tokens (R, V), four lists with a
        tensor for each layer (keys and values of prompts, and the rows' own), and, where groups are not equal, a
        `RaggedGroups`. It returns the first four, changed or new, and adds to the caches and seen tokens in place.
        """
        if self.used == self.width:
            self._widen(self.used + 1)
        runs = 1
        if compiled.RUNS_MANY:
            runs = min(self.ladder.until_look(self.used), self.width - self.used, most or self.room)
            step = partial(step, runs=runs)
        ids, logps, ended, prompt_mask, lengths, uniforms, *seen = self.tensors
        given = prompt_mask, lengths, uniforms, seen
        ids, logps, ended, self.step = step(
            ids, logps, ended, self.step, *given, *self._prompts_in_sight(), *self.own.tensors, *self.ragged
        )
        self.tensors = ids, logps, ended, prompt_mask, lengths, uniforms, *seen
        self.used += runs
        phases.advance(phases.TOKENS, self.used + 1, self.room + 1)

    def results(self) -> tuple[Tensor, Tensor]:
        """The ids and logps of all rows, both (B, C)."""
        if self.chosen is None:
            return self.tensors[:2]
        self._put_back()
        device.sync()
        return self.whole

    # ---- from rung to rung ----

    def begin(self, group_size: int | None = None, width: int | None = None) -> None:
        """Start again with empty caches. A rehearsal gives the number of rows of each group, and the caches' width."""
        self.group_size, self.used = group_size or self.most, 0
        self.width = width or self.ladder.width(self.group_size, min(1, self.room))
        self.whole, self.chosen = self.first[:2], None  # results of all rows; rows that are decoded, None: all
        self.tensors = self.first
        self.ragged: tuple[RaggedGroups, ...] = ()
        self.prompt_of = torch.arange(self.num_prompts).repeat_interleave(self.group_size)  # the prompt of each row
        if self.group_size < self.most:
            self.chosen = self.ladder.first_rows(self.most, self.group_size)
            self._select(self.chosen)
        (self.step,) = self._hold("step", [torch.zeros(1, dtype=torch.int64, device=self.first[0].device)])
        self.own.begin(self.num_prompts * self.group_size, self.width)
        device.sync()

    def rehearse(self, step: Callable[..., tuple[Tensor, ...]]) -> None:
        """Compile every step that rows of any lengths may come to need. Where steps are not compiled, do nothing."""
        if device.step_kind() != "compiled" or device.planner() is not None or self.room == 0:
            return
        for size, widths in self.ladder.widths.items():
            for width in widths:
                self.begin(size, width)
                self.decode(step, most=1)  # only first tokens may be among the seen ones when the rollout begins
                self.results()
                if width < widths[-1]:
                    self._widen(width + 1)
                smaller = self.ladder.smaller(size)
                if smaller is not None:
                    self.begin(size, width)
                    self._keep(self.ladder.first_rows(size, smaller))
        self.begin()

    def _widen(self, num_tokens: int) -> None:
        """Make room for `num_tokens` tokens of each row."""
        self.width = self.ladder.width(self.group_size, num_tokens)
        self.own.resize(self.width, self.used)

    def _keep(self, rows: Tensor) -> None:
        """Go on with these rows only, (fewer,) int64, in their order."""
        if self.chosen is None:
            # These tensors hold the results of the rows that leave, and a recorded step would write over them.
            self.whole = self.tensors[:2] if self.memory is None else [x.clone() for x in self.tensors[:2]]
            self.chosen = rows
        else:
            self._put_back()
            self.chosen = self.chosen[rows]
        index = self._select(rows)
        self._regroup(rows)
        self.width = self.ladder.width(self.group_size, self.width)
        device.sync()
        self.own.resize(self.width, self.used, index)

    def _select(self, rows: Tensor) -> Tensor:
        """Select these rows in every tensor except the caches. Returns their numbers on the device."""
        index = device.upload(rows, self.first[0].device)
        self.tensors = self._hold("rows", [tensor.index_select(0, index) for tensor in self.tensors])
        return index

    def _regroup(self, rows: Tensor) -> None:
        """Find which row belongs to which prompt, now that only `rows` stay. Prompts without rows leave too."""
        if self.has_few_shapes:  # groups stay equal, and all prompts stay
            self.group_size = len(rows) // self.num_prompts
            return
        prompts, self.prompt_of, counts = self.prompt_of[rows].unique_consecutive(
            return_inverse=True, return_counts=True
        )
        if len(prompts) < self.num_prompts:
            self.num_prompts = len(prompts)
            self.prompts = [[x[prompts] for x in tensors] for tensors in self.prompts]
        self.group_size = int(counts.max())
        first = counts.cumsum(0) - counts  # the first row of each prompt
        place_in_group = torch.arange(len(rows)) - first[self.prompt_of]
        self.ragged = (RaggedGroups(self.prompt_of * self.group_size + place_in_group, self.group_size),)

    def _prompts_in_sight(self) -> list[list[Tensor]]:
        """Keys and values of the prompts. Where shapes may follow the data, tokens before a window are left out."""
        if self.has_few_shapes:
            return self.prompts

        def in_sight(x: Tensor, window: int | None) -> Tensor:
            return x if window is None else x[:, :, max(0, x.shape[2] - max(0, window - self.used - 1)) :]

        return [[in_sight(x, w) for x, w in zip(xs, self.windows, strict=True)] for xs in self.prompts]

    def _put_back(self) -> None:
        """Write the results of the decoded rows to their places among those of all rows."""
        index = device.upload(self.chosen, self.first[0].device)
        self.whole = tuple(
            shard_rows(whole.index_copy(0, index, tensor))
            for whole, tensor in zip(self.whole, self.tensors[:2], strict=True)
        )

    def _hold(self, name: str, tensors: Sequence[Tensor], heads_dim: int | None = None) -> list[Tensor]:
        """Return tensors as steps take them: laid on the devices or, with a memory, at the addresses kept for them."""
        if self.memory is None:
            return [shard_rows(tensor, heads_dim) for tensor in tensors]
        held = []
        for i, tensor in enumerate(tensors):
            if (name, i) not in self.memory:
                self.memory[name, i] = tensor.clone()  # no later one is larger
            held.append(self.memory[name, i][: len(tensor)].copy_(tensor))
        return held


def lay_on_devices(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Lay tensors, whose first dimension counts rows, on this machine's devices at the beginning of a rollout."""
    for tensor in tensors:
        shard_rows(tensor)
    device.sync()
    return tensors
