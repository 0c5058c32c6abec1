"""A reward function that fails is named with its row, or its groups are dropped and weigh nothing, within a bound."""

import asyncio
import errno
import logging
import os
import re
import sys
import time
from dataclasses import replace

import pytest
import torch
from trainers import digits_reward, first_batch, gradients, lora_weights, make_trainer

from tunix_torch import GRPOConfig
from tunix_torch.batch import PromptBatch, Rollout
from tunix_torch.checkpoints.whole import explaining_full_disk
from tunix_torch.cli.script import run_script
from tunix_torch.rewarding import failures, slow
from tunix_torch.rewarding.context import RewardContext
from tunix_torch.rewarding.failures import ErrorBudget
from tunix_torch.rewarding.scorer import noted
from tunix_torch.rewarding.scoring import call_and_drop, call_rewards, score_completions
from tunix_torch.rewarding.values import CompletionError
from tunix_torch.rewarding.workers import RewardWorkers
from tunix_torch.runtime import once

ROWS = [{"prompt": f"{i} + {i}?", "answer": str(2 * i), "tunix/row": f"rows.jsonl, row {i + 1}"} for i in range(3)]
COMPLETIONS = ["0", "1", "2", "bad", "4", "5"]  # two of each row


def number_of(completions, log_metric=None, log_extra=None):
    """Raises for the row of "bad"."""
    if log_extra is not None:
        log_extra("text", completions)
        log_metric("calls", 1)
    return [float(text) for text in completions]


async def number_later(completions):
    await asyncio.sleep(0)
    return number_of(completions)


def not_finite(completions):
    return [float("nan") if text == "bad" else float(text) for text in completions]


def gives_up(completions):
    for number, text in enumerate(completions):
        if text == "bad":
            raise CompletionError(number, "'bad' is no number")
    return number_of(completions)


def exits(completions):
    if "bad" in completions:
        sys.exit(0)
    return number_of(completions)


def hangs(completions):
    if "bad" in completions:
        time.sleep(3600)
    return number_of(completions)


def dies(completions):
    if "bad" in completions:
        os._exit(0)
    return number_of(completions)


def compares(completions):
    """Fails for a pair of completions, and not for either alone."""
    if len(completions) > 1 and "bad" in completions:
        raise ArithmeticError("these two")
    return [0.0] * len(completions)


def always(completions):
    raise KeyError("always")


def zeros(completions):
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def workers():
    workers = RewardWorkers(1, [zeros, number_of, not_finite, gives_up, exits, hangs, dies])
    yield workers
    workers.close()


def notes_of(call, function, error=Exception):
    with pytest.raises(error) as raised:
        call(function)
    return str(raised.value), "\n".join(raised.value.__notes__)


IN_WORKERS = [False, pytest.param(True, marks=pytest.mark.thorough)]


@pytest.mark.parametrize("away", IN_WORKERS)
@pytest.mark.parametrize("function", [number_of, number_later, not_finite, gives_up, exits])
def test_the_error_names_function_row_prompt_and_completion(request, function, away):
    workers = request.getfixturevalue("workers") if away else None
    _, note = notes_of(lambda f: call_rewards([f], ROWS, COMPLETIONS, workers=workers), function)
    named = "rows.jsonl, row 2: prompt '1 + 1?', completion 'bad'"
    assert note == f"Raised while scoring: reward function {function.__name__!r} failed for {named}"


@pytest.mark.parametrize(
    "values, words", [([1.0], "1 value for 6 completions; expected one for each"), (1.0, "1.0: expected numbers")]
)
def test_of_a_return_value_that_is_wrong_as_a_whole_no_row_is_blamed(values, words):
    def wrong(completions):
        calls.append(len(completions))
        return values

    calls = []
    said, note = notes_of(lambda f: call_rewards([f], ROWS, COMPLETIONS), wrong)
    assert said.startswith(f"reward function 'wrong' returned {words}") and calls == [6]
    assert note.endswith("'wrong' failed for 6 completions of 3 prompts (rows.jsonl, row 1 and so on)")


def test_where_no_completion_fails_alone_the_group_is_named_and_a_failure_that_passes_is_said():
    calls = []

    def once(completions):
        calls.append(len(completions))
        if len(calls) == 1:
            raise ConnectionError("the server is away")
        return [0.0] * len(completions)

    call = lambda function: call_rewards([function], ROWS, COMPLETIONS)  # noqa: E731
    assert "row 2: prompt '1 + 1?', completion '2', or for another of the 2 completi" in notes_of(call, compares)[1]
    assert "Called for each prompt alone, it did not fail again" in notes_of(call, once)[1] and calls == [6, 2, 2, 2]


def test_the_search_for_a_completion_ends(monkeypatch):
    monkeypatch.setattr(failures, "SEARCH_SECONDS", 0.0)
    calls = []

    def slow_to_fail(completions):
        calls.append(len(completions))
        if len(completions) == 6:
            raise ValueError("all")
        time.sleep(0.01)
        return [0.0] * len(completions)

    note = notes_of(lambda f: call_rewards([f], ROWS, COMPLETIONS), slow_to_fail)[1]
    assert "it did not fail again in 0 s" in note and calls == [6, 2]


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("timeout", [None, 60])
def test_what_would_end_the_process_in_silence_is_an_error(kind, timeout):
    def ending(completions):
        raise kind("done")

    async def ending_later(completions):
        raise kind("done")

    for function in (ending, ending_later):
        with pytest.raises(ValueError, match=f"'{function.__name__}' raised {kind.__name__}.*which does not end a run"):
            call_rewards([function], ROWS, COMPLETIONS, timeout)


def test_ctrl_c_in_a_reward_function_stays_ctrl_c():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_rewards([interrupted], ROWS, COMPLETIONS)


# ---- a function that does not return ----


def test_a_function_that_does_not_return_is_named_again_and_again(caplog, monkeypatch):
    monkeypatch.setattr(slow, "WARN_AFTER", 0.1)

    def sleepy(completions):
        time.sleep(0.5)
        return [0.0] * len(completions)

    async def sleepy_later(completions):
        await asyncio.sleep(0.5)
        return [0.0] * len(completions)

    for function in (sleepy, sleepy_later):
        caplog.clear()
        call_rewards([zeros, function], ROWS, COMPLETIONS)
        said = [m for m in caplog.messages if f"'{function.__name__}' has been running for 0." in m]
        assert 1 < len(said) < 4 and "6 completions of 3 prompts (rows.jsonl, row 1 and so on)" in said[0]
        assert "zeros" not in caplog.text


@pytest.mark.thorough
def test_a_process_that_hangs_is_given_up_and_another_one_takes_its_place(workers, caplog, monkeypatch):
    monkeypatch.setattr(slow, "WARN_AFTER", 0.1)
    with pytest.raises(ValueError, match="reward_timeout=0.5: 'hangs' takes longer"):
        call_rewards([hangs], ROWS, COMPLETIONS, 0.5, workers)
    assert "'hangs' has been running" in caplog.text
    assert call_rewards([number_of], ROWS[:1], COMPLETIONS[:2], 60, workers) == [[0.0, 1.0]], "it has no process left"


# ---- dropping groups ----


def dropped(function, workers=None, timeout=None, most=9, context=None):
    context = context or RewardContext()
    return call_and_drop([zeros, function], ROWS, COMPLETIONS, timeout, workers, time.monotonic(), context, most)


def finds_the_group(function, workers, timeout=None):
    values, failed = dropped(function, workers, timeout)
    assert values == [[0.0] * 6, [0.0, 1.0, None, None, 4.0, 5.0]] and failed.keys() == {1}
    assert failed[1].startswith("rows.jsonl, row 2: ") or "rows.jsonl, row 2: prompt '1 + 1?'" in failed[1]


@pytest.mark.parametrize("away", IN_WORKERS)
@pytest.mark.parametrize("function", [number_of, number_later, not_finite, gives_up, exits])
def test_groups_that_fail_are_found_and_the_others_keep_their_values(request, function, away):
    finds_the_group(function, request.getfixturevalue("workers") if away else None)


def test_a_group_for_which_a_function_hangs_is_found():
    finds_the_group(hangs, None, timeout=0.5)


@pytest.mark.thorough
@pytest.mark.parametrize("function, timeout", [(hangs, 2.0), (dies, None)])
def test_a_group_for_which_a_process_hangs_or_dies_is_found(workers, function, timeout):
    finds_the_group(function, workers, timeout)


def test_what_is_logged_about_the_others_stays_and_a_call_that_failed_logs_nothing():
    context = RewardContext()
    dropped(number_of, context=context)
    assert context.metrics == {"calls": [1.0, 1.0]}
    assert context.extra == {"text": ["0", "1", None, None, "4", "5"]}


def test_no_more_groups_are_looked_for_than_matter():
    calls = []

    def failing(completions):
        calls.append(completions)
        raise ValueError

    assert dropped(failing, most=1)[1].keys() == {0, 1} and len(calls) == 3
    assert dropped(failing)[1].keys() == {0, 1, 2}


def test_too_many_are_a_share_of_the_newest_groups_or_all_of_a_step():
    budget = ErrorBudget(0.1, 1)
    assert [budget.count(1, 4) for _ in range(10)] == [None] * 10, "10 of 100 may fail, whatever came before"
    assert "11 of the last 44 groups have none, more than max_reward_errors=0.1" in budget.count(1, 4)
    budget = ErrorBudget(0.1, 1)
    assert [budget.count(2, 20) for _ in range(50)] == [None] * 50, "as many as may"
    assert budget.left(20) == pytest.approx(2.0)
    assert budget.count(3, 20) is not None
    assert ErrorBudget(0.1, 1).count(25, 256) is None and ErrorBudget(0.1, 1).count(26, 256) is not None
    assert ErrorBudget(0.0, 1).count(1, 256) is not None
    every = ErrorBudget(1.0, 1)
    assert every.count(3, 4, step=1) is None and "no group of a whole step" in every.count(4, 4, step=2)
    assert every.count(1, 4, step=3) is None and every.count(4, 4, step=3) is None, "rounds of one step"
    accumulated = ErrorBudget(1.0, 3)  # three rollouts make a step
    counts = [accumulated.count(failed, 1, step) for step, failed in enumerate((0, 1, 1, 1, 1, 0, 1, 1, 1), 3)]
    assert counts == [None] * 9, "each is a step of its own"
    accumulated = ErrorBudget(1.0, 3)
    counts = [accumulated.count(failed, 1, i // 3) for i, failed in enumerate((0, 1, 1, 1, 1, 0, 1, 1, 1))]
    assert counts[:8] == [None] * 8 and counts[8] is not None


# ---- in a run ----

SKIP = {"on_reward_error": "skip_group", "max_reward_errors": 1.0}


class Failing:
    """Rewards digits, and fails for whole groups: those of `rows`, given by their prompts."""

    __name__ = "failing"

    def __init__(self, *rows):
        self.rows = rows

    def __call__(self, prompts, completions, **columns):
        if set(self.rows) & set(prompts):
            raise ValueError("not this one")
        return digits_reward(prompts, completions)


def prompts_of(trainer):
    return list(dict.fromkeys(row["tunix/prompt"] for row in next(iter(trainer.get_train_dataloader()))["rows"]))


SETTINGS = [
    {},
    {"scale_rewards": "batch", "loss_aggregation": "token-mean", "entropy_coef": 0.1},
    {"multi_objective_aggregation": "normalize_then_sum", "loss_type": "dr_grpo", "top_entropy_quantile": 0.5},
    {"overlong_buffer_length": 4, "mask_truncated_completions": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_dropped_group_weighs_nothing_and_the_others_as_if_it_were_not_there(model_folder, tmp_path, settings):
    """The loss and gradient are those of a batch of the other groups alone."""
    trainer = make_trainer(model_folder, tmp_path / "a", Failing(), **SKIP, **settings)
    prompts = prompts_of(trainer)
    trainer.scorer.functions[0].rows = (prompts[1],)
    batch = first_batch(trainer)
    away = torch.arange(16) // 4 == 1
    assert not batch.token_weights[away].any() and not batch.completion_mask[away].any()
    assert not batch.advantages[away].any() and batch.rewards.isnan().equal(away)
    assert batch.advantages[~away].any()

    other = make_trainer(model_folder, tmp_path / "b", digits_reward, **settings)
    sampled = other._sample_and_score

    def without(prompts):  # the rollout of the whole batch, of which the group is taken out
        scored, _ = sampled(prompts)
        kept = (~away).nonzero()[:, 0]
        groups = [0, 2, 3]
        p, r = scored.prompts, scored.rollout
        p = PromptBatch(p.prompt_ids[groups], p.prompt_mask[groups], [p.rows[g] for g in groups])
        r = Rollout(r.completion_ids[kept], r.completion_mask[kept], r.sampler_logps[kept])
        rest = {name: getattr(scored, name)[kept] for name in ("ids", "mask", "rewards", "totals")}
        scored = replace(scored, prompts=p, rollout=r, texts=[scored.texts[i] for i in kept.tolist()], **rest)
        return scored, other._begin_train_batch(p, r, scored.ids, scored.mask)

    other._sample_and_score = without
    alone = first_batch(other)
    torch.testing.assert_close(batch.advantages[~away], alone.advantages)
    (loss, grads), (expected, expected_grads) = gradients(trainer, batch), gradients(other, alone)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    assert scale > 0
    for name, gradient in grads.items():
        assert float((gradient - expected_grads[name]).abs().max()) <= 2e-5 * scale, name


def test_groups_are_counted_logged_and_not_in_the_mean_reward(model_folder, tmp_path, caplog):
    trainer = make_trainer(model_folder, tmp_path, Failing(), max_steps=2, logging_steps=1, **SKIP)
    trainer.scorer.functions[0].rows = (prompts_of(trainer)[2],)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert sorted(row["rewards/skipped_groups"] for row in rows) == [0.0, 1.0]
    for row in rows:
        assert row["reward"] == pytest.approx(row["rewards/failing/mean"]), "dropped rows do not count as 0"
    said = [m for m in caplog.messages if "the rewards of 1 of 4 groups failed" in m]
    assert len(said) == 1 and "'failing' failed (ValueError: not this one) for" in said[0] and "skip_group" in said[0]


def test_without_a_failure_nothing_differs(model_folder, tmp_path):
    trainers = [make_trainer(model_folder, tmp_path / name, **more) for name, more in (("a", {}), ("b", SKIP))]
    for trainer in trainers:
        trainer.train()
    one, two = map(lora_weights, trainers)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("settings", [{"dynamic_sampling": True}, {"gradient_accumulation_steps": 2}])
def test_a_dropped_group_gives_way_or_is_left_out_of_accumulated_batches(model_folder, tmp_path, settings):
    trainer = make_trainer(model_folder, tmp_path, Failing(), max_steps=1, logging_steps=1, **SKIP, **settings)
    trainer.scorer.functions[0].rows = (prompts_of(trainer)[0],)
    learned = []
    update = trainer.update
    trainer.update = lambda batch, *later: learned.append(batch) or update(batch, *later)
    trainer.train()
    lost = sum(int(batch.rewards.isnan().sum()) for batch in learned)
    assert lost == (0 if "dynamic_sampling" in settings else 4)
    assert all(not batch.token_weights[batch.rewards.isnan()].any() for batch in learned)
    assert trainer.state.log_history[0]["rewards/skipped_groups"] > 0


def test_too_many_failures_stop_the_run_with_a_checkpoint(model_folder, tmp_path):
    def later(completions, trainer_state, **columns):
        if trainer_state.global_step == 1:
            raise ValueError("no longer")
        return digits_reward(None, completions)

    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 100, "on_reward_error": "skip_group"}
    with pytest.raises(ValueError, match="no group of a whole step has rewards.*'later' failed") as raised:
        make_trainer(model_folder, tmp_path, later, **settings).train()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()
    assert "checkpoint-1 holds everything before step 2. Mend the function" in raised.value.__notes__[-1]


def test_a_total_that_overflows_stops_the_run_with_a_checkpoint(model_folder, tmp_path):
    def large(completions, trainer_state, **columns):
        return [1e308 if trainer_state.global_step == 2 else 0.5] * len(completions)

    def also_large(**columns):
        return large(**columns)

    trainer = make_trainer(model_folder, tmp_path, [large, also_large], save_strategy="steps", save_steps=100)
    with pytest.raises(ValueError, match="the weighted total of .* overflows") as raised:
        trainer.train()
    assert (tmp_path / "checkpoint-2").is_dir() and any("checkpoint-2" in note for note in raised.value.__notes__)


def test_a_full_disk_of_a_reward_function_is_not_that_of_the_run(model_folder, tmp_path):
    def sandbox(**columns):
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere/x")

    with (
        explaining_full_disk(tmp_path),
        pytest.raises(OSError, match="No space left on device: '/elsewhere/x'") as raised,
    ):
        make_trainer(model_folder, tmp_path, sandbox).train()
    with pytest.raises(OSError, match="/elsewhere/x"), explaining_full_disk(tmp_path):
        raise raised.value
    assert any("'sandbox' failed" in note for note in raised.value.__notes__)


def test_at_evaluation_a_failure_stops_the_run_all_the_same(model_folder, tmp_path):
    def judge(completions, **columns):
        raise ValueError("no judgement")

    with pytest.raises(ValueError, match="no judgement"):
        make_trainer(model_folder, tmp_path, judge=judge, eval_strategy="steps", eval_steps=1, **SKIP).train()


def test_exit_in_a_reward_function_stops_the_run_with_a_checkpoint(model_folder, tmp_path):
    def exits_later(completions, trainer_state, **columns):
        if trainer_state.global_step == 2:
            sys.exit(0)
        return digits_reward(None, completions)

    settings = {"save_strategy": "steps", "save_steps": 100}
    with pytest.raises(ValueError, match="'exits_later' raised SystemExit.0., which does not end a run"):
        make_trainer(model_folder, tmp_path, exits_later, **settings).train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_settings_that_can_not_work_together_are_refused(tmp_path):
    for settings, words in (
        ({"on_reward_error": "skip"}, "on_reward_error='skip': choose one of stop, skip_group"),
        ({"max_reward_errors": 0.5}, "max_reward_errors=0.5: has an effect with on_reward_error='skip_group' only"),
        ({"on_reward_error": "skip_group", "max_reward_errors": 1.5}, r"max_reward_errors=1.5: must be in \[0, 1\]"),
        ({"on_reward_error": "skip_group", "use_grpo": False}, "on_reward_error='skip_group': is about rollouts"),
        ({"on_reward_error": "skip_group", "save_batches": 1}, "on_reward_error='skip_group': records"),
    ):
        with pytest.raises(ValueError, match=words):
            GRPOConfig(output_dir=str(tmp_path), **settings)


# ---- None from all functions ----


def test_a_batch_that_no_function_applies_to_is_said_once_with_what_it_means(caplog, monkeypatch):
    monkeypatch.setattr(once, "_said", set())

    def silent(completions):
        return [None] * len(completions)

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert score_completions([silent, silent], ROWS, COMPLETIONS).isnan().all()
    assert len(caplog.messages) == 1
    assert re.match(
        "All 2 reward functions returned None for every completion of a batch. None mea", caplog.messages[0]
    )


def test_a_command_shows_of_a_mistake_in_a_function_its_own_lines_and_one_line_more(tmp_path, monkeypatch, capsys):
    """Regression: seventy lines of calls of the library stood before them."""
    (tmp_path / "rewards_with_mistakes.py").write_text(
        "def reward(completions):\n    return [1 / 0 for _ in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TUNIX_DEBUG", raising=False)
    from rewards_with_mistakes import reward

    def main():
        call_rewards([reward], ROWS[:1], ["2", "3"])

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "return [1 / 0 for _ in completions]" in said
    assert "tunix_torch" not in said and "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ZeroDivisionError: division by zero. Raised while scoring: ")


def test_a_fault_of_the_library_while_it_scores_keeps_its_traceback():
    def main():
        with noted():
            failures.error_of(None, None, None, None)

    with pytest.raises(AttributeError):
        run_script(main)
