"""Reward functions get TRL's further arguments, in this process and in others, and what they log reaches the log."""

import functools
import os
import re

import numpy as np
import pytest
import torch
from trainers import digits_reward, first_batch, make_trainer
from transformers import TrainerState

from tunix_torch.rewarding.context import GIVEN, RewardContext
from tunix_torch.rewarding.scoring import call_rewards, names_of, require_columns
from tunix_torch.rewarding.values import CompletionError
from tunix_torch.rewarding.workers import RewardWorkers

ROWS = [{"prompt": "1 + 1?", "answer": 2}, {"prompt": "2 + 2?", "answer": 4}]
COMPLETIONS = ["2", "3", "4", "4"]
TOKENS = [[5, 1], [6, 7, 1], [8], []]


def counting(completions, completion_ids, trainer_state, log_metric, log_extra):
    """A reward function that takes all of TRL's arguments by name. It pays for the number of tokens."""
    log_metric("step_seen", trainer_state.global_step)
    log_metric("tokens", sum(map(len, completion_ids)))
    log_extra("length", [len(ids) for ids in completion_ids])
    log_extra("shouted", [text.upper() for text in completions])
    return [float(len(ids)) for ids in completion_ids]


def taking_all(prompts, completions, **columns):
    assert {*GIVEN, "answer", "prompt"} <= set(columns) and len(columns["completion_ids"]) == len(completions)
    columns["log_metric"]("pid", os.getpid())
    return [0.0] * len(completions)


async def counting_later(**arguments):
    return counting(**{name: arguments[name] for name in ("completions", *GIVEN)})


class Counting:
    def __call__(self, completions, completion_ids):
        return [float(len(ids)) for ids in completion_ids]

    def bound(self, completion_ids, factor=1.0):
        return [factor * len(ids) for ids in completion_ids]


def careless(completion_ids):
    completion_ids[0].append(9)
    return [0.0] * len(completion_ids)


def giving_up(completions, answer):
    for number, (text, expected) in enumerate(zip(completions, answer, strict=True)):
        if text == "3" or expected == 4:
            raise CompletionError(number, f"{text!r} is hard")
    return [0.0] * len(completions)


@pytest.fixture
def context():
    return RewardContext(TOKENS, TrainerState(global_step=7))


@pytest.fixture(scope="module")
def workers():
    workers = RewardWorkers(2, [counting])
    yield workers
    workers.close()


# ---- what a function gets ----


@pytest.mark.parametrize("function", [counting, counting_later])
def test_arguments_have_the_names_that_trl_gives_them(function, context):
    assert call_rewards([function], ROWS, COMPLETIONS, context=context) == [[2.0, 3.0, 1.0, 0.0]]
    assert context.metrics == {"step_seen": [7.0], "tokens": [6.0]}
    assert context.extra == {"length": [2, 3, 1, 0], "shouted": COMPLETIONS}


@pytest.mark.thorough
def test_a_function_in_another_process_logs_the_same(context, workers):
    assert call_rewards([counting], ROWS, COMPLETIONS, None, workers, context=context) == [[2.0, 3.0, 1.0, 0.0]]
    assert context.metrics == {"step_seen": [7.0, 7.0], "tokens": [5.0, 1.0]}
    assert context.extra == {"length": [2, 3, 1, 0], "shouted": COMPLETIONS}
    context.metrics.clear()
    call_rewards([taking_all], ROWS, COMPLETIONS, None, workers, context=context)
    assert len(set(context.metrics["pid"])) >= 1 and os.getpid() not in context.metrics["pid"]


def test_any_callable_gets_them(context):
    functions = [
        Counting(),
        Counting().bound,
        functools.partial(Counting().bound, factor=2.0),
        lambda completion_ids, **columns: [len(ids) for ids in completion_ids],
        taking_all,
    ]
    one, zero = [2.0, 3.0, 1.0, 0.0], [0.0] * 4
    assert call_rewards(functions, ROWS, COMPLETIONS, context=context) == [one, one, [4.0, 6.0, 2.0, 0.0], one, zero]
    assert names_of(functions) == ["Counting", "bound", "bound_2", "<lambda>", "taking_all"]


def test_a_function_that_changes_its_tokens_changes_them_for_itself_only(context):
    assert call_rewards([careless, Counting()], ROWS, COMPLETIONS, context=context)[1] == [2.0, 3.0, 1.0, 0.0]
    assert TOKENS[0] == [5, 1]


def test_what_only_a_trainer_knows_is_asked_for_in_one_line():
    with pytest.raises(ValueError, match="'Counting' takes 'completion_ids', which only a trainer knows; give the par"):
        call_rewards([Counting()], ROWS, COMPLETIONS)

    def without(completions, completion_ids=None, trainer_state=None, **columns):
        assert completion_ids is trainer_state is None
        columns["log_metric"]("x", 1)
        return [0.0] * len(completions)

    assert call_rewards([without], ROWS, COMPLETIONS) == [[0.0] * 4]


def test_columns_of_the_data_do_not_hide_an_argument(context):
    require_columns([counting], ROWS)  # none of its arguments is a column
    for name in GIVEN[1:]:
        with pytest.raises(ValueError, match=f"column '{name}' of the data set: reward functions get something else"):
            require_columns([digits_reward], [{**ROWS[0], name: 1}])
    rows = [{**row, "completion_ids": [0]} for row in ROWS]  # as TRL does, whose rows may have such a column
    assert call_rewards([Counting()], rows, COMPLETIONS, context=context) == [[2.0, 3.0, 1.0, 0.0]]


def test_a_completion_that_can_not_be_judged_names_its_row(context, workers):
    rows = [{**row, "tunix/row": f"rows.jsonl, row {i}"} for i, row in enumerate(ROWS, 5)]
    for where in (None, workers):
        for completions, row, question, hard in (
            (COMPLETIONS, 5, "1 + 1?", "3"),
            (["2", "2", "4", "4"], 6, "2 + 2?", "4"),
        ):
            said = (
                f"rows.jsonl, row {row}: '{hard}' is hard\nRaised while scoring: reward function 'giving_up' failed "
                f"for rows.jsonl, row {row}: prompt '{question}', completion '{hard}'"
            )
            with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
                call_rewards([giving_up], rows, completions, None, where)


def test_a_judge_of_evaluate_gets_the_tokens_too():
    from tunix_torch.cli import evaluation

    judged = evaluation.judge_batch(
        [{"prompt": "?", "question": "?", "answer": "1"}], [1], [["1", "2"]], [[[3, 1], [4]]], "correctness", [NAME]
    )
    assert [completion.rewards[NAME] for completion in judged] == [2.0, 1.0]


NAME = f"{__name__}.tokens_reward"


def tokens_reward(completion_ids, log_metric):
    log_metric("dropped", 1.0)
    return [float(len(ids)) for ids in completion_ids]


# ---- what a function returns ----


def returns(values):
    def function(completions):
        return values

    return function


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0, 0.0, 1.0, 1.0]),
        torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([True, False, True, True]),
        np.array([1, 0, 1, 1]),
        np.array([1, 0, 1, 1], dtype=np.float16),
        [torch.tensor(1.0), torch.tensor(0), torch.tensor(True), torch.tensor(1.0, requires_grad=True)],
        [np.float32(1), np.int64(0), np.bool_(True), 1],
        (1, 0, 1, 1),
        [True, False, True, True],
    ],
    ids=lambda values: f"{type(values).__name__} {getattr(values, 'dtype', '')}",
)
def test_numbers_of_any_kind_are_rewards(values):
    assert call_rewards([returns(values)], ROWS, COMPLETIONS) == [[1.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize(
    "values",
    [
        "1111",
        b"1111",
        {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0},
        {1.0, 2.0, 3.0, 4.0},
        dict.fromkeys([1.0, 2.0, 3.0, 4.0]).keys(),
        ["1"] * 4,
        torch.zeros(4, 1),
        torch.ones(()),
    ]
    + [np.zeros((4, 2)), [10**400] * 4, 1.0, None],
    ids=lambda values: f"{values!r:.20}",
)
def test_what_only_looks_like_numbers_is_refused(values):
    with pytest.raises(ValueError, match="reward function 'function' returned .*: expected numbers, one for each"):
        call_rewards([returns(values)], ROWS, COMPLETIONS)


def text_of_digits(completions):
    return "1" * len(completions)


def dict_of_numbers(completions):
    return dict.fromkeys(range(len(completions)), 1.0)


def tensor_of_numbers(completions):
    return torch.arange(len(completions))


def test_the_same_in_other_processes(workers):
    for function in (text_of_digits, dict_of_numbers):
        with pytest.raises(ValueError, match=f"'{function.__name__}' returned .*expected numbers"):
            call_rewards([function], ROWS, COMPLETIONS, None, workers)
    assert call_rewards([tensor_of_numbers], ROWS, COMPLETIONS, None, workers) == [[0.0, 1.0, 0.0, 1.0]]


# ---- what can be logged ----


def test_what_can_not_be_logged_is_one_line(context):
    for name, value, words in (
        ("reward", 1.0, "log_metric: name='reward': the trainer logs its own"),
        ("rewards/x/mean", 1.0, "log_metric: name='rewards/x/mean'"),
        (3, 1.0, "log_metric: name=3"),
        ("x", "much", "log_metric.'x'.: 'much' is no number"),
        ("x", [1.0, 2.0], "is no number; log one number"),
        ("x", float("inf"), "inf is not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            context.log_metric(name, value)
    context.log_metric("x", float("nan"))
    context.log_metric("x", torch.tensor(2))
    assert context.metrics == {"x": [2.0]}

    def too_few(completions, log_extra):
        log_extra("column", [1, 2])
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="log_extra.'column'.: 2 values for 4 completions; log one for each"):
        call_rewards([too_few], ROWS, COMPLETIONS, context=context)


# ---- in a trainer ----

SEEN = []


def recording(prompts, completions, completion_ids, trainer_state, log_metric, log_extra, answer, **columns):
    SEEN.append((trainer_state, [list(ids) for ids in completion_ids]))
    log_metric("mean_tokens", sum(map(len, completion_ids)) / len(completion_ids))
    log_metric("nothing", float("nan"))
    log_extra("tokens", [len(ids) for ids in completion_ids])
    return digits_reward(prompts, completions)


def test_a_trainer_gives_tokens_and_state_and_logs_what_is_logged(model_folder, tmp_path):
    SEEN.clear()
    trainer = make_trainer(
        model_folder,
        tmp_path,
        [recording, digits_reward],
        max_steps=4,
        logging_steps=2,
        num_eval_completions=2,
        eval_strategy="steps",
        eval_steps=4,
        per_device_eval_batch_size=16,
    )
    trainer.sampler.eos_token_ids += (31, 38)  # two digits, so that some completions end early
    trainer.train()
    training = [ids for state, ids in SEEN[:4]]
    assert all(state is trainer.state for state, _ in SEEN)
    assert [len(ids) for _, ids in SEEN] == [16, 16, 16, 16, 8, 16]  # four steps, greedy answers, and two samples each
    lengths = [sum(map(len, ids)) / len(ids) for ids in training]
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["mean_tokens"] for row in logs] == pytest.approx([sum(lengths[:2]) / 2, sum(lengths[2:]) / 2])
    assert [row["completions/mean_length"] for row in logs] == pytest.approx([row["mean_tokens"] for row in logs])
    assert trainer.scorer.last_extra == {"tokens": [len(ids) for ids in training[3]]}
    assert not any("nothing" in row for row in trainer.state.log_history)
    evaluation = next(row for row in trainer.state.log_history if "eval_accuracy" in row)
    means = [sum(map(len, ids)) / len(ids) for _, ids in SEEN[4:]]
    assert [evaluation["eval_mean_tokens"], evaluation["eval_mean_tokens@2"]] == pytest.approx(means)
    assert evaluation["eval_mean_length"] == pytest.approx(means[0])


def test_tokens_are_those_of_the_batch_with_the_token_that_ended_it(model_folder, tmp_path):
    SEEN.clear()
    trainer = make_trainer(model_folder, tmp_path, recording)
    trainer.sampler.eos_token_ids += (31, 38)
    batch = first_batch(trainer)
    ((_, ids),) = SEEN
    lengths = batch.completion_mask.sum(dim=1).tolist()
    assert ids == [row[:n] for row, n in zip(batch.completion_ids.tolist(), lengths, strict=True)]
    ended = [row for row in ids if len(row) < 12]
    assert ended and all(row[-1] in trainer.sampler.eos_token_ids for row in ended)


@pytest.mark.thorough
def test_workers_see_the_step_and_log_through_the_trainer(model_folder, tmp_path):
    logs = []
    for count in (0, 2):
        trainer = make_trainer(model_folder, tmp_path / str(count), counting, max_steps=2, reward_processes=count)
        trainer.train()
        logs.append([row for row in trainer.state.log_history if "reward" in row])
        assert len(trainer.scorer.last_extra["length"]) == 16
    for alone, shared in zip(*logs, strict=True):
        assert shared["reward"] == alone["reward"] and shared["step_seen"] == alone["step_seen"]
        assert shared["tokens"] == pytest.approx(alone["tokens"] / 2)  # the mean over two processes
    assert [row["step_seen"] for row in logs[1]] == [0.0, 1.0]
