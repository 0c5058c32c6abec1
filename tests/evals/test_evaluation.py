"""Evaluations report accuracy, rewards and lengths, of greedy and of sampled answers, for one data set or several."""

import logging

import datasets
import numpy as np
import pytest
import torch
from trainers import digits_reward, ends_early, make_trainer

from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.config.best_metric import evaluation_metrics
from tunix_torch.evals.answers import Answers
from tunix_torch.evals.evaluation import answer_metrics
from tunix_torch.model import tiny
from tunix_torch.runtime import once

ROWS = [{"prompt": f"{i} + 1?"} for i in range(5)]


@pytest.fixture(autouse=True)
def warn_anew(monkeypatch):
    monkeypatch.setattr(once, "_said", set())


def make(model_folder, tmp_path, reward_funcs, train, evaluation_rows, judge=None, **settings):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "generation_max_length": 8,
        "max_prompt_length": 40,
        "system_message": "",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | settings
    args = GRPOConfig(output_dir=str(tmp_path), **settings)
    return TunixTrainer(model_folder, reward_funcs, args, train, evaluation_rows, judge=judge)


def test_numbers_of_answers_equal_their_definition():
    rewards = [[[1.0, None], [3.0, 2.0]], [[None, None], [0.0, 4.0]]]  # two questions, two answers, two functions
    answers = Answers([["a", "b"]] * 2, [[True] * 2] * 2, [[3, 5], [1, 7]], rewards)
    metrics = answer_metrics(answers, ["f", "g"], torch.tensor([1.0, 0.5], dtype=torch.float64))
    totals = np.array([[1.0, 4.0], [0.0, 2.0]])  # the third answer has no value at all, so its total counts nowhere
    expected = {
        "reward": np.mean([1.0, 4.0, 2.0]),
        "reward_std": totals.std(axis=1, ddof=1).mean(),
        "rewards/f/mean": np.mean([1.0, 3.0, 0.0]),
        "rewards/f/std": np.std([1.0, 3.0, 0.0]),
        "rewards/g/mean": 3.0,
        "rewards/g/std": 1.0,
        "completions/mean_length": 4.0,
        "completions/min_length": 1.0,
        "completions/max_length": 7.0,
    }
    assert metrics == pytest.approx(expected)


def test_rewards_of_the_greedy_and_the_sampled_answers_are_reported(model_folder, tmp_path):
    settings = {"reward_weights": [1.0, 0.25], "num_eval_completions": 3}
    trainer = make_trainer(model_folder, tmp_path, [digits_reward, ends_early], **settings)
    metrics = trainer.evaluate()
    texts = [text for texts in trainer.last_answers.completions for text in texts]
    digits, early = (np.array(function(None, texts)) for function in (digits_reward, ends_early))
    assert metrics["eval_reward"] == pytest.approx((digits + 0.25 * early).mean())
    assert metrics["eval_reward_std"] == pytest.approx((digits + 0.25 * early).std())
    assert metrics["eval_rewards/ends_early/mean"] == pytest.approx(early.mean())
    assert metrics["eval_rewards/digits_reward/std"] == pytest.approx(digits.std())
    assert metrics["eval_completions/mean_length"] == metrics["eval_mean_length"]
    sampled = {name for name in metrics if name.startswith("eval_sampled/")}
    assert {name.replace("sampled/", "") for name in sampled} <= metrics.keys() and "eval_sampled/reward" in sampled
    promised = evaluation_metrics(trainer.args, rewards=["digits_reward", "ends_early"])
    assert {f"eval_{name}" for name in promised} == metrics.keys() - {"epoch"}


def test_rows_without_an_answer_are_evaluated_where_nothing_asks_for_one(model_folder, tmp_path):
    trainer = make(model_folder, tmp_path, digits_reward, ROWS, ROWS, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "eval_reward" in row] == [1, 2]


def test_a_function_that_evaluation_rows_lack_a_column_for_is_left_out_and_named(model_folder, tmp_path, caplog):
    def by_level(completions, level):
        return [float(value) for value in level]

    train = [row | {"level": 3} for row in ROWS]
    trainer = make(model_folder, tmp_path, [digits_reward, by_level], train, ROWS)
    with caplog.at_level(logging.WARNING):
        metrics = trainer.evaluate()
        trainer.evaluate()
    assert "eval_rewards/digits_reward/mean" in metrics and "eval_rewards/by_level/mean" not in metrics
    assert caplog.text.count("row 1: no column 'level'. The reward function 'by_level' takes 'level'") == 1


def test_a_judge_that_is_a_reward_function_is_called_once(model_folder, tmp_path):
    calls = []

    def counting(completions, **columns):
        calls.append(len(completions))
        return [1.0] * len(completions)

    metrics = make(model_folder, tmp_path, [digits_reward, counting], ROWS, ROWS, judge=counting).evaluate()
    assert calls == [5] and metrics["eval_accuracy"] == metrics["eval_rewards/counting/mean"] == 1.0


def as_stream(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


@pytest.mark.parametrize(
    "several",
    [
        {"easy": ROWS, "hard": ROWS[:2]},
        {"easy": datasets.Dataset.from_list(ROWS), "hard": datasets.Dataset.from_list(ROWS[:2])},
        {"easy": as_stream(ROWS), "hard": as_stream(ROWS[:2])},
        datasets.DatasetDict(easy=datasets.Dataset.from_list(ROWS), hard=datasets.Dataset.from_list(ROWS[:2])),
        datasets.IterableDatasetDict(easy=as_stream(ROWS), hard=as_stream(ROWS[:2])),
    ],
    ids=["lists", "data sets", "streams", "DatasetDict", "IterableDatasetDict"],
)
def test_each_of_several_data_sets_is_evaluated_under_its_name(model_folder, tmp_path, several):
    one = make(model_folder, tmp_path, digits_reward, ROWS, ROWS[:2]).evaluate()
    trainer = make(model_folder, tmp_path, digits_reward, ROWS, several, metric_for_best_model="eval_hard_reward")
    assert trainer.eval_dataset is several, "it stays what was given, as in transformers.Trainer"
    metrics = trainer.evaluate()
    assert {"eval_easy_accuracy", "eval_easy_reward", "eval_hard_reward"} <= metrics.keys()
    assert metrics["eval_hard_reward"] == pytest.approx(one["eval_reward"], abs=1e-6)
    assert trainer.evaluate("hard")["eval_accuracy"] == metrics["eval_hard_accuracy"]
    given_later = make(model_folder, tmp_path, digits_reward, ROWS, None).evaluate(several)
    assert given_later["eval_hard_reward"] == pytest.approx(one["eval_reward"], abs=1e-6)


def test_the_best_model_may_be_that_of_a_reward_of_one_of_several_data_sets(model_folder, tmp_path, caplog):
    settings = {
        "metric_for_best_model": "hard_rewards/digits_reward/mean",
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "early_stopping_patience": 9,
    }
    trainer = make(model_folder, tmp_path, digits_reward, ROWS, {"easy": ROWS, "hard": ROWS[:2]}, **settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "early stopping" not in caplog.text, "the other data set's evaluation is no reason to complain"
    name = "eval_hard_rewards/digits_reward/mean"
    logged = [row[name] for row in trainer.state.log_history if name in row]
    assert len(logged) == 2 and trainer.state.best_metric == max(logged)


@pytest.mark.parametrize(
    "metric, message",
    [
        ("eval_nosuch_reward", "an evaluation gives easy_accuracy, easy_mean_length, .*hard_reward"),
        ("reward", "metric_for_best_model='reward': an evaluation gives easy_accuracy"),
        ("easy_rewards/other/mean", "easy_rewards/digits_reward/mean"),
        ("recall", "metric_for_best_model='recall': an evaluation gives accuracy, mean_length"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused(model_folder, tmp_path, metric, message):
    several = {"easy": ROWS, "hard": ROWS[:2]}
    with pytest.raises(ValueError, match=message):
        make(model_folder, tmp_path, digits_reward, ROWS, several, metric_for_best_model=metric)


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list, as_stream])
def test_supervised_fine_tuning_evaluates_conversations_by_their_loss(model_folder, tmp_path, kind):
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    rows = [{"messages": turns}, {"messages": [*turns, *turns]}] * 2
    settings = {"use_grpo": False, "generation_max_length": 90, "learning_rate": 1e-2, "max_steps": 3}
    trainer = make(model_folder, tmp_path, None, kind(rows), {"all": kind(rows)}, **settings)
    before = trainer.evaluate()["eval_all_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_all_loss"] < before


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list, as_stream])
def test_a_packed_run_learns_and_is_evaluated_row_by_row(model_folder, tmp_path, kind):
    rows = [{k: row[k] for k in ("question", "completion")} for row in tiny.arithmetic_rows("train", 40)]
    settings = {"use_grpo": False, "generation_max_length": 90, "learning_rate": 1e-2, "max_steps": 3}
    plain = make(model_folder, tmp_path, None, kind(rows), rows[:8], **settings)
    trainer = make(model_folder, tmp_path, None, kind(rows), rows[:8], packing=True, **settings)
    before = trainer.evaluate()["eval_loss"]
    assert before == plain.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
