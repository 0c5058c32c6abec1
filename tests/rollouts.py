"""Tests of sampling share these end-of-sequence tokens and settings, and this comparison of two rollouts."""

import torch
from models import VOCABULARY

from tunix_torch.rollout.tokens import SamplingParams

NEVER = (VOCABULARY,)  # no token has this id, so no completion ends
SOME = tuple(range(1, 9))  # these end a completion of a random model after about twelve tokens
MORE = tuple(range(1, 17))  # these end one after about half as many
GROUP = 3
PARAMS = SamplingParams(max_new_tokens=20)  # completions are longer than two windows of attention


def assert_same(left, right):
    assert torch.equal(left.completion_mask, right.completion_mask)
    assert torch.equal(left.completion_ids * left.completion_mask, right.completion_ids * right.completion_mask)
    torch.testing.assert_close(left.sampler_logps, right.sampler_logps, rtol=0, atol=1e-5)
