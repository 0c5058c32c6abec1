"""The data that flows through one training step. Every tensor's shape, dtype and mask meaning stands here.

Letters: N prompts, G completions a prompt, B = N * G rows, P prompt width, C completion width, R reward functions.
Rows of one group stand side by side: row b belongs to prompt b // G. Prompts are padded on the left, completions on
the right. A field has the name that google-tunix's `TrainExample` has for it, if there is one.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IN_MAIN_MEMORY = ("lengths", "rewards")  # fields of a `TrainBatch`; all others lie on the device


@dataclass
class PromptBatch:
    """N prompts, e.g. `rows[0] == {"question": "6 x 12?", "answer": "72", "tunix/prompt": "<start_of..."}`."""

    prompt_ids: Tensor  # (N, P) int64
    prompt_mask: Tensor  # (N, P) bool, False at padding
    rows: list[dict[str, Any]]  # N rows of the data set, with what `data/rows.py` says is derived from them

    def to(self, device: torch.device) -> "PromptBatch":
        return replace(self, prompt_ids=self.prompt_ids.to(device), prompt_mask=self.prompt_mask.to(device))


@dataclass
class Rollout:
    """What the sampler returns."""

    completion_ids: Tensor  # (B, C) int64, padding after the first end-of-sequence token
    completion_mask: Tensor  # (B, C) bool, True up to and including the first end-of-sequence token
    sampler_logps: Tensor  # (B, C) float32, log-probabilities at the sampling temperature, 0 where masked

    def in_main_memory(self) -> tuple[Tensor, Tensor]:
        """`completion_ids` and `completion_mask` in main memory, by one copy. Python waits for the device."""
        both = torch.cat((self.completion_ids, self.completion_mask.long())).cpu()
        return both[: len(both) // 2], both[len(both) // 2 :].bool()


@dataclass
class TrainBatch:
    """Everything that the loss needs. Without `old_per_token_logps` the batch is used once, and the loss takes the
    current log-probabilities, detached. Without `ref_per_token_logps` there is no KL penalty. `lengths` and `rewards`
    lie in main memory, so that reading them never waits for the device. All other tensors lie on the device."""

    prompt_ids: Tensor  # (N, P) int64
    prompt_mask: Tensor  # (N, P) bool
    completion_ids: Tensor  # (B, C) int64
    completion_mask: Tensor  # (B, C) bool
    advantages: Tensor  # (B,) float32
    token_weights: Tensor  # (B, C) float32: the loss of an optimizer step is sum(per-token loss * token_weights)
    lengths: Tensor  # (B,) int64, what `completion_lengths` says of completion_mask
    ref_per_token_logps: Tensor | None = None  # (B, C) float32
    old_per_token_logps: Tensor | None = None  # (B, C) float32
    sampler_logps: Tensor | None = None  # (B, C) float32, which `learn` compares with its own
    entropy_weights: Tensor | None = None  # (B, C) float32: the entropy bonus is sum(entropy * entropy_weights)
    policy_mask: Tensor | None = None  # (B, C) bool: the tokens that the policy loss counts; None: all with a weight
    rewards: Tensor | None = None  # (B,) float64: the totals that advantages come from; NaN: the group is dropped

    def tensors(self) -> list[Tensor]:
        """The tensors on the device, without those that are None."""
        values = [getattr(self, field.name) for field in fields(self) if field.name not in IN_MAIN_MEMORY]
        return [value for value in values if value is not None]

    def in_main_memory(self) -> "TrainBatch":
        """A copy without gradients whose tensors all lie in main memory. Python waits for the device."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return TrainBatch(**{k: v if v is None else v.detach().cpu().clone() for k, v in columns.items()})

    def split(self, micro_batch_size: int | None) -> list["TrainBatch"]:
        """Cut into micro-batches of `micro_batch_size` rows, each with the prompts of its rows. Their losses add up.

        `micro_batch_size` divides G or is a multiple of it, as `GRPOConfig` checks. With None nothing is cut.
        """
        num_rows, num_prompts = self.completion_ids.shape[0], self.prompt_ids.shape[0]
        if micro_batch_size is None or micro_batch_size >= num_rows:
            return [self]
        group_size = num_rows // num_prompts
        parts = []
        for start in range(0, num_rows, micro_batch_size):
            stop = min(start + micro_batch_size, num_rows)
            cut = {}
            for field in fields(self):
                value = getattr(self, field.name)
                if field.name.startswith("prompt_"):
                    cut[field.name] = value[start // group_size : -(-stop // group_size)]
                else:
                    cut[field.name] = None if value is None else value[start:stop]
            parts.append(TrainBatch(**cut))
        return parts


def completion_lengths(completion_mask: Tensor) -> Tensor:
    """How many columns each row has up to its last token: (B, C) bool -> (B,) int64. Python waits for the device."""
    mask = completion_mask.cpu()
    return (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1)
