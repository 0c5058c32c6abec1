"""Advantages that are scaled by the whole batch or by each function (GDPO), and the penalty of long completions."""

import numpy as np
import pytest
import torch

from tunix_torch import GRPOConfig
from tunix_torch.rewarding.advantages import compute_group_advantages, overlong_penalties, step_advantages
from tunix_torch.runtime import together

GROUP = 4
REWARDS = torch.rand(5 * GROUP, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REWARDS[:GROUP, 0] = 0.3
REWARDS[2 * GROUP + 1, 1] = torch.nan  # one function does not apply
REWARDS[3 * GROUP, :] = torch.nan  # none does
REWARDS[4 * GROUP : -1, 1] = torch.nan  # one applies to a single row
WEIGHTS = torch.tensor([1.0, 0.5], dtype=torch.float64)
TOTALS = (REWARDS * WEIGHTS).nansum(dim=1)


def advantages_of(**settings):
    args = GRPOConfig(num_completions_per_prompt=GROUP, advantage_epsilon=1e-4, **settings)
    return step_advantages(REWARDS, TOTALS, WEIGHTS, args)


def test_scales_equal_their_definitions(subtests):
    grouped = TOTALS.view(-1, GROUP).numpy()
    centred = grouped - grouped.mean(axis=1, keepdims=True)
    by_group = centred / (grouped.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    for settings, expected in (
        ({}, by_group),
        ({"scale_rewards": "group"}, by_group),
        ({"scale_rewards": True}, by_group),
        ({"scale_rewards": "batch"}, centred / (grouped.std(ddof=1) + 1e-4)),
        ({"scale_rewards": "none"}, centred),
        ({"scale_rewards": False}, centred),
        ({"normalize_advantages": False}, centred),
        ({"algorithm": "dr_grpo"}, centred),
    ):
        with subtests.test(settings=settings):
            np.testing.assert_allclose(advantages_of(**settings), expected.flatten(), rtol=1e-5, atol=1e-6)


def test_gdpo_equals_its_definition():
    """Each function's rewards are normalized in the group, summed with their weights, and scaled over the batch."""
    grouped, sums = REWARDS.view(-1, GROUP, 2).numpy(), np.zeros((5, GROUP))
    for k in range(2):
        for g in range(5):
            values = grouped[g, :, k]
            there = ~np.isnan(values)
            if there.sum() > 1:
                normalized = (values - np.nanmean(values)) / (np.std(values[there], ddof=1) + 1e-4)
                sums[g] += float(WEIGHTS[k]) * np.where(there, normalized, 0.0)
    rewarded = ~np.isnan(REWARDS.numpy()).all(axis=1)
    sums = sums.flatten()
    sums = (sums - sums[rewarded].mean()) / (sums[rewarded].std(ddof=1) + 1e-4)
    expected = np.where(rewarded, sums, 0.0)
    actual = advantages_of(multi_objective_aggregation="normalize_then_sum")
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual[3 * GROUP] == 0 and actual.view(-1, GROUP).mean(dim=1).abs().max() < 1e-6


@pytest.mark.parametrize(
    "settings", [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}]
)
def test_rows_of_other_processes_count(settings, monkeypatch):
    whole = advantages_of(**settings)
    args = GRPOConfig(num_completions_per_prompt=GROUP, advantage_epsilon=1e-4, **settings)
    parts, gathered = (slice(0, 2 * GROUP), slice(2 * GROUP, None)), []
    for part in parts:  # what each of two processes would send to the other
        monkeypatch.setattr(together, "gather_rows", lambda rows: gathered.append(rows) or rows)
        step_advantages(REWARDS[part], TOTALS[part], WEIGHTS, args)
    monkeypatch.setattr(together, "gather_rows", lambda rows: torch.cat(gathered))
    both = torch.cat([step_advantages(REWARDS[part], TOTALS[part], WEIGHTS, args) for part in parts])
    torch.testing.assert_close(both, whole)


@pytest.mark.parametrize(
    "settings", [{"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}]
)
def test_equal_rewards_give_exactly_zero_whatever_epsilon_is(settings):
    args = GRPOConfig(num_completions_per_prompt=GROUP, advantage_epsilon=0.0, **settings)
    for rewards in (torch.full((8, 1), 0.1), torch.tensor([0.1, 0.7]).repeat_interleave(GROUP)[:, None]):
        rewards = rewards.double()
        assert not step_advantages(rewards, rewards[:, 0], torch.ones(1).double(), args).any()


def test_a_given_standard_deviation_takes_the_place_of_the_groups():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    std = torch.tensor(2.0, dtype=torch.float64)
    assert compute_group_advantages(rewards, 4, std=std).tolist() == pytest.approx([0.25, -0.25, -0.25, 0.25])


def test_the_overlong_penalty_equals_equation_13_of_dapo():
    args = GRPOConfig(generation_max_length=20, overlong_buffer_length=5, overlong_penalty=0.5)
    lengths = torch.tensor([1, 15, 16, 18, 20])
    assert overlong_penalties(lengths, args).tolist() == pytest.approx([0.0, 0.0, 0.1, 0.3, 0.5])
    assert not overlong_penalties(lengths, GRPOConfig(generation_max_length=20)).any()
