"""evaluate.py: estimators equal brute force, files survive interruptions, and every kind of model folder is taken."""

import doctest
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import add_nontrivial_lora

from tunix_torch import DataConfig, Sampler, SamplingParams, load_model, load_tokenizer, rewards
from tunix_torch.cli import evaluate, evaluation
from tunix_torch.data.batches import Collator
from tunix_torch.data.prompts import prepare_rows
from tunix_torch.evals import estimators
from tunix_torch.evals.answers import sample_batches, sample_texts
from tunix_torch.evals.estimators import maj_at_k, mean_at_k, pass_at_k, share_interval, wilson_interval
from tunix_torch.evals.results import JudgedCompletion, summarize
from tunix_torch.evals.votes import takes_answer, votes_by_class
from tunix_torch.model import tiny
from tunix_torch.model.loading import eos_token_ids
from tunix_torch.runtime import phases

ROOT = Path(__file__).parent.parent.parent
SAMPLED = ["--preset", "liberal", "--num_passes", "2", "--batch_size", "4"]
REWARDS = """
def length_is_even(prompts, completions, **columns):
    return [float(len(text) % 2 == 0) for text in completions]

def first_only(prompts, completions, answer, **columns):
    return [1.0 if value == answer[0] else None for value in answer]
"""


# ---- estimators ----

right_flags = st.lists(st.booleans(), min_size=1, max_size=8)


@given(right_flags)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(right):
    for k in range(1, len(right) + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@given(st.integers(1, 500), st.data())
def test_pass_at_k_grows_with_k_from_the_mean_to_any(n, data):
    c = data.draw(st.integers(0, n))
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values == sorted(values) and all(0 <= value <= 1 for value in values)
    assert values[0] == pytest.approx(c / n, abs=1e-12) and values[-1] == float(c > 0)


@given(right_flags)
def test_mean_at_k_is_pass_at_1(right):
    assert mean_at_k(right) == pytest.approx(pass_at_k(len(right), sum(right), 1), abs=1e-12)


@given(st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.booleans()), min_size=1, max_size=9))
def test_maj_at_k_is_the_answer_that_no_other_beats(pairs):
    votes, right = zip(*pairs, strict=True)
    best, winner = 0, None
    # A later answer wins only with more votes, and a right answer is never counted together with a wrong one.
    for i, pair in enumerate(pairs):
        if pair[0] is not None and pairs.count(pair) > best:
            best, winner = pairs.count(pair), i
    assert maj_at_k(votes, right) == (0.0 if winner is None else float(right[winner]))


def test_maj_at_k_on_ties_and_without_votes():
    assert maj_at_k(["a", "b", "b", "a"], [True, False, False, True]) == 1.0
    assert maj_at_k(["b", "a", "a", "b"], [False, True, True, False]) == 0.0
    assert maj_at_k([None, None], [True, True]) == 0.0
    assert maj_at_k([None, None, "a"], [False, False, True]) == 1.0


@given(st.integers(1, 300), st.data())
def test_wilson_bounds_are_where_the_score_test_rejects(n, data):
    share = data.draw(st.integers(0, n)) / n
    low, high = wilson_interval(share, n)
    assert 0 <= low <= share <= high <= 1 and low < high
    for bound in (low, high):  # |share - p| = 1.96 standard errors at the true p
        if 0 < bound < 1:
            error = math.sqrt(bound * (1 - bound) / n)
            assert abs(share - bound) == pytest.approx(estimators.Z * error, rel=1e-6, abs=1e-9)


@given(right_flags)
def test_the_interval_of_single_answers_is_wilsons(right):
    expected = wilson_interval(sum(right) / len(right), len(right))
    assert share_interval([float(flag) for flag in right], 1) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_many_questions_is_the_standard_error_over_questions():
    shares = np.random.default_rng(0).beta(2, 1, 5000)
    error = shares.std(ddof=1) / math.sqrt(len(shares))
    expected = (shares.mean() - 1.96 * error, shares.mean() + 1.96 * error)
    assert share_interval(shares.tolist(), 100) == pytest.approx(expected, abs=1e-4)


def test_equal_completions_of_a_question_count_once():
    once = [float(i % 3 == 0) for i in range(30)]
    assert share_interval(once, 8) == pytest.approx(share_interval(once, 1))
    assert share_interval([1.0] * 30, 8) == share_interval([1.0] * 30, 1)  # also where all are right
    assert share_interval([0.5], 8) == wilson_interval(0.5, 1)


def test_intervals_hold_the_truth_95_times_in_100():
    random, num_questions, k = np.random.default_rng(1), 40, 4
    for a, b in ((1, 1), (3, 0.5)):  # the mean of the second is near 1, where plain standard errors fail
        chances = random.beta(a, b, (2000, num_questions))
        shares = random.binomial(k, chances) / k
        intervals = np.array([share_interval(row, k) for row in shares.tolist()])
        held = np.mean((intervals[:, 0] <= a / (a + b)) & (a / (a + b) <= intervals[:, 1]))
        assert 0.93 < held < 0.97, (a, b, held)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pass_at_k(4, 1, 5),
        lambda: pass_at_k(4, 5, 1),
        lambda: pass_at_k(4, 1, 0),
        lambda: mean_at_k([]),
        lambda: maj_at_k(["a"], []),
        lambda: wilson_interval(0.5, 0),
        lambda: share_interval([], 1),
        lambda: summarize([]),
    ],
)
def test_estimators_refuse_what_has_no_answer(call):
    with pytest.raises(ValueError):
        call()


def test_doctests_of_the_estimators():
    assert doctest.testmod(estimators).failed == 0


# ---- metrics ----


def judged(row, number, right, vote="1", near=False, formed=True, length=10):
    return JudgedCompletion(row, number, "?", "1", "", vote, vote, right, right or near, formed, {}, length)


def test_flags_have_the_names_of_train_too():
    given = "--model_name m --num_eval_rows 3 --reward_funcs format --generation_max_length 9".split()
    given += "--generation_temperature 0.5 --generation_top_k 4 --generation_top_p 0.5".split()
    own = "--model_path m --max_samples 3 --rewards format --max_new_tokens 9 --temperature 0.5 --top_k 4 --top_p 0.5"
    assert evaluate.parse_args(given, "evaluate") == evaluate.parse_args(own.split(), "evaluate")
    with pytest.raises(ValueError, match="unknown argument '--max_sample'; did you mean '--max_samples'"):
        evaluate.parse_args(["--max_sample", "3"], "evaluate")


def test_what_is_the_accuracy_by_another_name_is_shown_once():
    one = evaluation.format_metrics(summarize([judged(1, 1, True), judged(2, 1, False)]))
    assert one.count("50.0%") == 2 and "partial accuracy" in one and "@1" not in one
    two = evaluation.format_metrics(summarize([judged(i, k, i == k) for i in (1, 2) for k in (1, 2)]))
    assert all(name in two for name in ("pass@1", "pass@2", "mean@2", "maj@2"))


def test_metrics_of_a_small_case_by_hand():
    completions = [
        *(judged(1, i, i == 1, vote="1" if i == 1 else "2", near=i == 2) for i in (1, 2, 3)),
        *(judged(5, i, i < 3, formed=i == 1, length=20) for i in (1, 2, 3)),
    ]
    metrics = summarize(completions)
    expected = {"correct": 3, "total": 6, "accuracy": 1 / 2, "partial_accuracy": 4 / 6, "format_accuracy": 4 / 6}
    expected |= {"pass@1": 1 / 2, "pass@2": (2 / 3 + 1) / 2, "pass@3": 1.0, "mean@3": 1 / 2, "maj@3": 1 / 2}
    expected |= {"mean_length": 15}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    intervals = {f"{name}_{end}" for name in expected for end in ("low", "high")} - {
        f"{name}_{end}" for name in ("correct", "total", "mean_length") for end in ("low", "high")
    }
    assert set(metrics) == set(expected) | intervals
    assert all(
        metrics[f"{name[:-4]}_low"] <= metrics[name[:-4]] <= metrics[f"{name[:-4]}_high"]
        for name in intervals
        if name.endswith("_low")
    )
    assert summarize(completions[::-1])["accuracy"] == metrics["accuracy"]
    json.loads(json.dumps(metrics, allow_nan=False))


def test_questions_with_unequal_numbers_of_completions_are_refused():
    with pytest.raises(ValueError, match="1 or 2 completions"):
        summarize([judged(1, 1, True), judged(2, 1, True), judged(2, 2, True)])


@pytest.mark.parametrize(
    "given, expected, near",
    [
        ("66", "60", True),
        ("67", "60", False),
        ("-66", "-60", True),
        ("$1,000", "950 dollars", True),
        ("0", "0", True),
        ("0.01", "0", False),
        ("many", "60", False),
        ("60", "many", False),
        (None, "60", False),
    ],
)
def test_partially_right_is_within_ten_percent(given, expected, near):
    assert evaluation.is_near(given, expected) is near


def votes(judge, gold, *answers):
    """Return (votes, maj@K) of a question that got these answers; None is a completion without answer tags."""
    row = {"question": "?", "prompt": "?", "answer": gold}
    texts = ["It is." if answer is None else f"<answer>{answer}</answer>" for answer in answers]
    batch = evaluation.judge_batch([row], [1], [texts], [[[0]] * len(texts)], judge, [])
    return [c.vote for c in batch], summarize(batch)[f"maj@{len(texts)}"]


def test_a_majority_is_of_answers_that_the_judge_calls_equal():
    """Regression: a majority was one of equal texts, or of equal numbers whatever their units."""
    half = r"\frac{1}{2}"
    assert votes("math_equal", "1/2", half, r"\dfrac12", "$0.5$", "1/3", "1/3") == ([half] * 3 + ["1/3"] * 2, 1.0)
    assert votes("math_equal", "1/2", "1/3", half, "1/3", "0.5", "2") == (["1/3", half, "1/3", half, "2"], 0.0)
    assert votes("correctness", "5 km", "5 miles", "5 km", "5 km") == (["5 miles", "5 km", "5 km"], 1.0)
    assert votes("correctness", "72", "$72", None, "72.00", " ", "7") == (["$72", None, "$72", None, "7"], 1.0)


@pytest.mark.parametrize(
    "judge, gold, answers, expected",
    [
        ("math_equal", "85", ["47 + 38", "85", "85"], ["47 + 38", "85", "85"]),
        ("math_equal", "12", ["84/7", "12", "12"], ["84/7", "12", "12"]),
        ("math_equal", "x=5", ["y=5", "5", "5"], ["y=5", "5", "5"]),
        ("correctness", "5 km", ["5 miles", "5", "5"], ["5 miles", "5", "5"]),
        ("correctness", "5 km", ["5", "5 miles", "5 km"], ["5", "5 miles", "5"]),
    ],
)
def test_a_majority_of_right_answers_is_right_whatever_wrong_one_the_judge_calls_equal(judge, gold, answers, expected):
    """Regression: right and wrong answers were one class with the first one's verdict, as equality is not symmetric."""
    assert votes(judge, gold, *answers) == (expected, 1.0)


answers_5 = st.lists(st.integers(0, 9), min_size=5, max_size=5)


@given(st.lists(answers_5, min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 9))
def test_classes_are_formed_in_the_order_of_appearance_and_of_one_verdict(numbers, near, gold):
    """The classes equal those found pair after pair, with a judge whose equality is not symmetric or transitive."""
    calls = []

    def right_is(n):
        return 0 <= n - gold < near

    def judge(completions, answer, **columns):
        calls.append(len(completions))
        return [float(0 <= int(text[1:]) - int(a) < near) for text, a in zip(completions, answer, strict=True)]

    rows = [{"prompt": "?", "answer": "unused", "answers": "unused"} for _ in numbers]
    texts, right = [[str(n) for n in row] for row in numbers], [list(map(right_is, row)) for row in numbers]
    got = votes_by_class(rows, [[f"c{text}" for text in row] for row in texts], texts, right, judge)
    expected, pairs = [], 0
    for row in numbers:
        leaders, chosen = [], []
        for n in row:
            same = [other for other in leaders if right_is(other) == right_is(n) and 0 <= n - other < near]
            leaders += [] if same else [n]
            chosen.append(str(same[0] if same else n))
        expected.append(chosen)
        pairs += 5 * 4 // 2
    assert got == expected and sum(calls) <= pairs and len(calls) <= 5
    for classes, verdicts in zip(got, right, strict=True):
        sizes = {vote: classes.count(vote) for vote in classes}
        largest = max(sizes, key=sizes.__getitem__)
        assert maj_at_k(classes, verdicts) == float(right_is(int(largest)))


def test_the_time_of_a_batch_is_for_all_that_judges_and_rewards_are_asked(monkeypatch):
    """Regression: each call of the judge for maj@K had the whole `reward_timeout` again."""
    seen = []

    def slow(completions, answer, **columns):
        seen.append(len(completions))
        time.sleep(0.2)
        return [float(text == a) for text, a in zip(completions, answer, strict=True)]

    monkeypatch.setattr(rewards, "find_reward", lambda name: slow)
    texts = [[f"<answer>{n}</answer>" for n in range(9)]]
    with pytest.raises(ValueError, match="reward_timeout=0.7: 'slow' takes longer than that"):
        evaluation.judge_batch(
            [{"prompt": "?", "question": "?", "answer": 1}], [1], texts, [[[0]] * 9], "slow", [], 0.7
        )
    assert len(seen) <= 5


def test_a_judge_that_takes_no_answer_leaves_votes_to_the_texts(command, monkeypatch, capsys):
    functions = ["test_evaluate_rewards.length_is_even", "test_evaluate_rewards.first_only"]
    assert [takes_answer(rewards.find_reward(name)) for name in functions] == [False, True]
    assert votes(functions[0], "7", "7", "7.0", "NO", "no") == (["7", "7", "no", "no"], 1.0)
    command("--max_samples", "1", "--judge", functions[0], "--output_file", "r.jsonl")
    assert f"Judge: {functions[0]}, which takes no answer: for maj@K texts are compared" in capsys.readouterr().out
    assert json.loads(Path("r.summary.json").read_text())["settings"]["votes_by"] == "text"


def test_a_judge_that_chokes_on_an_answer_of_the_model_is_named():
    def picky(completions, answer, **columns):
        return [float(text == a) for text, a in zip(completions, map(int, answer), strict=True)]

    row = {"prompt": "?", "answer": "1"}
    with pytest.raises(ValueError, match="judge 'picky', asked for maj@K .* raised ValueError: invalid literal"):
        votes_by_class([row], [["one", "2"]], [["one", "2"]], [[False, False]], picky)


def test_it_judges_by_what_train_py_judges_by(command, model_folder, monkeypatch, capsys):
    """Regression: evaluate.py judged answers of MATH by correctness, while train.py judged them by math_equal."""
    rows = [{"question": "Half?", "answer": r"\frac{1}{2}"}, {"question": "Two?", "answer": 2}]
    monkeypatch.setattr(evaluation, "load_eval_rows", lambda config, name: [dict(row) for row in rows])
    for flags, judge in ((["--dataset", "math"], "math_equal"), ([], "correctness")):
        assert evaluation.data_config(evaluate.parse_args(flags, "evaluate")).judge_in_force == judge
        assert DataConfig(dataset="math" if flags else None).judge_in_force == judge
    flags = ["--model_path", model_folder, "--dataset", "math", "--max_new_tokens", "2", "--system_message="]
    evaluate.main([*flags, "--output_file", "m.jsonl"])
    assert "Judge: math_equal" in capsys.readouterr().out
    settings = json.loads(Path("m.summary.json").read_text())["settings"]
    assert (settings["judge"], settings["votes_by"], settings["rewards"]) == (
        "math_equal",
        "math_equal",
        ["math_equal", "format"],
    )
    assert [c.answer for c in read("m.jsonl")] == [r"\frac{1}{2}", "2"]
    with pytest.raises(ValueError, match="judge='correctness': .*was written with 'math_equal'"):
        evaluate.main([*flags, "--output_file", "m.jsonl", "--judge", "correctness"])


def test_a_question_without_an_answer_needs_a_judge_that_needs_none(command, rows_file):
    rows_file.write_text('{"question": "1 + 1?", "answer": 2}\n{"question": "Why?"}\n')
    with pytest.raises(ValueError, match="row 2: no answer.*'correctness_reward' takes 'answer'"):
        command()
    command("--judge", "test_evaluate_rewards.length_is_even", "--rewards", "format", "--output_file", "r.jsonl")
    assert [c.answer for c in read("r.jsonl")] == ["2", ""]


def test_votes_of_a_judge_that_takes_no_answer_are_equal_where_answers_are():
    assert evaluation.vote_of("72") == evaluation.vote_of(" $72.00 ") == "72"
    assert evaluation.vote_of("New  York") == evaluation.vote_of("new york") != evaluation.vote_of("York")
    assert evaluation.vote_of(None) is evaluation.vote_of(" ") is None


def test_judging_a_batch():
    rows = [
        {"question": "6 x 12?", "answer": "72", "prompt": "6 x 12?"},
        {"question": "?", "answer": "9", "prompt": "?"},
    ]
    texts = [["<reasoning>r</reasoning><answer>72</answer>", "<answer>70</answer>"], ["9", "<answer>x</answer>"]]
    batch = evaluation.judge_batch(
        rows, [3, 8], texts, [[[0] * 5, [0] * 6], [[0] * 7, [0] * 8]], "correctness", ["explanation_quality"]
    )
    assert [(c.row_number, c.pass_number, c.length) for c in batch] == [(3, 1, 5), (3, 2, 6), (8, 1, 7), (8, 2, 8)]
    assert [c.right for c in batch] == [True, False, False, False]
    assert [c.partially_right for c in batch] == [True, True, False, False]
    assert [c.well_formed for c in batch] == [True, False, False, False]
    assert [c.extracted_answer for c in batch] == ["72", "70", None, "x"]
    assert all(set(c.rewards) == {"explanation_quality"} for c in batch)


# ---- the script ----


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in tiny.arithmetic_rows("test", 7)))
    return path


@pytest.fixture
def command(model_folder, rows_file, tmp_path, monkeypatch):
    """`command(*flags)` runs evaluate.py in this process on seven questions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_evaluate_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*flags, model=model_folder, data=rows_file):
        flags = ["--model_path", model, "--data_path", data, "--system_message", "", "--max_new_tokens", "8", *flags]
        evaluate.main([str(flag) for flag in flags])

    return run


def read(path):
    return [JudgedCompletion(**json.loads(line)) for line in Path(path).read_text().splitlines()]


def test_what_is_written_and_printed(command, tmp_path, capsys):
    functions = ["test_evaluate_rewards.length_is_even", "test_evaluate_rewards.first_only", "correctness"]
    command(*SAMPLED, "--output_file", "r.jsonl", "--rewards", *functions, "--judge", functions[0])
    completions = read("r.jsonl")
    assert [(c.row_number, c.pass_number) for c in completions] == [(n, i) for n in range(1, 8) for i in (1, 2)]
    rows = tiny.arithmetic_rows("test", 7)
    assert [(c.question, c.answer) for c in completions[::2]] == [(row["question"], row["answer"]) for row in rows]
    assert all(c.right == (len(c.completion) % 2 == 0) == bool(c.rewards[functions[0]]) for c in completions)
    assert any(c.right for c in completions) and not all(c.right for c in completions)
    assert {c.rewards[functions[1]] for c in completions} == {1.0, None}
    assert any(a.completion != b.completion for a, b in zip(completions[::2], completions[1::2], strict=True))
    assert all(1 <= c.length <= 8 for c in completions)
    summary = json.loads((tmp_path / "r.summary.json").read_text())
    assert summary["metrics"] == summarize(completions) and summary["num_questions_done"] == 7
    expected = {"temperature": 0.85, "top_k": 2000, "top_p": 1.0, "num_passes": 2, "seed": 42, "device": "cpu"}
    assert expected.items() <= summary["settings"].items()
    output = capsys.readouterr().out
    for line in (f"correct {sum(c.right for c in completions)} of 14", "accuracy", "pass@2", "mean@2", "maj@2"):
        assert line in " ".join(output.split()), output
    assert {path.name for path in tmp_path.iterdir()} >= {"r.jsonl", "r.summary.json"}
    assert not list(tmp_path.glob("*.unfinished"))


def test_without_an_output_file_nothing_is_written(command, tmp_path, capsys):
    before = sorted(path.name for path in tmp_path.iterdir())
    command("--max_samples", "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "2 questions" in capsys.readouterr().out


def test_without_data_the_tiny_models_held_out_arithmetic_is_asked(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model_path", model_folder, "--max_samples", "3", "--max_new_tokens", "2", "--output_file", "r.jsonl"]
    evaluate.main(flags)
    assert [c.question for c in read("r.jsonl")] == [row["question"] for row in tiny.arithmetic_rows("test", 3)]


def test_columns_may_have_other_names(command, rows_file):
    rows_file.write_text('{"q": "1 + 1?", "a": "2"}')
    command("--question_column", "q", "--answer_column", "a", "--output_file", "r.jsonl")
    assert [(c.question, c.answer) for c in read("r.jsonl")] == [("1 + 1?", "2")]


def test_columns_of_no_data_are_refused(model_folder):
    with pytest.raises(ValueError, match="question_column='q': of what"):
        evaluate.main(["--model_path", model_folder, "--question_column", "q"])


@pytest.mark.parametrize("name", ["greedy", "standard", "liberal"])
def test_presets_are_those_of_agent_tunix_and_flags_win(name):
    expected = {"greedy": (1e-4, 1, 1.0), "standard": (0.7, 50, 0.95), "liberal": (0.85, 2000, 1.0)}[name]
    args = evaluate.parse_args(["--preset", name], "evaluate")
    assert (args.temperature, args.top_k, args.top_p) == expected
    args = evaluate.parse_args(["--preset", name, "--temperature", "0.5", "--top_k", "0"], "evaluate")
    assert (args.temperature, args.top_k, args.top_p) == (0.5, 0, expected[2])


def sample_all(folder, params, rows=5, **settings):
    tokenizer, model = load_tokenizer(folder), load_model(folder).eval()
    sampler = Sampler(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id)
    rows = prepare_rows(tiny.arithmetic_rows("test", rows), tokenizer, 64)
    settings = {"batch_size": 4} | settings
    return sample_texts(sampler, tokenizer, rows, params, Collator(tokenizer.pad_token_id, 64), **settings)


@pytest.mark.parametrize("flags", [["--temperature", "0.8"], ["--top_p", "0.9"]])
def test_who_gives_a_temperature_gets_variety(flags):
    params = evaluation.sampling_params(evaluate.parse_args(flags, "evaluate"))
    assert params.temperature > 0 and params.top_k == 0
    assert evaluation.sampling_params(evaluate.parse_args([*flags, "--top_k", "1"], "evaluate")).temperature == 0


def test_the_greedy_preset_takes_the_likeliest_token(model_folder):
    args = evaluate.parse_args(["--max_new_tokens", "8"], "evaluate")
    literally = SamplingParams(8, args.temperature, args.top_k, args.top_p)
    taken = sample_all(model_folder, evaluation.sampling_params(args))
    assert taken == sample_all(model_folder, SamplingParams(8, temperature=0.0)) == sample_all(model_folder, literally)


def test_a_group_larger_than_a_batch_is_drawn_in_several_goes_with_the_same_result(model_folder):
    params = SamplingParams(8)
    whole = sample_all(model_folder, params, rows=2, batch_size=8, num_completions=5)
    assert sample_all(model_folder, params, rows=2, batch_size=2, num_completions=5) == whole
    assert [len(texts) for texts in whole[0]] == [5, 5]


def test_whoever_watches_is_told_which_answers_are_counted(model_folder):
    class Watcher:
        told = []

        def advanced(self, what, done, total, how=""):
            if what == phases.QUESTIONS:
                self.told.append((done, total, how))

    phases.watch(Watcher())
    try:
        sample_all(model_folder, SamplingParams(2, temperature=0.0), rows=5)
        sample_all(model_folder, SamplingParams(2), rows=3, num_completions=2)
    finally:
        phases.watch(None)
    greedy, sampled = [(done, 5, "greedy") for done in (0, 4, 5)], [(done, 3, "x 2 samples") for done in (0, 2, 3)]
    assert Watcher.told == greedy + sampled


def test_batches_can_start_later(model_folder):
    tokenizer, model = load_tokenizer(model_folder), load_model(model_folder).eval()
    sampler = Sampler(model, eos_token_ids(model, tokenizer), tokenizer.pad_token_id)
    rows = prepare_rows(tiny.arithmetic_rows("test", 5), tokenizer, 64)
    job = (sampler, tokenizer, rows, SamplingParams(8), Collator(tokenizer.pad_token_id, 64), 4, 2)
    assert list(sample_batches(*job, start=2)) == list(sample_batches(*job))[1:]


def test_a_progress_bar_stands_on_a_terminal(command, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    command("--max_samples", "2")
    assert "2/2" in sys.stderr.getvalue() and "accuracy 0.0%" in sys.stderr.getvalue()


# ---- interruptions ----


@pytest.fixture
def finished(command, tmp_path):
    """The files of completions and summary, as bytes, of an evaluation that nothing interrupted."""
    command(*SAMPLED, "--output_file", "whole.jsonl")
    return (tmp_path / "whole.jsonl").read_bytes(), (tmp_path / "whole.summary.json").read_bytes()


def count_samplings(monkeypatch):
    calls = []
    sample = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *args: calls.append(1) or sample(*args))
    return calls


def test_a_killed_evaluation_continues_where_it_stopped(command, finished, tmp_path, monkeypatch):
    shutil.copy("whole.summary.json", "r.summary.json")
    lines = finished[0].splitlines(keepends=True)
    calls = count_samplings(monkeypatch)
    for num_lines, rest, num_sampled in ((8, b"", 2), (8, lines[8][:20], 2), (11, b"", 2), (0, b"", 4), (13, b"{", 1)):
        Path("r.jsonl").write_bytes(b"".join(lines[:num_lines]) + rest)
        calls.clear()
        command(*SAMPLED, "--output_file", "r.jsonl")
        assert (Path("r.jsonl").read_bytes(), Path("r.summary.json").read_bytes()) == finished
        assert len(calls) == num_sampled, num_lines


def test_other_batches_may_finish_what_is_begun(command, finished):
    shutil.copy("whole.summary.json", "r.summary.json")
    Path("r.jsonl").write_bytes(b"".join(finished[0].splitlines(keepends=True)[:8]))
    command(*SAMPLED, "--batch_size", "6", "--output_file", "r.jsonl")
    assert Path("r.jsonl").read_bytes() == finished[0]


def test_a_finished_file_is_left_alone_and_its_metrics_shown_again(command, finished, monkeypatch, capsys):
    calls, written = count_samplings(monkeypatch), os.stat("whole.jsonl").st_mtime_ns
    command(*SAMPLED, "--output_file", "whole.jsonl")
    assert not calls and os.stat("whole.jsonl").st_mtime_ns == written
    assert Path("whole.summary.json").read_bytes() == finished[1]
    assert evaluation.format_metrics(json.loads(finished[1])["metrics"]) in capsys.readouterr().out


def test_ctrl_c_between_batches_sums_up_what_is_done(command, finished, monkeypatch, capsys):
    capsys.readouterr()
    judge, calls = evaluation.judge_batch, []

    def judge_twice(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(*args)

    monkeypatch.setattr(evaluation, "judge_batch", judge_twice)
    with pytest.raises(KeyboardInterrupt):
        command(*SAMPLED, "--output_file", "r.jsonl")
    printed = capsys.readouterr()
    assert "stopped after 4 of 7 questions" in printed.err and "--output_file r.jsonl" in printed.err
    assert "of 8" in printed.out and "pass@2" in printed.out
    assert json.loads(Path("r.summary.json").read_text())["num_questions_done"] == 4
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        command(*SAMPLED)
    printed = capsys.readouterr()
    assert "stopped after 4 of 7 questions" in printed.err and "continues" not in printed.err and "of 8" in printed.out
    monkeypatch.undo()


def test_ctrl_c_then_the_same_command_equals_an_uninterrupted_run(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model_path", model_folder, "--max_samples", "48", "--max_new_tokens", "24", "--seed", "1", *SAMPLED]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "evaluate.py"), *flags, "--output_file", "r.jsonl"],
        env={**os.environ, "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    try:
        for _ in range(6000):  # wait for the second batch, so that the first counts as done
            if (Path("r.jsonl").exists() and Path("r.jsonl").read_text().count("\n") > 4) or process.poll() is not None:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert "of 48 questions" in stderr and "evaluate.py --model_path" in stderr and "mean@2" in stdout, stderr
    assert 0 < len(read("r.jsonl")) < 96
    for name in ("r", "whole"):
        evaluate.main([*flags, "--output_file", f"{name}.jsonl"])
    assert Path("r.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert Path("r.summary.json").read_bytes() == Path("whole.summary.json").read_bytes()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature", "0.5"], "temperature=0.5: .*whole.jsonl was written with 0.85"),
        (["--seed", "7"], "seed=7: .*written with 42"),
        (["--max_samples", "3"], "max_samples=3"),
        (["--max_new_tokens", "9"], "max_new_tokens=9"),
        (["--rewards", "format"], "rewards="),
        (["--judge", "format"], "judge='format'"),
        (["--system_message", "Think."], "system_message='Think.'"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_left_alone(flags, words, command, finished):
    with pytest.raises(ValueError, match=words):
        command(*SAMPLED, "--output_file", "whole.jsonl", *flags)
    assert (Path("whole.jsonl").read_bytes(), Path("whole.summary.json").read_bytes()) == finished


def test_a_file_of_other_questions_or_weights_is_refused(command, finished, model_folder, rows_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    command(*SAMPLED, "--output_file", "o.jsonl", model=other)
    model = load_model(str(other))
    with torch.no_grad():
        next(model.parameters()).mul_(2.0)
    model.save_pretrained(other)
    with pytest.raises(ValueError, match="weights_sha256"):
        command(*SAMPLED, "--output_file", "o.jsonl", model=other)
    rows_file.write_text(rows_file.read_text().replace("?", "!"))
    with pytest.raises(ValueError, match="questions_sha256"):
        command(*SAMPLED, "--output_file", "whole.jsonl")


def test_a_file_of_something_else_is_refused(command, finished):
    Path("r.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        command("--output_file", "r.jsonl")
    Path("r.summary.json").write_text("[]")
    with pytest.raises(ValueError, match="no summary of an evaluation"):
        command("--output_file", "r.jsonl")
    shutil.copy("whole.summary.json", "r.summary.json")
    with pytest.raises(ValueError, match="line 1: not a judged completion"):
        command(*SAMPLED, "--output_file", "r.jsonl")
    assert Path("r.jsonl").read_text() == "mine\n"
    Path("r.jsonl").write_bytes(finished[0] + finished[0].splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match="line 15: row 1, pass 1 is out of order"):
        command(*SAMPLED, "--output_file", "r.jsonl")


# ---- models ----


def test_a_model_an_adapter_a_checkpoint_and_a_merged_model(model_folder, rows_file, command, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    model, tokenizer = add_nontrivial_lora(load_model(model_folder)), load_tokenizer(model_folder)
    for folder in (run, run / "checkpoint-2"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (run / "config.json").write_text(json.dumps({"system_message": "Think."}))
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    greedy = {}
    for name, folder in (("base", model_folder), ("run", run), ("2", run / "checkpoint-2"), ("merged", merged)):
        command("--max_new_tokens", "16", "--output_file", f"{name}.jsonl", model=folder)
        greedy[name] = [c.completion for c in read(f"{name}.jsonl")]
    assert greedy["run"] == greedy["2"] == greedy["merged"] != greedy["base"]

    flags = ["--model_path", str(run / "checkpoint-2"), "--data_path", str(rows_file), "--max_new_tokens", "2"]
    evaluate.main([*flags, "--output_file", "instructed.jsonl"])
    settings = json.loads(Path("instructed.summary.json").read_text())["settings"]
    assert settings["system_message"] == "Think.", "that of the training run"


def test_the_newest_run_is_the_default_and_named_in_the_command_that_continues(
    model_folder, rows_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    add_nontrivial_lora(load_model(model_folder)).save_pretrained(tmp_path / "outputs" / "mine")
    load_tokenizer(model_folder).save_pretrained(tmp_path / "outputs" / "mine")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "judge_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(["--data_path", str(rows_file), "--max_new_tokens", "2", "--output_file", "r.jsonl"])
    printed = capsys.readouterr()
    assert "Model: outputs/mine" in printed.out and "stopped after 0 of 7" in printed.err
    assert "--output_file r.jsonl --model_path outputs/mine" in printed.err


def test_long_prompts_are_left_out_and_rows_keep_their_numbers(command, rows_file, capsys):
    rows = tiny.arithmetic_rows("test", 4)
    rows[1]["question"] = "word " * 40
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("--max_prompt_length", "60", "--output_file", "r.jsonl")
    assert [c.row_number for c in read("r.jsonl")] == [1, 3, 4]
    assert "1 of 4 questions are left out" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_prompt_length=2: every prompt is longer"):
        command("--max_prompt_length", "2")


# ---- wrong input ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model_path", "./nowhere"], "^model_path='./nowhere': no such folder"),
        (["--data_path", "missing.jsonl"], "missing.jsonl"),
        (["--num_passes", "0"], "num_passes=0: must be at least 1"),
        (["--max_samples", "0"], "max_samples=0"),
        (["--batch_size", "-1"], "batch_size=-1"),
        (["--temperature", "-0.1"], "temperature=-0.1"),
        (["--top_p", "1.5"], r"top_p=1.5: must be in \(0, 1\]"),
        (["--top_k", "-1"], "top_k=-1"),
        (["--temperature", "nan"], "temperature=nan"),
        (["--temperature", "inf"], "temperature=inf: must be finite"),
        (["--reward_timeout", "nan"], "reward_timeout=nan"),
        (["--rewards", "formt"], "formt.*did you mean 'format'"),
        (["--judge", "corectness"], "corectness.*did you mean 'correctness'"),
        (["--dataset", "gsm9k"], "dataset='gsm9k'"),
        (["--output_file", "no/such/folder.jsonl"], "folder does not exist"),
        (["--output_file", "."], "expected a file"),
    ],
)
def test_wrong_input_is_refused(flags, words, command):
    with pytest.raises(ValueError, match=words):
        command(*flags)


def test_flags_that_do_not_parse_are_refused():
    for flags in (["--preset", "wild"], ["--num_passes", "many"], ["--nonsense"]):
        with pytest.raises(ValueError, match=flags[0]):
            evaluate.parse_args(flags, "evaluate")
