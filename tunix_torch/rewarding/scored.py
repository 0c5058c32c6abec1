"""A rollout with its rewards: what is learned from, and what is logged about it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..batch import PromptBatch, Rollout
from ..learn.metrics import rollout_metrics
from ..runtime import together


@dataclass
class ScoredRollout:
    """A rollout of N prompts with its rewards. Tensors lie in main memory, but for those of `prompts` and `rollout`."""

    prompts: PromptBatch
    rollout: Rollout
    ids: Tensor  # (B, C) int64, like `rollout.completion_ids`
    mask: Tensor  # (B, C) bool, like `rollout.completion_mask`
    texts: list[str]  # B completions
    rewards: Tensor  # (B, R) float64, NaN where a function did not apply
    totals: Tensor  # (B,) float64
    seconds: float  # that sampling took
    logged: dict[str, float] = field(default_factory=dict)  # numbers that reward functions have logged
    costs: dict[str, float] = field(default_factory=dict)  # what dynamic sampling logs about itself

    def in_memory(self) -> "ScoredRollout":
        """The same with all tensors in main memory, where rows are put together without compiling anything."""
        rollout = Rollout(self.ids, self.mask, self.rollout.sampler_logps.cpu())
        return replace(self, prompts=self.prompts.to(torch.device("cpu")), rollout=rollout)

    def on(self, device: torch.device) -> "ScoredRollout":
        """The same with prompts and rollout on a device."""
        rollout = Rollout(*(x.to(device) for x in (self.ids, self.mask, self.rollout.sampler_logps)))
        return replace(self, prompts=self.prompts.to(device), rollout=rollout)

    def metrics(self, names: Sequence[str], eos_ids: Sequence[int]) -> dict[str, float]:
        """What is logged, over all processes; `names` are those of the reward functions."""
        group_size = len(self.ids) // len(self.prompts.rows)
        ids, mask, *numbers = map(together.gather_rows, (self.ids, self.mask, self.rewards, self.totals))
        speed = {"rollout_tokens_per_second": int(mask.sum()) / self.seconds}
        return rollout_metrics(ids, mask, *numbers, names, group_size, eos_ids) | speed | self.costs | self.logged
