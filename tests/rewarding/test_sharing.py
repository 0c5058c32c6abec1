"""Steps that share a rollout learn from what one policy sampled, resume exactly, and leave other steps as they are."""

import pytest
import torch
from trainers import digits_reward, lora_weights, make_trainer

from tunix_torch.batch import PromptBatch
from tunix_torch.learn.step import logps_without_gradient
from tunix_torch.rollout.tokens import RowNumbers
from tunix_torch.run.callbacks import MetricsFile
from tunix_torch.runtime import together


def watch_steps(trainer):
    """Return a list that receives (step, batch, the policy's log-probabilities before it) from every learning pass."""
    passes, learning_pass = [], trainer.learning_pass

    def noting(batch):
        passes.append((trainer.state.global_step, batch, logps_without_gradient(trainer.model, batch, trainer.args)))
        return learning_pass(batch)

    trainer.learning_pass = noting
    return passes


def test_all_steps_of_a_rollout_learn_from_the_policy_that_sampled(model_folder, tmp_path):
    calls = []

    def counting(prompts, completions, **columns):
        calls.append(len(completions))
        return digits_reward(prompts, completions)

    trainer = make_trainer(model_folder, tmp_path, counting, steps_per_generation=3, max_steps=6)
    inputs, training_step = [], trainer.training_step
    trainer.training_step = lambda model, given, *others: (inputs.append(given), training_step(model, given, *others))[
        1
    ]
    passes = watch_steps(trainer)
    trainer.train()
    assert calls == [3 * 16] * 2, "three steps of 4 prompts and 4 completions are sampled at once"
    assert [step for step, *_ in passes] == list(range(6))
    for (step, batch, now), given in zip(passes, inputs, strict=True):
        prompts = PromptBatch(**given)
        width = batch.prompt_ids.shape[1] - prompts.prompt_ids.shape[1]
        assert torch.equal(batch.prompt_ids[:, width:], prompts.prompt_ids), "a step learns from its own prompts"
        assert not batch.prompt_mask[:, :width].any()
        mask = batch.completion_mask
        torch.testing.assert_close(batch.old_per_token_logps * mask, batch.sampler_logps, rtol=0, atol=1e-4)
        assert torch.equal(now, batch.old_per_token_logps) == (step % 3 == 0), "the first ratio is exactly 1"
        torch.testing.assert_close(batch.token_weights.sum(), torch.tensor(1.0))


def test_what_is_sampled_at_once_is_what_accumulated_batches_sample(model_folder, tmp_path):
    """Random numbers belong to the rows of a step, so sampling in one rollout or in two gives the same."""
    settings = [{"steps_per_generation": 2}, {"gradient_accumulation_steps": 2}]
    batches = []
    for i, setting in enumerate(settings):
        trainer = make_trainer(model_folder, tmp_path / str(i), max_steps=2, **setting)
        passes = watch_steps(trainer)
        trainer.train()
        batches.append([batch for _, batch, _ in passes[:2]])
    for shared, accumulated in zip(*batches, strict=True):
        for left, right in zip(shared.completion_ids, accumulated.completion_ids, strict=True):
            width = min(len(left), len(right))  # what is beyond is padding
            assert torch.equal(left[:width], right[:width])
        assert torch.equal(shared.rewards, accumulated.rewards)


def test_rows_of_two_processes_have_the_numbers_that_one_process_gives_them(monkeypatch):
    """Batch b of one process is batch b of the first process and then that of the second."""
    alone = RowNumbers()
    expected = [alone.take(7, 16, 8), alone.take(7, 8, 8), alone.take(8, 16, 8)]
    assert expected == [list(range(16)), list(range(16, 24)), list(range(16))]
    monkeypatch.setattr(together, "count", lambda: 2)
    found = []
    for process in (0, 1):
        monkeypatch.setattr(together, "index", lambda process=process: process)
        numbers = RowNumbers()
        found.append([numbers.take(7, 8, 4), numbers.take(7, 4, 4), numbers.take(8, 8, 4)])
    for whole, *halves in zip(expected, *found, strict=True):
        joined = [half[i : i + 4] for i in range(0, len(halves[0]), 4) for half in halves]
        assert [number for part in joined for number in part] == whole


def test_passes_go_through_the_whole_rollout_before_they_begin_again(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, steps_per_generation=3, num_iterations=2, max_steps=3)
    passes = watch_steps(trainer)
    trainer.train()
    batches = [batch.rewards.tolist() for _, batch, _ in passes]
    assert batches[:3] == batches[3:] and len({tuple(rewards) for rewards in batches}) == 3
    assert [step for step, *_ in passes] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 2}])
def test_a_run_resumed_within_a_rollout_equals_the_uninterrupted_one(model_folder, tmp_path, settings):
    settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "steps_per_generation": 3} | settings
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "rows": 60, "per_device_train_batch_size": 2}
    whole = make_trainer(model_folder, tmp_path / "whole", callbacks=[MetricsFile()], **settings)
    whole.train()
    assert (tmp_path / "whole/checkpoint-2/waiting_batches_0.pt").is_file()
    assert not (tmp_path / "whole/checkpoint-6/waiting_batches_0.pt").exists(), "after a rollout nothing waits"
    for step in (2, 4):
        resumed = make_trainer(model_folder, tmp_path / str(step), callbacks=[MetricsFile()], **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        expected = lora_weights(whole)
        for name, weights in lora_weights(resumed).items():
            assert torch.equal(weights, expected[name]), name
        rows = [[r for r in t.state.log_history if r["step"] > step and "pg_loss" in r] for t in (whole, resumed)]
        same = [[{k: v for k, v in r.items() if "second" not in k} for r in log] for log in rows]
        assert same[0] == same[1] and any("reward" in r for r in same[0])


def test_an_epoch_has_whole_rollouts(model_folder, tmp_path):
    settings = {"rows": 30, "max_steps": -1, "num_train_epochs": 2, "steps_per_generation": 3}
    trainer = make_trainer(model_folder, tmp_path, **settings, generation_max_length=2)
    passes = watch_steps(trainer)
    trainer.train()
    assert trainer.state.global_step == len(passes) == 12, "of 30 rows 24 make two rollouts of three steps of 4 prompts"
    assert not trainer._waiting


def test_what_can_not_share_a_rollout_is_refused(model_folder, tmp_path):
    for settings, message in [
        ({"steps_per_generation": 0}, "steps_per_generation=0: must be at least 1"),
        ({"steps_per_generation": 2, "rows": 7}, "steps_per_generation=2: a rollout takes 8 training rows"),
        ({"steps_per_generation": 2, "use_grpo": False}, "steps_per_generation=2: is about rollouts"),
        ({"steps_per_generation": 2, "save_batches": 1}, "save_batches=1: works with"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_trainer(model_folder, tmp_path, **settings)
