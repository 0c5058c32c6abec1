"""`TunixTrainer` with each loss type, entropy bonus, mask and correction: what adds up, resumes and is logged."""

import copy
import logging

import pytest
import torch
from trainers import digits_reward, first_batch, gradients, lora_weights, make_trainer

from tunix_torch import ModelConfig
from tunix_torch.grpo import LOSS_TYPES
from tunix_torch.model.loading import lora_config

ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.02, "entropy_coef_delta": 0.01}
SETTINGS = {
    **{loss_type: {"loss_type": loss_type} for loss_type in LOSS_TYPES},
    "sequence": {"importance_sampling_level": "sequence"},
    "corrected KL": {"use_bias_correction_kl": True, "beta": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 1e-3},
    "truncated": {"mask_truncated_completions": True},
    "high entropy": {"top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "adaptive entropy": ADAPTIVE | {"entropy_target": 3.0},
    "token_truncate": {"sampler_correction": "token_truncate", "sampler_correction_min": 0.9},
    "sequence_mask": {"sampler_correction": "sequence_mask", "sampler_correction_min": 0.01},
}
ENDS = (31, 38, 33, 35)  # tokens that end a completion beside the model's own, which random weights seldom choose


def make(model_folder, folder, **settings):
    """Make a trainer of whose completions some end early and some are cut off."""
    trainer = make_trainer(model_folder, folder, **settings)
    trainer.sampler.eos_token_ids += ENDS
    return trainer


def other_policy(batch):
    """Return the batch as if a policy had sampled it that the learner has left since: ratios are not 1."""
    noise = 0.3 * torch.randn(batch.sampler_logps.shape, generator=torch.Generator().manual_seed(0))
    batch.old_per_token_logps = (batch.sampler_logps + noise).masked_fill(~batch.completion_mask, 0.0)
    return batch


@pytest.mark.parametrize("name", SETTINGS)
def test_micro_batches_add_up_to_the_whole_batch(model_folder, tmp_path, name):
    trainer = make(model_folder, tmp_path, num_completions_per_prompt=4, **SETTINGS[name])
    batch = other_policy(first_batch(trainer))
    lengths = batch.lengths
    assert 1 < lengths.float().std() and (batch.completion_mask.all(dim=1)).any()
    trainer.entropy.last_entropy = 0.0  # so that an adaptive bonus acts
    results = []
    for size in (0, 4, 2):
        trainer.args.micro_batch_size = size
        trainer.model.zero_grad()
        parts = trainer.learning_pass(batch)
        loss = sum(float(part["loss"]) for part in parts)
        results.append((loss, {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}))
    (loss, expected), *others = results
    assert max(float(g.abs().max()) for g in expected.values()) > 1e-6
    for other, grads in others:
        assert other == pytest.approx(loss, abs=1e-6)
        for weight, gradient in expected.items():
            torch.testing.assert_close(grads[weight], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"scale_rewards": "batch"}, {"multi_objective_aggregation": "normalize_then_sum"}]
)
def test_accumulated_batches_are_weighed_as_one(model_folder, tmp_path, settings):
    """Advantages that are scaled by the batch, token weights and entropy bonus are those of all accumulated batches."""
    settings = settings | {"entropy_coef": 0.1, "mask_truncated_completions": True, "max_steps": 1}
    functions = [digits_reward, lambda completions, **columns: [float(len(text)) for text in completions]]
    weights = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        trainer = make(
            model_folder,
            tmp_path,
            reward_funcs=functions,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            adam_epsilon=1e-3,
            **settings,
        )
        trainer.train()
        weights.append(lora_weights(trainer))
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-6)


def test_completions_without_an_end_carry_no_loss(model_folder, tmp_path):
    trainer = make(model_folder, tmp_path, mask_truncated_completions=True)
    batch = first_batch(trainer)
    ended = torch.isin(batch.completion_ids, torch.tensor(trainer.sampler.eos_token_ids)) & batch.completion_mask
    ended = ended.any(dim=1)
    assert ended.any() and not ended.all()
    assert torch.equal((batch.token_weights > 0).any(dim=1), ended)


@pytest.mark.parametrize("name", SETTINGS)
def test_where_all_are_cut_off_there_is_no_loss_and_no_nan(model_folder, tmp_path, name):
    settings = SETTINGS[name] | {"mask_truncated_completions": True}
    trainer = make_trainer(model_folder, tmp_path, generation_max_length=3, **settings)
    trainer.sampler.eos_token_ids = (-1,)
    batch = first_batch(trainer)
    assert not batch.token_weights.any()
    loss, grads = gradients(trainer, batch)
    assert loss == 0 and not any(gradient.any() for gradient in grads.values())


NAMES = {
    "cispo": {"cispo_clip_ratio"},
    "vespo": {"vespo/phi_seq_mean"},
    "sapo": set(),
}
CLIPPED = {"clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_trains_and_logs_the_names_of_trl(model_folder, tmp_path, loss_type):
    trainer = make_trainer(model_folder, tmp_path, loss_type=loss_type, num_iterations=2, max_steps=2)
    before = lora_weights(trainer)
    trainer.train()
    assert any(not torch.equal(weight, before[name]) for name, weight in lora_weights(trainer).items())
    row = next(row for row in trainer.state.log_history if "loss" in row)
    known = CLIPPED.union(*NAMES.values())
    assert known & row.keys() == NAMES.get(loss_type, CLIPPED)


def test_overlong_completions_lose_a_part_of_their_reward(model_folder, tmp_path):
    plain = first_batch(make_trainer(model_folder, tmp_path))
    batch = first_batch(make_trainer(model_folder, tmp_path, overlong_buffer_length=6, overlong_penalty=0.5))
    penalty = 0.5 * (batch.lengths - 6).clamp(min=0) / 6
    torch.testing.assert_close(batch.rewards, plain.rewards - penalty.double())
    assert (penalty == 0.5).any()


# ---- entropy ----


def test_the_bonus_raises_entropy(model_folder, tmp_path):
    settings = {"max_steps": 6, "beta": 0.0, "reward_funcs": lambda completions, **columns: [0.0] * len(completions)}
    entropies = []
    for coef in (0.5, -0.5):
        trainer = make_trainer(model_folder, tmp_path, entropy_coef=coef, **settings)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        assert {row["entropy_coef"] for row in rows} == {coef}
        entropies.append(rows[-1]["entropy"] - rows[0]["entropy"])
    assert entropies[0] > 0.01 and entropies[1] < -0.01


def test_an_adaptive_weight_is_resumed_bit_for_bit(model_folder, tmp_path):
    settings = ADAPTIVE | {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "entropy_target": 4.1}
    whole = make_trainer(model_folder, tmp_path, num_iterations=2, **settings)
    whole.train()
    coefs = [row["entropy_coef"] for row in whole.state.log_history if "loss" in row]
    assert len(set(coefs)) > 2, coefs
    again = make_trainer(model_folder, tmp_path, num_iterations=2, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["entropy_coef"] for row in again.state.log_history if "loss" in row] == coefs
    expected = lora_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in lora_weights(again).items())
    (tmp_path / "checkpoint-4" / "entropy_control.json").unlink()
    with pytest.raises(ValueError, match="entropy_control.json"):
        make_trainer(model_folder, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# ---- the policy that samples ----


def test_a_correction_weighs_what_truncation_has_left_out(model_folder, tmp_path, caplog):
    """A row's weight is the probability of its tokens under the whole policy by that under the truncated one."""
    settings = {"generation_top_k": 5, "generation_top_p": 1.0, "max_steps": 1}
    plain = make_trainer(model_folder, tmp_path, **settings)
    trainer = make_trainer(model_folder, tmp_path, sampler_correction="token_truncate", **settings)
    with caplog.at_level(logging.WARNING):
        plain.train()
        assert caplog.text.count("sampler_correction") == 1
        caplog.clear()
        trainer.train()
        assert "sampler_correction" not in caplog.text
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert 0 < row["sampling/importance_sampling_ratio/mean"] < 0.95
    assert row["sampling/sampling_logp_difference/mean"] > 0.05
    batch = first_batch(make_trainer(model_folder, tmp_path, sampler_correction="token_truncate", **settings))
    assert torch.equal(
        batch.completion_ids, first_batch(make_trainer(model_folder, tmp_path, **settings)).completion_ids
    )


def test_a_truncated_policy_that_is_less_sure_than_the_whole_one_is_found(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, sampler_correction="token_mask")
    batch = first_batch(trainer)
    batch.sampler_logps = batch.sampler_logps - 2.0 * batch.completion_mask
    with pytest.raises(AssertionError, match="sampler and learner disagree"):
        trainer.update(batch)


# ---- dropout ----


def test_all_dropout_can_be_switched_off(model_folder, tmp_path):
    lora = lora_config(ModelConfig(lora_rank=4, lora_dropout=0.5))
    trainers = [
        make_trainer(model_folder, tmp_path, peft_config=copy.deepcopy(lora), disable_dropout=value)
        for value in (False, True)
    ]
    batches = [first_batch(trainer) for trainer in trainers]
    assert [trainer.has_dropout for trainer in trainers] == [True, False]
    gaps = [
        float((part["logps"] - batch.sampler_logps).abs().max())
        for trainer, batch in zip(trainers, batches, strict=True)
        for part in trainer.learning_pass(batch)
    ]
    assert gaps[1] < 1e-4
