"""Each sign of a collapse is said once a run, with the figures, their meaning and what to try, and again at its end."""

import random
from types import SimpleNamespace

import pytest
from runs import run
from trainers import make_trainer

from tunix_torch.learn import collapse
from tunix_torch.learn.collapse import CollapseWatch

HEALTHY = {
    "frac_reward_zero_std": 0.4,
    "entropy": 0.04,
    "kl": 0.2,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": 30.0,
    "reward": 0.5,
}
SICK = {
    "equal rewards": ("frac_reward_zero_std", 1.0, 10),
    "entropy": ("entropy", 0.0008, 10),
    "KL": ("kl", 9.3, 5),
    "all cut off": ("completions/clipped_ratio", 1.0, 10),
    "empty completions": ("completions/mean_length", 1.0, 10),
}


def watched(steps, use_grpo=True, end=True, began_after=0):
    """Give the numbers of each step to a new watch, and return it."""
    watch, state, args = CollapseWatch(), SimpleNamespace(global_step=began_after), SimpleNamespace(use_grpo=use_grpo)
    watch.on_train_begin(args, state, None)
    for numbers in steps:
        state.global_step += 1
        if use_grpo:
            watch.note(numbers)
        else:
            watch.on_log(args, state, None, numbers)
        watch.on_step_end(args, state, None)
    if end:
        watch.on_train_end(args, state, None)
    return watch


def said(caplog):
    return [message for message in caplog.messages if message.startswith("This run may have collapsed")]


@pytest.mark.parametrize("name", SICK)
def test_a_sign_is_said_once_after_so_many_steps_in_a_row_with_what_to_try(caplog, name):
    metric, value, steps = SICK[name]
    sick = HEALTHY | {metric: value}
    watched([*[HEALTHY] * 3, *[sick] * (steps - 1), HEALTHY, *[sick] * (steps - 1), HEALTHY])
    assert not caplog.messages, "it was interrupted"
    watch = watched([*[HEALTHY] * 3, *[sick] * steps, HEALTHY, *[sick] * 40])
    assert len(said(caplog)) == 1
    assert f"Steps 4 to {steps + 3}: " in said(caplog)[0] and "It means: " in said(caplog)[0]
    assert "Try " in said(caplog)[0]
    assert caplog.messages[-1] == watch.summary() and f"{name} (steps 4 to {44 + steps})" in watch.summary()


def test_the_end_of_a_short_run_is_told_after_fewer_steps(caplog):
    sick = HEALTHY | {"kl": 9.3}
    assert watched([HEALTHY, sick, sick]).summary() == "" and not caplog.messages
    assert "KL (steps 2 to 4)" in watched([HEALTHY, sick, sick, sick]).summary() and len(said(caplog)) == 1


def test_a_reward_that_falls_and_lengths_that_run_away_are_said(caplog):
    fallen = [HEALTHY | {"reward": 0.1 + step / 50} for step in range(40)] + [HEALTHY | {"reward": 0.0}] * 30
    assert watched(fallen).said.keys() == {"reward"}
    assert "the mean reward of 20 steps was" in said(caplog)[0] and len(said(caplog)) == 1
    caplog.clear()
    grown = [
        HEALTHY | {"completions/mean_length": 30.0 + 5 * n, "completions/clipped_ratio": n / 60} for n in range(60)
    ]
    assert watched(grown).said.keys() == {"length"} and "cut off" in said(caplog)[0]
    ended = [numbers | {"completions/clipped_ratio": 0.1} for numbers in grown]
    assert not watched(ended).said, "longer completions that end are what reasoning looks like"


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_collapse(seed):
    draw = random.Random(seed)
    for reward in (
        lambda: draw.choice([0.0, 0.25, 0.5, 0.75, 1.0]),
        lambda: draw.gauss(3.0, 0.5),
        lambda: draw.random() ** 4,
    ):
        assert not watched([HEALTHY | {"reward": reward(), "kl": draw.random()} for _ in range(10_000)]).said


def test_a_loss_of_given_rows_that_runs_away_is_said_once(caplog):
    def losses(*values):
        return watched([{"loss": value} for value in values], use_grpo=False)

    assert not losses(2.0, 3.0, 90.0, 90.0, 3.0, 90.0, 90.0).said, "it comes back"
    assert losses(2.0, 3.0, *[90.0] * 30).said == {"loss": (3, 32)}
    assert len(said(caplog)) == 1 and "Steps 3 to 5: the loss was 90, and 2 at first" in caplog.text


def test_only_the_first_process_speaks(caplog, monkeypatch):
    monkeypatch.setattr(collapse.together, "is_first", lambda: False)
    assert watched([HEALTHY | {"kl": 9.0}] * 20).said and not caplog.messages


def test_equal_rewards_of_a_batch_are_said_once_a_run(model_folder, tmp_path, caplog):
    def constant(completions, **columns):
        return [0.3] * len(completions)

    trainer = make_trainer(model_folder, tmp_path, constant)
    trainer.train()
    assert sum("there is nothing to learn from this batch" in message for message in caplog.messages) == 1
    assert "equal rewards (steps 1 to 3)" in trainer.collapse.summary() and trainer.collapse.summary() in caplog.text
    assert "so from its first step" in trainer.collapse.summary(), "nothing has collapsed: it never was otherwise"


def test_only_what_was_so_in_every_step_since_the_first_is_said_to_be_of_the_start(caplog):
    equal = HEALTHY | {"frac_reward_zero_std": 1.0}
    assert "so from its first step: equal rewards (steps 1 to 20)" in watched([equal] * 20).summary()
    between = watched([*[equal] * 10, *[HEALTHY] * 70, *[equal] * 19], end=False)
    assert "signs of a collapse: equal rewards (steps 1 to 99)" in between.summary(), "it has learned between"
    caplog.clear()
    resumed = watched([equal] * 20, began_after=500)
    assert "signs of a collapse: equal rewards (steps 501 to 520)" in resumed.summary() and len(said(caplog)) == 1


def test_a_learning_rate_that_ruins_the_policy_is_said_during_the_run_and_once_more_at_its_end(
    model_folder, tmp_path, caplog
):
    trainer = run(model_folder, tmp_path / "out", learning_rate=1e6, max_steps=8, eval_strategy="no", eval_steps=None)
    assert "KL" in trainer.collapse.said
    assert len([message for message in said(caplog) if "the KL from the reference policy was" in message]) == 1
    summaries = [message for message in caplog.messages if message.startswith("This run shows signs of a collapse")]
    assert summaries == [trainer.collapse.summary()] and "do not use the last one unseen" in summaries[0]


@pytest.mark.thorough
def test_the_ruin_of_a_fine_tuning_is_said_too(model_folder, tmp_path):
    settings = {"use_grpo": False, "logging_steps": 1, "generation_max_length": 64, "judge": False}
    taught = make_trainer(model_folder, tmp_path / "a", None, max_steps=60, learning_rate=1e-2, **settings)
    taught.train()
    assert not taught.collapse.said
    taught.save_model()
    ruined = make_trainer(
        str(tmp_path / "a"),
        tmp_path / "b",
        None,
        max_steps=6,
        learning_rate=300.0,
        lr_scheduler_type="constant",
        **settings,
    )
    ruined.train()
    assert "loss" in ruined.collapse.said
