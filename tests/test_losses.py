"""Loss types, clips, the corrected KL and the entropy bonus equal NumPy recomputations of the formulas of TRL."""

import numpy as np
import pytest
import torch

from tunix_torch.grpo import LOSS_TYPES, grpo_loss, vespo_phi
from tunix_torch.learn.weights import aggregation_weights

MAX_LENGTH = 7  # C is 6 below, so no completion is as long as is allowed
ADVANTAGES = torch.tensor([1.2, -0.7, 0.4, 0.0, -1.5, 0.9])


def make_tensors(seed=0, spread=0.4):
    """Make logps, old and reference logps and a mask with rows of length 0 to 6, (6, 6) each."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([1, 6, 3, 0, 5, 4])[:, None]
    logps = -3 * torch.rand(6, 6, generator=random)
    old, ref = (logps + spread * torch.randn(6, 6, generator=random) for _ in range(2))
    logps, old, ref = (values.masked_fill(~mask, 0.0) for values in (logps, old, ref))
    return logps.requires_grad_(), old, ref, mask


def weights_of(mask, loss_type):
    return aggregation_weights(mask, LOSS_TYPES[loss_type], MAX_LENGTH)


def phi(row_log_ratio, advantage, pos=(2.0, 3.0), neg=(3.0, 2.0)):
    """The weight of a row as the VESPO paper writes it, with w limited as in TRL."""
    k, decay = pos if advantage >= 0 else neg
    w = np.exp(np.clip(row_log_ratio, np.log(1e-8), 20))
    return np.exp(decay) * w**k * np.exp(-decay * w)


def token_loss(loss_type, logp, ratio, advantage, row_log_ratio):
    """The loss of one token as TRL 1.16 writes it, with epsilon 0.2, epsilon_high 0.3 and TRL's other defaults."""
    if loss_type == "cispo":
        return -min(ratio, 0.3) * advantage * logp
    if loss_type == "sapo":
        temperature = 1.0 if advantage > 0 else 1.05
        return -advantage * 4 / temperature / (1 + np.exp(-temperature * (ratio - 1)))
    if loss_type == "vespo":
        return -phi(row_log_ratio, advantage) * advantage * logp
    return -min(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage)


def aggregate(values, mask, loss_type):
    """Aggregate token losses as each loss type is defined in TRL, over the rows that have tokens."""
    rows = [row[kept] for row, kept in zip(values, mask, strict=True) if kept.any()]
    return {
        "grpo": np.mean([row.mean() for row in rows]),
        "sapo": np.mean([row.mean() for row in rows]),
        "dr_grpo": sum(row.sum() for row in rows) / (len(rows) * MAX_LENGTH),
        "luspo": np.mean([row.sum() for row in rows]),
    }.get(loss_type, np.concatenate(rows).mean())


@pytest.mark.parametrize("sequence_level", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_loss_type_equals_its_definition(loss_type, sequence_level):
    for seed in range(5):
        logps, old, _, mask = make_tensors(seed)
        gaps, numbers = (logps - old).detach().numpy().astype(float), logps.detach().numpy()
        expected = np.zeros((6, 6))
        for b, t in np.argwhere(mask.numpy()):
            of_row = gaps[b][mask[b].numpy()]
            ratio = np.exp(of_row.mean() if sequence_level else gaps[b, t])
            expected[b, t] = token_loss(loss_type, numbers[b, t], ratio, float(ADVANTAGES[b]), of_row.sum())
        weights = weights_of(mask, loss_type)
        options = {"loss_type": loss_type, "epsilon_high": 0.3, "sequence_level": sequence_level}
        terms = grpo_loss(logps, old, None, ADVANTAGES, weights, **options)
        assert float(terms.loss) == pytest.approx(aggregate(expected, mask.numpy(), loss_type), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_at_a_ratio_of_one_every_loss_has_the_gradient_of_reinforce(loss_type):
    """The cap of cispo is above 1 here, as its papers have it."""
    logps, _, _, mask = make_tensors()
    weights = weights_of(mask, loss_type)
    terms = grpo_loss(logps, None, None, ADVANTAGES, weights, loss_type=loss_type, epsilon_high=5.0)
    (gradient,) = torch.autograd.grad(terms.loss, logps)
    torch.testing.assert_close(gradient, -ADVANTAGES[:, None] * weights)
    assert terms.clipped_weight == 0 and (terms.phi == 1).all()


def test_gradients_of_soft_losses_are_those_of_their_definitions():
    """cispo: min(r, cap) A; sapo: 4 s (1 - s) r A with s = sigmoid(T (r - 1)); vespo: phi A; each times the weight."""
    logps, old, _, mask = make_tensors()
    ratio, advantages = (logps - old).exp().detach(), ADVANTAGES[:, None]
    temperature = torch.where(advantages > 0, 0.7, 1.9)
    gate = torch.sigmoid(temperature * (ratio - 1))
    phis = torch.tensor(
        [phi(float(gap.sum()), float(a)) for gap, a in zip((logps - old).detach(), ADVANTAGES, strict=True)]
    )
    for loss_type, expected in {
        "cispo": ratio.clamp(max=1.1) * advantages,
        "sapo": 4 * gate * (1 - gate) * ratio * advantages,
        "vespo": phis[:, None] * advantages,
    }.items():
        weights = weights_of(mask, loss_type)
        options = {"loss_type": loss_type, "epsilon_high": 1.1, "sapo_temperatures": (1.9, 0.7)}
        terms = grpo_loss(logps, old, None, ADVANTAGES, weights, **options)
        (gradient,) = torch.autograd.grad(terms.loss, logps)
        torch.testing.assert_close(gradient, (-expected * weights).float(), rtol=1e-4, atol=1e-7)


def test_delta_caps_the_ratio_beside_the_clipped_one():
    logps, old, _, mask = make_tensors(spread=1.0)
    weights = weights_of(mask, "dapo")
    terms = grpo_loss(logps, old, None, ADVANTAGES, weights, delta=1.5)
    ratio, advantages = (logps - old).exp().detach().numpy(), ADVANTAGES[:, None].numpy()
    expected = -np.minimum(np.minimum(ratio, 1.5) * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    assert float(terms.loss) == pytest.approx(float((expected * weights.numpy()).sum()), rel=1e-5)
    assert (ratio > 1.5).any() and terms.loss != grpo_loss(logps, old, None, ADVANTAGES, weights).loss


def test_clipped_weights_are_those_of_ratios_that_left_the_range_as_the_advantage_wants():
    logps, old, _, mask = make_tensors()
    weights = weights_of(mask, "grpo")
    ratio = (logps - old).exp()
    low = (ratio < 0.8) & (ADVANTAGES[:, None] < 0)
    high = (ratio > 1.2) & (ADVANTAGES[:, None] > 0)
    terms = grpo_loss(logps, old, None, ADVANTAGES, weights)
    assert float(terms.high_clipped_weight) == pytest.approx(float((high * weights).sum())) != 0
    assert float(terms.clipped_weight) == pytest.approx(float(((low | high) * weights).sum()))
    terms = grpo_loss(logps, old, None, ADVANTAGES, weights, loss_type="cispo", epsilon_high=1.2)
    assert float(terms.clipped_weight) == pytest.approx(float((high * weights).sum()))


@pytest.mark.parametrize("sequence_level", [False, True])
def test_the_corrected_kl_is_the_estimate_times_the_ratio(sequence_level):
    """For tokens, its gradient on the policy's own samples averages to that of the KL divergence."""
    logps, old, ref, mask = make_tensors()
    weights, zero = weights_of(mask, "grpo"), torch.zeros(6)
    options = {"beta": 0.7, "use_bias_correction_kl": True, "sequence_level": sequence_level}
    gap = (ref - logps).detach()
    log_ratio = (logps - old).detach()
    if sequence_level:
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp(min=1))[:, None]
    expected = 0.7 * ((gap.exp() - 1 - gap) * log_ratio.exp() * weights).sum()
    assert float(grpo_loss(logps, old, ref, zero, weights, **options).loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_gradient_of_the_corrected_kl_is_that_of_the_divergence():
    reference = torch.tensor([0.2, 0.2, 0.6]).log()
    scores = torch.tensor([0.5, 0.1, -0.3], requires_grad=True)
    policy = torch.log_softmax(scores, dim=0)
    (expected,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), scores, retain_graph=True)
    # One token of each kind, which counts as often as the policy samples it.
    loss = grpo_loss(
        policy[:, None],
        None,
        reference[:, None],
        torch.zeros(3),
        policy.detach().exp()[:, None],
        beta=1.0,
        use_bias_correction_kl=True,
    ).loss
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0], expected)


def test_policy_weights_act_on_the_policy_loss_only():
    logps, old, ref, mask = make_tensors()
    weights = weights_of(mask, "grpo")
    whole = grpo_loss(logps, old, ref, ADVANTAGES, weights, beta=0.1)
    halved = grpo_loss(logps, old, ref, ADVANTAGES, weights, beta=0.1, policy_weights=0.5 * weights)
    assert float(halved.policy_loss) == pytest.approx(0.5 * float(whole.policy_loss))
    assert halved.kl_loss == whole.kl_loss and halved.clipped_weight == whole.clipped_weight


def test_the_entropy_bonus_is_a_weighted_sum_of_entropies():
    logps, old, _, mask = make_tensors()
    weights = weights_of(mask, "grpo")
    entropy = torch.rand(6, 6, requires_grad=True)
    bonus = 0.3 * weights_of(mask, "dapo")
    plain = grpo_loss(logps, old, None, ADVANTAGES, weights, entropy=entropy)
    terms = grpo_loss(logps, old, None, ADVANTAGES, weights, entropy=entropy, entropy_weights=bonus)
    mean = float(entropy[mask].mean())
    assert float(terms.loss) == pytest.approx(float(plain.loss) - 0.3 * mean) and terms.policy_loss == plain.policy_loss
    torch.testing.assert_close(torch.autograd.grad(terms.loss, entropy)[0], -bonus)


def test_the_weight_of_vespo_takes_the_ratios_to_the_sampler(subtests):
    log_ratio = torch.tensor([[0.3, -0.5, 0.0], [2.0, 3.0, 4.0], [-9.0, -9.0, -9.0], [30.0, 0.0, 0.0]])
    ratios = torch.tensor([[0.9, 1.1, 1.0], [0.5, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    for pos, neg in (((2.0, 3.0), (3.0, 2.0)), ((0.5, 1.0), (1.0, 0.0))):
        for sign in (1.0, 0.0, -1.0):
            with subtests.test(pos=pos, neg=neg, sign=sign):
                advantages = torch.full((4, 1), sign)
                limited = np.log(ratios.numpy().clip(1e-8)).sum(1)  # a token that is masked has a ratio of 1e-8
                expected = [phi(float(g.sum()) + r, sign, pos, neg) for g, r in zip(log_ratio, limited, strict=True)]
                actual = vespo_phi(log_ratio, ratios, advantages, pos, neg)
                assert actual.isfinite().all()
                np.testing.assert_allclose(actual[:3, 0], expected[:3], rtol=2e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_parts_add_up_and_padding_changes_nothing(loss_type):
    logps, old, ref, mask = make_tensors()
    tensors = (logps, old, ref, ADVANTAGES, weights_of(mask, loss_type))
    options = {"loss_type": loss_type, "epsilon_high": 1.1, "beta": 0.1}
    whole = grpo_loss(*tensors, **options)
    parts = [grpo_loss(*(t[rows] for t in tensors), **options) for rows in (slice(0, 2), slice(2, 6))]
    for name in ("loss", "policy_loss", "kl_loss", "clipped_weight", "high_clipped_weight"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))
    dirty = [torch.where(mask, values, junk) for values, junk in ((logps, -5.0), (old, -7.0), (ref, -6.0))]
    again = grpo_loss(*dirty, *tensors[3:], **options)
    assert again.loss == whole.loss and torch.equal(again.phi, whole.phi)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_extreme_ratios_and_a_batch_without_tokens_stay_finite(loss_type):
    logps = torch.tensor([[-1.0, -1.0], [-90.0, -90.0]], requires_grad=True)
    old = torch.tensor([[-90.0] * 2, [-1.0] * 2])
    for weights in (torch.ones(2, 2), torch.zeros(2, 2)):
        for advantages in (torch.ones(2), -torch.ones(2)):
            terms = grpo_loss(logps, old, None, advantages, weights, loss_type=loss_type)
            (gradient,) = torch.autograd.grad(terms.loss, logps)
            assert terms.loss.isfinite() and gradient.isfinite().all()
            assert weights.any() or not gradient.any()
