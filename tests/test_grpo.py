"""Advantages, KL, aggregation and loss equal NumPy recomputations of their definitions, and settings are checked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunix_torch.config.grpo import GRPOConfig
from tunix_torch.grpo import (
    ALGORITHMS,
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    grpo_loss,
    per_token_kl,
)
from tunix_torch.learn.weights import aggregation_weights
from tunix_torch.rewarding.advantages import compute_group_advantages
from tunix_torch.runtime import mesh

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
MAX_LENGTH = 7  # C is 6 below, so no completion is as long as is allowed


# ---- advantages ----


def test_advantages_by_hand(subtests):
    for algorithm, normalize, expected in [
        ("grpo", True, [3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2]),  # 0.5 / sqrt(1/3)
        ("gspo", True, [3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2]),
        ("dapo", True, [3**0.5 / 2, -(3**0.5) / 2, -(3**0.5) / 2, 3**0.5 / 2]),
        ("grpo", False, [0.5, -0.5, -0.5, 0.5]),
        ("dr_grpo", True, [0.5, -0.5, -0.5, 0.5]),
        ("rloo", True, [2 / 3, -2 / 3, -2 / 3, 2 / 3]),  # 1 - mean(0, 0, 1) and 0 - mean(1, 0, 1)
    ]:
        with subtests.test(algorithm=algorithm, normalize=normalize, expected=expected):
            rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 5.0, 5.0, 5.0])
            advantages = compute_group_advantages(rewards, 4, algorithm, normalize)
            assert advantages.dtype == torch.float32
            assert advantages.tolist() == pytest.approx([*expected, 0, 0, 0, 0], abs=1e-6)


REWARDS = st.integers(2, 5).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(st.lists(st.floats(-10, 10, width=32), min_size=size, max_size=size), min_size=1, max_size=4),
    )
)


@EXAMPLES
@given(REWARDS, st.sampled_from(ALGORITHMS), st.booleans(), st.sampled_from([1e-8, 1e-6, 0.1]))
def test_advantages_equal_their_definition(groups, algorithm, normalize, epsilon):
    size, rewards = groups
    expected = []
    for group in rewards:
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            if algorithm == "rloo":
                expected.append(reward - np.mean(others))
            elif algorithm == "dr_grpo" or not normalize:
                expected.append(reward - np.mean(group))
            else:
                expected.append((reward - np.mean(group)) / (np.std(group, ddof=1) + epsilon))
    advantages = compute_group_advantages(torch.tensor(rewards).flatten(), size, algorithm, normalize, epsilon)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    assert advantages.isfinite().all()


def test_equal_rewards_give_exactly_zero(subtests):
    """Rounding makes the mean of seven times 0.1 differ from 0.1; a tiny deviation must not blow up this residue."""
    for reward in (0.0, 0.1, 0.3, -1.1):
        for size in (2, 3, 4, 7):
            for algorithm in ALGORITHMS:
                with subtests.test(algorithm=algorithm, size=size, reward=reward):
                    for dtype, epsilon in ((torch.float32, 1e-8), (torch.float64, 0.0)):
                        rewards = torch.tensor([reward] * size + [0.5] + [reward] * (size - 1), dtype=dtype)
                        advantages = compute_group_advantages(rewards, size, algorithm, epsilon=epsilon)
                        assert advantages[:size].tolist() == [0.0] * size
                        assert advantages[size] != 0 and advantages.isfinite().all()


def test_small_differences_of_large_rewards_are_not_rounded_away():
    advantages = compute_group_advantages(torch.tensor([1e7, 1e7 + 1, 1e7 + 3]), 3, normalize=False)
    assert advantages.tolist() == pytest.approx([-4 / 3, -1 / 3, 5 / 3], rel=1e-6)


def test_what_rounding_makes_of_equal_rewards_is_no_difference():
    """Regression: with epsilon 0 a rounding error was divided by itself: 0.1 + 0.2 got an advantage of 1.5 over 0.3."""
    rewards = torch.tensor([0.3, 0.1 + 0.2, 0.3, 0.3, 1e8, 1e8 + 1e-7, 1e8, 1e8], dtype=torch.float64)
    assert not compute_group_advantages(rewards, 4, epsilon=0.0).any()
    barely = 1e8 + 2.0**-26 * torch.tensor([0.0, 17.0, 3.0, 5.0], dtype=torch.float64)
    advantages = compute_group_advantages(barely, 4, epsilon=0.0)
    assert advantages.mean().item() == pytest.approx(0, abs=1e-6) and advantages.std().item() == pytest.approx(1)


def test_groups_do_not_touch_each_other():
    rewards = torch.tensor([1.0, 2.0, 4.0, 0.0, 0.0, 3.0])
    alone = torch.cat([compute_group_advantages(part, 3) for part in rewards.split(3)])
    assert torch.equal(compute_group_advantages(rewards, 3), alone)


def test_rewards_that_are_not_groups_are_refused(subtests):
    for shape, size in (((6,), 4), ((6,), 1), ((6,), 0), ((6,), 12), ((2, 3), 3), ((), 2)):
        with subtests.test(shape=shape, size=size):
            with pytest.raises(ValueError, match=f"groups of {size}"):
                compute_group_advantages(torch.zeros(shape), size)


# ---- KL ----

LOGPS = st.lists(st.floats(-12, 0, width=32), min_size=4, max_size=4)


@EXAMPLES
@given(LOGPS, LOGPS, st.sampled_from(KL_ESTIMATORS), st.sampled_from([None, 0.5, 10.0]))
def test_kl_estimators_equal_their_definitions(policy, reference, estimator, clamp):
    ratio = np.array(reference) - np.array(policy)  # this is log(reference / policy) at a token of the policy
    expected = {"k1": -ratio, "k2": ratio**2 / 2, "k3": np.exp(ratio) - 1 - ratio}[estimator]
    expected = expected if clamp is None else np.clip(expected, -clamp, clamp)
    actual = per_token_kl(torch.tensor([policy]), torch.tensor([reference]), estimator, clamp)
    np.testing.assert_allclose(actual[0], expected, rtol=1e-4, atol=1e-5)
    assert estimator == "k1" or (actual > -1e-6).all()


def test_beyond_the_clamp_the_gradient_is_zero_however_large_the_gap(subtests):
    """Regression: exp overflowed at a gap of 88, and the gradient became 0 * inf, which is not a number."""
    for estimator in KL_ESTIMATORS:
        with subtests.test(estimator=estimator):
            logps = -torch.tensor([[0.0, 10.0, 80.0, 90.0, 500.0]]).requires_grad_()
            kl = per_token_kl(logps, torch.zeros(1, 5), estimator, clamp=5.0)
            (gradient,) = torch.autograd.grad(kl.sum(), logps)
            assert kl[0, 1:].abs().tolist() == [5.0] * 4
            assert gradient[0, 1:].tolist() == [0.0] * 4


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_to_itself_is_zero(estimator):
    logps = -torch.rand(3, 5)
    assert not per_token_kl(logps, logps, estimator).any()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_average_to_the_kl_divergence(estimator):
    policy, reference = (torch.tensor(values).log() for values in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    divergence = (policy.exp() * (policy - reference)).sum()
    estimates = per_token_kl(policy, reference, estimator)
    assert (policy.exp() * estimates).sum() == pytest.approx(float(divergence), rel=1e-5)


def test_an_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match="kl_estimator='k4'.*k1, k2, k3"):
        per_token_kl(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


# ---- aggregation ----


def aggregate(values, mask, mode):
    """Aggregate `values` where `mask` is set, both (B, C), row by row as each mode is defined."""
    rows = [row[kept] for row, kept in zip(values, mask, strict=True) if kept.any()]
    if not rows:
        return 0.0
    if mode == "token-mean":
        return np.concatenate(rows).mean()
    if mode == "sequence-mean-token-mean":
        return np.mean([row.mean() for row in rows])
    if mode == "sequence-mean-token-scale":
        return np.mean([row.sum() / MAX_LENGTH for row in rows])
    if mode == "seq-mean-token-sum":
        return np.mean([row.sum() for row in rows])
    assert mode == "sequence-mean-token-sum-norm"
    return np.concatenate(rows).sum() / len(rows)


@EXAMPLES
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.sampled_from(LOSS_AGGREGATIONS))
def test_weights_aggregate_as_the_modes_are_defined(lengths, mode):
    mask = np.arange(6) < np.array(lengths)[:, None]
    values = np.random.default_rng(0).normal(size=mask.shape)
    weights = aggregation_weights(torch.tensor(mask), mode, MAX_LENGTH).numpy()
    assert weights.dtype == np.float32 and ((weights > 0) == mask).all()
    np.testing.assert_allclose((values * weights).sum(), aggregate(values, mask, mode), rtol=1e-5, atol=1e-6)


def test_batches_that_are_weighed_together_weigh_as_one(subtests):
    for mode in LOSS_AGGREGATIONS:
        with subtests.test(mode=mode):
            mask = torch.arange(6) < torch.tensor([[1], [6], [0], [3]])
            whole = aggregation_weights(mask, mode, MAX_LENGTH)
            parts = [
                aggregation_weights(part, mode, MAX_LENGTH, num_tokens=10, num_rows=3) for part in mask.split([1, 3])
            ]
            torch.testing.assert_close(torch.cat(parts), whole)


def test_a_batch_without_any_token_has_no_weight_and_no_nan(subtests):
    for mode in LOSS_AGGREGATIONS:
        with subtests.test(mode=mode):
            assert not aggregation_weights(torch.zeros(3, 4, dtype=torch.bool), mode, 4).any()


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="loss_aggregation='mean'.*token-mean"):
        aggregation_weights(torch.ones(1, 1, dtype=torch.bool), "mean", 1)


# ---- the loss ----


def make_tensors(seed=0, spread=0.4):
    """Make logps, old and reference logps and a mask with rows of length 0 to 6, (6, 6) each, and rewards (6,)."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([1, 6, 3, 0, 5, 4])[:, None]
    logps = -3 * torch.rand(6, 6, generator=random)
    old, ref = (logps + spread * torch.randn(6, 6, generator=random) for _ in range(2))
    logps, old, ref = (values.masked_fill(~mask, 0.0) for values in (logps, old, ref))
    return logps.requires_grad_(), old, ref, mask, torch.tensor([1.0, 0.0, 0.3, 0.0, 1.5, 1.0])


def expected_terms(logps, old, ref, advantages, mask, config):
    """Compute policy loss, KL and clipped weight token by token, as the papers write them."""
    logps, old, ref, mask = (np.asarray(values.detach(), dtype=float) for values in (logps, old, ref, mask))
    mask = mask.astype(bool)
    policy, kl, clipped = np.zeros((3, *mask.shape))
    for b, t in np.argwhere(mask):
        log_ratio = np.clip(logps[b] - old[b], -20, 20)
        ratio = np.exp(log_ratio[t])
        if config.algorithm == "gspo":
            ratio = np.exp(min(log_ratio[mask[b]].mean(), 10))
        advantage = float(advantages[b])
        inside = np.clip(ratio, 1 - config.epsilon, 1 + config.clip_high)
        objective = min(ratio * advantage, inside * advantage)
        clipped[b, t] = inside * advantage < ratio * advantage
        if config.epsilon_c is not None and advantage < 0:
            objective = max(objective, config.epsilon_c * advantage)
        policy[b, t] = -objective
        difference = ref[b, t] - logps[b, t]
        kl[b, t] = {"k1": -difference, "k2": difference**2 / 2, "k3": np.exp(difference) - 1 - difference}[
            config.kl_estimator
        ]
        if config.kl_clamp_value is not None:
            kl[b, t] = np.clip(kl[b, t], -config.kl_clamp_value, config.kl_clamp_value)
    return [aggregate(values, mask, config.aggregation) for values in (policy, kl, clipped)]


def compute_loss(logps, old, ref, advantages, mask, config):
    """Call `grpo_loss` with a config's settings, as the trainer does."""
    return grpo_loss(
        logps,
        old,
        ref,
        advantages,
        aggregation_weights(mask, config.aggregation, MAX_LENGTH),
        epsilon=config.epsilon,
        epsilon_high=config.clip_high,
        epsilon_c=config.epsilon_c,
        beta=config.beta,
        kl_estimator=config.kl_estimator,
        kl_clamp=config.kl_clamp_value,
        sequence_level=config.algorithm == "gspo",
    )


def make_advantages(rewards, config):
    return compute_group_advantages(rewards, 3, config.algorithm, config.normalize_advantages, config.advantage_epsilon)


def test_loss_equals_its_definition(subtests):
    for algorithm in ALGORITHMS:
        for mode in (None, *LOSS_AGGREGATIONS):
            for options in ({}, {"epsilon_high": 0.5}, {"epsilon_c": 1.3, "kl_estimator": "k1"}):
                with subtests.test(options=options, mode=mode, algorithm=algorithm):
                    config = GRPOConfig(
                        algorithm=algorithm, loss_aggregation=mode, num_completions_per_prompt=3, **options
                    )
                    for seed in range(5):
                        logps, old, ref, mask, rewards = make_tensors(seed)
                        advantages = make_advantages(rewards, config)
                        policy, kl, clipped = expected_terms(logps, old, ref, advantages, mask, config)
                        terms = compute_loss(logps, old, ref, advantages, mask, config)
                        assert float(terms.policy_loss) == pytest.approx(policy, rel=1e-5, abs=1e-6)
                        assert float(terms.kl_loss) == pytest.approx(kl, rel=1e-5, abs=1e-6)
                        assert float(terms.loss) == pytest.approx(policy + config.beta * kl, rel=1e-5, abs=1e-6)
                        assert float(terms.clipped_weight) == pytest.approx(clipped, rel=1e-5, abs=1e-6)
                        assert (
                            terms.loss.requires_grad
                            and not terms.policy_loss.requires_grad
                            and not terms.kl_loss.requires_grad
                        )


def test_the_kl_penalty_equals_its_definition_and_moves_the_policy_to_the_reference(subtests):
    for kl_clamp_value in (None, 0.05):
        for kl_estimator in KL_ESTIMATORS:
            with subtests.test(kl_estimator=kl_estimator, kl_clamp_value=kl_clamp_value):
                config = GRPOConfig(beta=0.7, kl_estimator=kl_estimator, kl_clamp_value=kl_clamp_value)
                logps, old, ref, mask, rewards = make_tensors()
                _, kl, _ = expected_terms(logps, old, ref, torch.zeros(6), mask, config)
                terms = compute_loss(logps, old, ref, torch.zeros(6), mask, config)
                assert float(terms.loss) == pytest.approx(0.7 * kl, rel=1e-5)
                (gradient,) = torch.autograd.grad(terms.loss, logps)
                moved = gradient != 0
                assert moved.any() and not moved[~mask].any()
                if kl_estimator != "k1":
                    assert torch.equal(gradient[moved].sign(), (logps - ref)[moved].sign())


def test_without_a_reference_there_is_no_kl():
    logps, old, ref, mask, rewards = make_tensors()
    weights = aggregation_weights(mask, "token-mean", MAX_LENGTH)
    terms = grpo_loss(logps, old, None, rewards, weights, beta=0.5)
    assert terms.kl_loss == 0 and terms.loss == terms.policy_loss


def test_dual_clip_limits_only_rows_of_negative_advantage():
    logps, old = torch.tensor([[0.0], [0.0]]), torch.tensor([[-3.0], [-3.0]])  # the ratio is e^3 = 20
    advantages, weights = torch.tensor([1.0, -1.0]), torch.ones(2, 1)
    assert float(grpo_loss(logps, old, None, advantages, weights).loss) == pytest.approx(-1.2 + np.exp(3))
    assert float(grpo_loss(logps, old, None, advantages, weights, epsilon_c=3.0).loss) == pytest.approx(-1.2 + 3.0)


@pytest.mark.parametrize("sequence_level, largest", [(False, np.exp(20.0)), (True, np.exp(10.0))])
def test_extreme_ratios_stay_finite(sequence_level, largest):
    logps, old = (
        torch.tensor([[-1.0, -1.0], [-90.0, -90.0]], requires_grad=True),
        torch.tensor([[-90.0] * 2, [-1.0] * 2]),
    )
    terms = grpo_loss(logps, old, None, torch.tensor([-1.0, -1.0]), torch.ones(2, 2), sequence_level=sequence_level)
    assert float(terms.loss) == pytest.approx(2 * largest + 2 * 0.8, rel=1e-5)
    assert float(terms.ratio_gap.max()) == pytest.approx(largest - 1, rel=1e-5)
    assert torch.autograd.grad(terms.loss, logps)[0].isfinite().all()


def test_the_first_ratio_is_one(subtests):
    """At a ratio of 1 the loss is minus the weighted advantages, and its gradient is that of REINFORCE."""
    for algorithm in ALGORITHMS:
        for mode in LOSS_AGGREGATIONS:
            for old_is_given in (False, True):
                with subtests.test(old_is_given=old_is_given, mode=mode, algorithm=algorithm):
                    config = GRPOConfig(algorithm=algorithm, loss_aggregation=mode, use_kl_penalty=False)
                    logps, _, _, mask, rewards = make_tensors()
                    advantages = make_advantages(rewards, config)
                    terms = compute_loss(
                        logps, logps.detach() if old_is_given else None, None, advantages, mask, config
                    )
                    weights = aggregation_weights(mask, mode, MAX_LENGTH)
                    assert terms.ratio_gap.max() == 0 and terms.clipped_weight == 0
                    torch.testing.assert_close(terms.loss, -(advantages[:, None] * weights).sum())
                    (gradient,) = torch.autograd.grad(terms.loss, logps)
                    (reinforce,) = torch.autograd.grad(-(advantages[:, None] * logps * weights).sum(), logps)
                    torch.testing.assert_close(gradient, reinforce)
                    assert gradient.any()


@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_gradients_are_those_of_unclipped_tokens(algorithm):
    """A token's gradient is -A r, unless its ratio has left the clip range in the direction the advantage wants."""
    config = GRPOConfig(algorithm=algorithm, loss_aggregation="token-mean", use_kl_penalty=False)
    logps, old, _, mask, rewards = make_tensors()
    advantages = make_advantages(rewards, config)
    terms = compute_loss(logps, old, None, advantages, mask, config)
    (gradient,) = torch.autograd.grad(terms.loss, logps)
    ratio, sign = (logps - old).exp().detach(), advantages[:, None].sign()
    held = ((sign > 0) & (ratio > 1 + config.clip_high)) | ((sign < 0) & (ratio < 1 - config.epsilon))
    assert (held & mask).any() and (~held & mask).any()
    weights = aggregation_weights(mask, "token-mean", MAX_LENGTH)
    torch.testing.assert_close(gradient, torch.where(held, 0.0, -advantages[:, None] * ratio * weights))


def test_gspo_gradients_equal_those_of_the_sequence_level_objective(subtests):
    """The objective is the mean over rows of min(s A, clip(s) A), where s is a row's geometric mean ratio.

    This is GSPO, arXiv 2507.18071, equations 5 to 7.
    """
    for seed in range(5):
        with subtests.test(seed=seed):
            config = GRPOConfig(algorithm="gspo", use_kl_penalty=False)
            logps, old, _, mask, rewards = make_tensors(seed, spread=0.6)
            advantages = make_advantages(rewards, config)
            terms = compute_loss(logps, old, None, advantages, mask, config)
            objective = []
            for b in range(6):
                if mask[b].any():
                    ratio = (logps[b][mask[b]] - old[b][mask[b]]).mean().exp()
                    inside = ratio.clamp(1 - config.epsilon, 1 + config.clip_high)
                    objective.append(torch.minimum(ratio * advantages[b], inside * advantages[b]))
            expected = -torch.stack(objective).mean()
            torch.testing.assert_close(terms.loss, expected)
            torch.testing.assert_close(torch.autograd.grad(terms.loss, logps), torch.autograd.grad(expected, logps))


def test_losses_of_parts_add_up(subtests):
    for mode in LOSS_AGGREGATIONS:
        for algorithm in ("grpo", "gspo"):
            with subtests.test(algorithm=algorithm, mode=mode):
                config = GRPOConfig(algorithm=algorithm, loss_aggregation=mode, epsilon_c=1.5)
                logps, old, ref, mask, rewards = make_tensors()
                advantages, weights = make_advantages(rewards, config), aggregation_weights(mask, mode, MAX_LENGTH)
                tensors = (logps, old, ref, advantages, weights)
                whole, *parts = (
                    grpo_loss(
                        *(values[rows] for values in tensors),
                        epsilon_c=1.5,
                        beta=0.1,
                        sequence_level=algorithm == "gspo",
                    )
                    for rows in (slice(0, 6), slice(0, 2), slice(2, 4), slice(4, 6))
                )
                for name in ("loss", "policy_loss", "kl_loss", "clipped_weight"):
                    torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
                assert max(part.ratio_gap.max() for part in parts) == whole.ratio_gap.max()


@pytest.mark.parametrize("sequence_level", [False, True])
def test_what_stands_at_padding_changes_nothing(sequence_level):
    logps, old, ref, mask, rewards = make_tensors()
    weights = aggregation_weights(mask, "token-mean", MAX_LENGTH)
    options = {"beta": 0.1, "sequence_level": sequence_level}
    clean = grpo_loss(logps, old, ref, rewards, weights, **options)
    dirty = (torch.where(mask, values, junk) for values, junk in ((logps, -5.0), (old, -7.0), (ref, -6.0)))
    dirty = grpo_loss(*dirty, rewards, weights, **options)
    assert dirty.loss == clean.loss and torch.equal(dirty.ratio_gap, clean.ratio_gap)


# ---- settings ----


def test_aliases_set_what_the_real_names_set(subtests):
    for alias, name, value in [
        ("num_generations", "num_completions_per_prompt", 6),
        ("beta", "kl_penalty_coef", 0.2),
        ("kl_coef", "kl_penalty_coef", 0.2),
        ("clip_range", "epsilon", 0.1),
        ("temperature", "generation_temperature", 0.3),
        ("top_p", "generation_top_p", 0.4),
        ("top_k", "generation_top_k", 7),
        ("max_completion_length", "generation_max_length", 33),
        ("max_generation_steps", "generation_max_length", 33),
        ("max_response_length", "generation_max_length", 33),
        ("num_epochs", "num_train_epochs", 5),
        ("batch_size", "per_device_train_batch_size", 3),
        ("num_training_steps", "max_steps", 12),
    ]:
        with subtests.test(alias=alias, name=name, value=value):
            default, by_name, by_alias = GRPOConfig(), GRPOConfig(**{name: value}), GRPOConfig(**{alias: value})
            assert getattr(by_alias, name) == getattr(by_name, name) == value != getattr(default, name)


def test_an_unknown_name_offers_the_nearest(subtests):
    for wrong, right in [
        ("num_generation", "num_generations"),
        ("epsilon_hihg", "epsilon_high"),
        ("learning_rat", "learning_rate"),
        ("kl_penalty", "use_kl_penalty"),
        ("max_completion_lenght", "max_completion_length"),
    ]:
        with subtests.test(wrong=wrong, right=right):
            with pytest.raises(ValueError, match=f"'{wrong}'; did you mean '{right}'"):
                GRPOConfig(**{wrong: 1})


def test_a_name_like_no_other_is_refused_without_a_guess():
    with pytest.raises(ValueError, match="'xyzzy'$"):
        GRPOConfig(xyzzy=1)


def test_the_same_setting_twice_is_refused_unless_it_agrees():
    with pytest.raises(ValueError, match="beta=0.2.*kl_penalty_coef.*0.1"):
        GRPOConfig(kl_penalty_coef=0.1, beta=0.2)
    assert GRPOConfig(kl_penalty_coef=0.1, beta=0.1).beta == 0.1


def test_invalid_values_are_refused_by_name_and_value(subtests):
    for name, value in [
        ("algorithm", "ppo"),
        ("kl_estimator", "k4"),
        ("loss_aggregation", "mean"),
        ("device", "tpu"),
        ("num_tpu_cores", 8),
        ("num_completions_per_prompt", 1),
        ("num_completions_per_prompt", 0),
        ("generation_max_length", 0),
        ("max_prompt_length", 0),
        ("max_length", 256),  # by default, completions alone take 256 tokens
        ("generation_temperature", 0.0),
        ("generation_temperature", -1.0),
        ("generation_top_p", 0.0),
        ("generation_top_p", 1.1),
        ("generation_top_k", -1),
        ("stop_check_interval", 0),
        ("advantage_epsilon", -1e-8),
        ("kl_penalty_coef", -0.1),
        ("kl_clamp_value", 0.0),
        ("num_iterations", 0),
        ("epsilon", 0.0),
        ("epsilon", 1.0),
        ("epsilon_high", 0.1),
        ("epsilon_c", 1.0),
        ("micro_batch_size", -1),
        ("gradient_accumulation_steps", 0),
        ("per_device_train_batch_size", 0),
        ("learning_rate", -1.0),
        ("save_batches", -1),
        ("profile_step", 0),
        ("early_stopping_patience", 0),
        ("epsilon", "0.2"),
        ("max_steps", None),
        ("micro_batch_size", 3),
        ("micro_batch_size", 6),
        ("num_eval_completions", -1),
        ("eval_temperature", 0.0),
        ("torch_compile", True),
        ("torch_compile_backend", "inductor"),
        ("use_liger_kernel", True),
        ("neftune_noise_alpha", 5.0),
        ("label_smoothing_factor", 0.1),
        ("auto_find_batch_size", True),
        ("deepspeed", "zero3.json"),
        ("fsdp", "full_shard"),
    ]:
        with subtests.test(name=name, value=value):
            with pytest.raises(ValueError, match=rf"^{name}={value!r}: "):
                GRPOConfig(**{name: value})


def test_settings_that_cannot_work_together_are_refused(subtests):
    for options, names in [
        ({"algorithm": "dapo", "beta": 0.1}, r"kl_penalty_coef \(beta\)=0.1.*dapo"),
        ({"num_iterations": 2, "gradient_accumulation_steps": 4}, "num_iterations=2.*gradient_accumulation_steps=4"),
        ({"max_length": 512, "max_prompt_length": 100}, "max_prompt_length=100.*256"),
        ({"bf16": True}, "bf16"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"device": "cuda"}, "device='cuda'.*'cpu'.*TUNIX_DEVICE=cuda"),
    ]:
        with subtests.test(options=options, names=names):
            with pytest.raises(ValueError, match=names):
                GRPOConfig(**options)


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_accelerate_sets_in_the_environment_is_refused_too(name, monkeypatch):
    monkeypatch.setenv(name, "true")
    with pytest.raises(ValueError, match=f"^{name}='true': "):
        GRPOConfig()


def test_by_default_a_cpu_learns_from_as_many_groups_as_keep_it_busy(tmp_path, subtests):
    """A pass holds one group, or several within the budget of tokens, and there are no more passes than that takes."""
    budget = mesh.tokens_per_pass()
    for prompts, group, prompt_length, completion_length in ((8, 4, 64, 64), (16, 4, 256, 256), (8, 16, 256, 256)):
        with subtests.test(prompts=prompts, group=group, prompt_length=prompt_length):
            config = GRPOConfig(
                output_dir=str(tmp_path),
                per_device_train_batch_size=prompts,
                num_completions_per_prompt=group,
                max_prompt_length=prompt_length,
                generation_max_length=completion_length,
            )
            groups, rest = divmod(config.rows_per_pass, group)
            tokens = prompt_length + group * completion_length
            assert rest == 0 and 1 <= groups <= prompts
            assert groups == 1 or groups * tokens <= budget
            num_passes, fit = -(-prompts // groups), max(1, budget // tokens)
            assert (num_passes - 1) * fit < prompts, "one pass less could not hold them"
            assert config.rows_in_pass_of(group * completion_length) == config.rows_per_pass
            assert config.rows_in_pass_of(group) >= config.rows_per_pass, "shorter completions, and fewer passes"
            config.micro_batch_size = group
            assert config.rows_per_pass == config.rows_in_pass_of(group) == group


def test_micro_batches_may_divide_the_group_or_hold_several(subtests):
    for size in (None, 1, 2, 4, 8, 12):
        with subtests.test(size=size):
            assert GRPOConfig(micro_batch_size=size, num_generations=4).micro_batch_size == size


def test_what_an_algorithm_brings_along(subtests):
    for algorithm, epsilon_high, beta, aggregation in [
        ("grpo", 0.2, 0.01, "sequence-mean-token-mean"),
        ("gspo", 0.2, 0.01, "sequence-mean-token-mean"),
        ("rloo", 0.2, 0.01, "sequence-mean-token-mean"),
        ("dr_grpo", 0.2, 0.01, "sequence-mean-token-scale"),
        ("dapo", 0.28, 0.0, "token-mean"),
    ]:
        with subtests.test(algorithm=algorithm, epsilon_high=epsilon_high, beta=beta, aggregation=aggregation):
            config = GRPOConfig(algorithm=algorithm)
            assert (config.clip_high, config.beta, config.aggregation) == (epsilon_high, beta, aggregation)


def test_what_is_given_outweighs_what_an_algorithm_brings_along(subtests):
    for algorithm in ALGORITHMS:
        with subtests.test(algorithm=algorithm):
            config = GRPOConfig(
                algorithm=algorithm, epsilon=0.1, epsilon_high=0.4, loss_aggregation="seq-mean-token-sum"
            )
            assert (config.epsilon, config.clip_high, config.aggregation) == (0.1, 0.4, "seq-mean-token-sum")


def test_the_clip_range_is_symmetric_unless_told_otherwise():
    assert GRPOConfig(epsilon=0.3).clip_high == 0.3


@pytest.mark.parametrize("options", [{"use_kl_penalty": False}, {"beta": 0.0}])
def test_no_kl_penalty_means_no_reference(options):
    assert GRPOConfig(**options).beta == 0


def test_max_length_leaves_the_prompt_what_the_completion_does_not_take():
    assert GRPOConfig(max_length=100, max_completion_length=60).max_prompt_length == 40
    assert GRPOConfig(max_length=100, max_completion_length=60, max_prompt_length=40).max_prompt_length == 40


def test_sft_needs_no_group():
    assert GRPOConfig(use_grpo=False, num_completions_per_prompt=1).num_completions_per_prompt == 1
