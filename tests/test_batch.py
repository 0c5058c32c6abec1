"""A batch that is cut keeps each completion beside its prompt."""

from dataclasses import replace

import pytest
import torch
from models import make_batch

from tunix_torch.batch import completion_lengths


def test_a_completion_ends_with_its_last_token():
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    assert completion_lengths(mask).tolist() == [3, 0, 4]


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 99, None])
def test_a_cut_batch_keeps_each_completion_with_its_prompt(size):
    batch = make_batch((3, 2, 4), (1,) * 12)
    numbers = torch.arange(12)
    batch = replace(
        batch,
        prompt_ids=torch.arange(3)[:, None],
        completion_ids=(numbers // 4)[:, None],
        advantages=numbers.float(),
        sampler_logps=numbers[:, None].float(),
    )
    parts = batch.split(size)
    for part in parts:
        copies = len(part.completion_ids) // len(part.prompt_ids)
        assert torch.equal(part.prompt_ids.repeat_interleave(copies, dim=0), part.completion_ids)
        assert len(part.prompt_mask) == len(part.prompt_ids)
        assert part.old_per_token_logps is None and part.ref_per_token_logps is None
    assert all(len(part.completion_ids) == min(size or 12, 12) for part in parts[:-1])
    for field in ("completion_ids", "completion_mask", "advantages", "token_weights", "sampler_logps"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))
