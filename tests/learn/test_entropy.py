"""Which tokens have high entropy, how the weight of the bonus adapts, and that its gradient is that of the entropy."""

from dataclasses import replace

import pytest
import torch
from models import FAMILIES, assert_close, hugging_face_logps, lora_gradients, make_batch, make_policy, weighted

from tunix_torch import GRPOConfig
from tunix_torch.learn import logprobs
from tunix_torch.learn.entropy import EntropyControl, keep_high_entropy, masked_quantile
from tunix_torch.learn.passes import plain_rows, shared_prompts
from tunix_torch.learn.weights import aggregation_weights, learned_tokens, step_weights


@pytest.mark.parametrize("q", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_the_masked_quantile_is_that_of_torch(q):
    random = torch.Generator().manual_seed(0)
    for share in (0.01, 0.3, 1.0):
        values = torch.rand(11, 13, generator=random)
        mask = torch.rand(11, 13, generator=random) < share
        mask[3, 4] = True
        assert masked_quantile(values, mask, q) == torch.quantile(values[mask], q)


def test_without_any_token_none_is_of_high_entropy():
    batch = replace(make_batch(), token_weights=torch.zeros(9, 12), entropy_weights=torch.zeros(9, 12))
    kept = keep_high_entropy(batch, torch.rand(9, 12), 0.2)
    assert not kept.policy_mask.any() and not kept.entropy_weights.any()


def test_tokens_of_high_entropy_are_those_that_trl_keeps():
    """It keeps those at or above the quantile; 0 leaves the highest only, and 1 would leave all."""
    batch, entropy = make_batch(), torch.rand(9, 12, generator=torch.Generator().manual_seed(1))
    mask = batch.completion_mask
    batch = replace(batch, entropy_weights=mask / mask.sum())
    for share in (0.0, 0.2, 1.0):
        kept = keep_high_entropy(batch, entropy, share)
        expected = mask & (entropy >= torch.quantile(entropy[mask], 1 - share))
        assert torch.equal(kept.policy_mask, expected)
        mean = (entropy * kept.entropy_weights).sum()
        assert float(mean) == pytest.approx(float(entropy[expected].mean()))
    assert keep_high_entropy(batch, entropy, 0.0).policy_mask.sum() == 1
    assert torch.equal(kept.policy_mask, mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [plain_rows, shared_prompts])
def test_entropy_has_the_gradient_of_hugging_faces_own_only_where_it_is_asked_for(family, layout):
    model, batch = make_policy(family), make_batch()
    _, expected = hugging_face_logps(model, batch, 0.7)
    expected = lora_gradients(model, weighted(expected, batch))
    logps, entropy = logprobs.token_logps(model, layout(batch), 0.7, entropy_gradient=True)
    assert_close(lora_gradients(model, weighted(entropy, batch)), expected, 2e-5)
    plain_logps, plain_entropy = logprobs.token_logps(model, layout(batch), 0.7)
    assert torch.equal(plain_logps, logps) and torch.equal(plain_entropy, entropy)
    assert not plain_entropy.requires_grad


def test_the_weight_adapts_as_in_trl():
    """Up by delta after a step at or below the target, else down; no bonus in the first step or after a step above."""
    control = EntropyControl(
        GRPOConfig(
            use_adaptive_entropy=True,
            entropy_coef=0.01,
            entropy_coef_delta=0.03,
            entropy_coef_max=0.05,
            entropy_target=1.0,
        )
    )
    batch = replace(make_batch(), entropy_weights=torch.ones(9, 12))
    applied, coefs = [], []
    for entropy in (0.9, 1.0, 0.5, 1.1, 1.2, 1.3, 0.2):
        applied.append(float(control.weighted(batch).entropy_weights[0, 0]))
        control.adapt(entropy)
        coefs.append(control.coef)
    assert coefs == pytest.approx([0.04, 0.05, 0.05, 0.02, 0.0, 0.0, 0.03])
    assert applied == pytest.approx([0.0, 0.04, 0.05, 0.05, 0.0, 0.0, 0.0])


def test_the_entropy_of_a_step_is_the_mean_over_all_its_tokens():
    control = EntropyControl(GRPOConfig(use_adaptive_entropy=True))
    numbers = [{"kept_entropy": torch.tensor(e), "kept_tokens": torch.tensor(n)} for e, n in ((3.0, 2), (1.0, 6))]
    control.learned(numbers, step_ends=False)
    assert control.coef == 0
    control.learned(numbers[:1], step_ends=True)
    assert control.last_entropy == pytest.approx(7 / 10)
    control.learned(numbers[1:], step_ends=True)
    assert control.last_entropy == pytest.approx(1 / 6) and control.coef == 0.005


def test_the_state_survives_a_checkpoint_bit_for_bit(tmp_path):
    args = GRPOConfig(use_adaptive_entropy=True)
    control, again = EntropyControl(args), EntropyControl(args)
    for entropy in (None, 0.1 + 0.2):
        if entropy is not None:
            control.adapt(entropy)
        control.save(str(tmp_path))
        again.load(str(tmp_path))
        assert (again.coef, again.last_entropy) == (control.coef, control.last_entropy)
    (tmp_path / "entropy_control.json").unlink()
    with pytest.raises(ValueError, match="^use_adaptive_entropy=True: .* has no entropy_control.json"):
        again.load(str(tmp_path))
    EntropyControl(GRPOConfig()).load(str(tmp_path))


# ---- the weights of tokens ----


def test_weights_of_a_step_are_those_of_one_batch_and_truncated_rows_count_as_rows():
    args = GRPOConfig(generation_max_length=12, entropy_coef=0.1, mask_truncated_completions=True)
    ids = torch.full((4, 12), 3)
    lengths = torch.tensor([2, 12, 0, 5])
    mask = torch.arange(12) < lengths[:, None]
    ids[0, 1] = ids[3, 4] = 1
    learned = learned_tokens(ids, mask, [1], args)
    assert learned.sum(dim=1).tolist() == [2, 0, 0, 5]
    assert torch.equal(learned_tokens(ids, mask, [1], GRPOConfig()), mask)
    whole = step_weights([mask], [learned], args)[0]
    expected = aggregation_weights(learned, args.aggregation, 12, num_tokens=7, num_rows=3)
    assert torch.equal(whole["token_weights"], expected) and float(whole["token_weights"].sum()) == pytest.approx(2 / 3)
    assert torch.equal(whole["entropy_weights"], learned / 7)
    parts = step_weights([mask[:1], mask[1:]], [learned[:1], learned[1:]], args)
    for name, weights in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), weights)
    nothing = step_weights([mask], [learned & False], args)[0]
    assert not nothing["token_weights"].any() and not nothing["entropy_weights"].any()
    assert step_weights([mask], [learned], GRPOConfig(generation_max_length=12))[0]["entropy_weights"] is None
