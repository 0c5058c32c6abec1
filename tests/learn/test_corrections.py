"""Weights for completions of another policy equal NumPy recomputations of TRL's four modes and off-policy mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import make_batch

from tunix_torch import GRPOConfig
from tunix_torch.learn.corrections import policy_weights, sampler_ratios

RANDOM = torch.Generator().manual_seed(0)
BATCH = make_batch()
MASK = BATCH.completion_mask
LOGPS, OLD, SAMPLED = (-3 * torch.rand(MASK.shape, generator=RANDOM).masked_fill(~MASK, 0.0) for _ in range(3))
BATCH = replace(BATCH, old_per_token_logps=OLD, sampler_logps=SAMPLED)


def expected_ratios(old, mode, low, high):
    gaps = np.where(MASK, (old - SAMPLED).double(), 0.0)
    if mode.startswith("sequence"):
        gaps = np.broadcast_to(gaps.sum(axis=1, keepdims=True), gaps.shape)
    ratios = np.exp(gaps)
    low, high = -np.inf if low is None else low, np.inf if high is None else high
    return np.clip(ratios, low, high) if mode.endswith("truncate") else ratios * ((ratios >= low) & (ratios <= high))


@pytest.mark.parametrize("low, high", [(None, 1.4), (0.6, None), (0.6, 1.4), (None, None)])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_ratios_equal_their_definitions(mode, low, high):
    if mode.endswith("truncate") and low is None and high is None:
        return
    args = GRPOConfig(sampler_correction=mode, sampler_correction_min=low, sampler_correction_max=high)
    for batch, old in ((BATCH, OLD), (replace(BATCH, old_per_token_logps=None), LOGPS)):
        expected = expected_ratios(old, mode, low, high)
        ratios = sampler_ratios(batch, LOGPS, args)
        np.testing.assert_allclose(ratios, expected, rtol=1e-5)
        weights = policy_weights(batch, LOGPS, ratios, args)
        np.testing.assert_allclose(weights, expected * batch.token_weights.numpy(), rtol=1e-5)


def test_vespo_takes_the_ratios_into_its_own_weight():
    args = GRPOConfig(sampler_correction="token_mask", loss_type="vespo")
    assert policy_weights(BATCH, LOGPS, sampler_ratios(BATCH, LOGPS, args), args) is None


def test_without_settings_there_is_nothing_to_weigh():
    args = GRPOConfig()
    assert sampler_ratios(BATCH, LOGPS, args) is None and policy_weights(BATCH, LOGPS, None, args) is None


def test_a_ratio_that_overflows_is_cut_or_masked():
    batch = replace(BATCH, sampler_logps=SAMPLED - 500.0)
    for mode, expected in (("sequence_truncate", 3.0), ("sequence_mask", 0.0)):
        assert (sampler_ratios(batch, LOGPS, GRPOConfig(sampler_correction=mode)) == expected).all()


@pytest.mark.parametrize("corrected", [False, True])
def test_the_off_policy_mask_equals_its_definition(corrected):
    args = GRPOConfig(off_policy_mask_threshold=0.1, sampler_correction="token_truncate" if corrected else "none")
    kept = []
    for row, mask in enumerate(MASK.numpy()):
        then = (SAMPLED if corrected else OLD)[row].numpy()[mask]
        drift = (then - LOGPS[row].numpy()[mask]).mean()
        kept.append(float(BATCH.advantages[row]) >= 0 or drift <= 0.1)
    assert any(kept) and not all(kept)
    weights = policy_weights(BATCH, LOGPS, None, args)
    assert torch.equal(weights, BATCH.token_weights * torch.tensor(kept)[:, None])


def test_before_the_first_step_no_row_is_off_policy():
    args = GRPOConfig(off_policy_mask_threshold=1e-9)
    weights = policy_weights(replace(BATCH, old_per_token_logps=None), LOGPS, None, args)
    assert torch.equal(weights, BATCH.token_weights)
