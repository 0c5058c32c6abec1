"""Groups with equal rewards cost no backward pass, and nothing that is learned, logged or checked is other for it."""

import pytest
import torch
from trainers import first_batch, lora_weights, make_trainer

from tunix_torch.learn import equal_rewards
from tunix_torch.model import forward

NUM_EQUAL = 2  # of four groups


def half_of_the_groups(prompts, completions, **columns):
    """Different rewards in every second group of four."""
    return [float(i % 4) if i // 4 % 2 else 1.0 for i in range(len(completions))]


def one_pass(model_folder, folder, monkeypatch, apart, **settings):
    """Learn once from a batch: the gradients, what was returned, and how many rows had a gradient (True) or none."""
    settings = {"beta": 0.0, "num_completions_per_prompt": 4} | settings
    trainer = make_trainer(model_folder, folder, half_of_the_groups, **settings)
    batch, rows = first_batch(trainer), {True: 0, False: 0}
    computed = forward.hidden_states

    def counted(*args, **kwargs):
        hidden = computed(*args, **kwargs)
        if kwargs.get("cache", args[-1]) is not None:  # completions, and not their prompts
            rows[hidden.requires_grad] += len(hidden)
        return hidden

    with monkeypatch.context() as patch:
        patch.setattr("tunix_torch.learn.logprobs.hidden_states", counted)
        if not apart:
            patch.setattr(equal_rewards, "groups_without_gradient", lambda batch, args: None)
        parts = trainer.learning_pass(batch)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    return gradients, parts, rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"micro_batch_size": 4},
        {"loss_type": "dapo", "gradient_checkpointing": True},
        {"loss_type": "cispo", "num_iterations": 2},
        {"algorithm": "gspo", "scale_rewards": "batch"},
        {"top_entropy_quantile": 0.5},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "default",
)
def test_gradients_and_numbers_are_those_of_all_rows(model_folder, tmp_path, monkeypatch, settings):
    expected, all_parts, _ = one_pass(model_folder, tmp_path, monkeypatch, apart=False, **settings)
    gradients, (numbers,), _ = one_pass(model_folder, tmp_path, monkeypatch, apart=True, **settings)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)
    for name, value in numbers.items():
        values = [part[name] for part in all_parts]
        whole = sum(values) if value.ndim == 0 else torch.cat(values)
        torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-6, msg=name)


def test_rows_of_equal_groups_are_computed_without_a_gradient(model_folder, tmp_path, monkeypatch):
    *_, rows = one_pass(model_folder, tmp_path, monkeypatch, apart=True)
    assert rows == {True: 4 * (4 - NUM_EQUAL), False: 4 * NUM_EQUAL}


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.1}, {"entropy_coef": 0.01}, {"multi_objective_aggregation": "normalize_then_sum"}],
    ids=lambda settings: next(iter(settings)),
)
def test_rows_have_a_gradient_where_something_else_may_make_one(model_folder, tmp_path, monkeypatch, settings):
    *_, rows = one_pass(model_folder, tmp_path, monkeypatch, apart=True, **settings)
    assert rows == {True: 16, False: 0}


def test_where_all_groups_have_equal_rewards_the_optimizer_still_steps(model_folder, tmp_path):
    """Its moments move the weights on, as they would with a gradient of zeros."""

    def equal_after_a_step(prompts, completions, trainer_state, **columns):
        return [float(len(text)) if trainer_state.global_step == 0 else 1.0 for text in completions]

    trainer = make_trainer(model_folder, tmp_path, equal_after_a_step, beta=0.0, max_steps=1)
    trainer.train()
    after_one = lora_weights(trainer)
    trainer = make_trainer(
        model_folder, tmp_path, equal_after_a_step, beta=0.0, max_steps=2, lr_scheduler_type="constant"
    )
    trainer.train()
    # A has had no gradient yet, as B began at 0.
    moved = [not torch.equal(after_one[name], w) for name, w in lora_weights(trainer).items() if "lora_B" in name]
    assert moved and all(moved) and trainer.state.log_history[1]["grad_norm"] == 0
