"""Plain and async reward functions get the columns that they take, run side by side, and are named when they fail."""

import asyncio
import functools
import threading
import time

import pytest

from tunix_torch import DataConfig, GRPOConfig, rewards
from tunix_torch.rewarding.scoring import call_rewards, score_completions
from tunix_torch.rewarding.workers import RewardWorkers
from tunix_torch.run.setup import choose_rewards
from tunix_torch.runtime import once

ROWS = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 2?", "answer": "4"}]
COMPLETIONS = ["2", "3", "4", "4"]


def right(prompts, completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


async def right_later(prompts, completions, answer, **columns):
    await asyncio.sleep(0.3)
    return right(prompts, completions, answer)


class Later:
    """A callable object whose call is async."""

    async def __call__(self, **arguments):
        return await right_later(**arguments)


def some(prompts, completions, **columns):
    return [None if c == "4" else 0.5 for c in completions]


def sleepy(prompts, completions, **columns):
    time.sleep(0.3)
    return [0.0] * len(completions)


def test_async_functions_say_what_plain_ones_do_in_their_own_columns():
    values = call_rewards([right_later, some, Later(), right], ROWS, COMPLETIONS)
    expected = [1.0, 0.0, 1.0, 1.0]
    assert values == [expected, [0.5, 0.5, None, None], expected, expected]


def test_async_functions_run_beside_each_other_and_beside_plain_ones():
    meeting = threading.Barrier(3)  # one that runs alone waits until it fails

    def meet(completions, **columns):
        meeting.wait(timeout=60)
        return [0.0] * len(completions)

    async def meet_later(completions, **columns):
        return meet(completions)

    async def meet_later_too(completions, **columns):
        return meet(completions)

    call_rewards([meet_later, meet, meet_later_too], ROWS, COMPLETIONS)


def test_async_functions_work_where_an_event_loop_runs_already():
    async def notebook():
        return call_rewards([right_later], ROWS, COMPLETIONS)

    assert asyncio.run(notebook()) == [[1.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("slow", [right_later, Later(), sleepy])
def test_a_function_over_the_time_is_named(slow):
    with pytest.raises(ValueError, match=r"reward_timeout=0.1: '(right_later|Later|sleepy)'"):
        call_rewards([right, slow], ROWS, COMPLETIONS, timeout=0.1)
    assert call_rewards([right, slow], ROWS, COMPLETIONS, timeout=30)[0] == [1.0, 0.0, 1.0, 1.0]


def test_an_exception_passes_through_whatever_runs_the_function():
    async def broken_async(**arguments):
        raise KeyError("async")

    def broken(**arguments):
        raise TimeoutError("its own")

    with pytest.raises(KeyError, match="async"):
        call_rewards([broken_async], ROWS, COMPLETIONS)
    for timeout in (None, 30):
        with pytest.raises(TimeoutError, match="its own"):
            call_rewards([broken], ROWS, COMPLETIONS, timeout)


def test_a_plain_function_may_wrap_an_async_one():
    def wrapped(**arguments):
        return right_later(**arguments)

    for timeout in (None, 30):
        assert call_rewards([wrapped], ROWS, COMPLETIONS, timeout) == [[1.0, 0.0, 1.0, 1.0]]


def test_what_is_no_list_of_numbers_is_refused_with_the_functions_name(subtests):
    for values in (["much"] * 4, None, 1.0, [[1.0]] * 4):
        with subtests.test(values=values):

            def careless(returned=values, **arguments):
                return returned

            with pytest.raises(ValueError, match="'careless' returned .*expected numbers"):
                call_rewards([careless], ROWS, COMPLETIONS)


# ---- what a function takes ----


def only_named(completions, answer):
    return right(None, completions, answer)


def scaled(by, /, completions, answer):
    return [by * value / 2 for value in only_named(completions, answer)]


def with_default(completions, level=None):
    return [float(level is None)] * len(completions)


@functools.wraps(only_named)
def passing_on(*arguments, **columns):
    assert columns.keys() == {"completions", "answer"}
    return only_named(*arguments, **columns)


@functools.wraps(only_named)
def adding(prompts, **columns):
    assert prompts and columns.keys() == {"completions", "answer"}
    return only_named(**columns)


class Named:
    def __call__(self, completions, answer):
        return only_named(completions, answer)

    async def later(self, completions, answer):
        return only_named(completions, answer)


@pytest.mark.parametrize("workers", [None, 1])
def test_a_function_gets_the_columns_that_it_names(workers):
    functions = [only_named, functools.partial(scaled, 2.0), Named(), Named().later]
    if workers is None:
        functions += [passing_on, adding]  # workers can't import wrapped functions by name
    else:
        workers = RewardWorkers(workers, functions)
    try:
        assert call_rewards(functions, ROWS, COMPLETIONS, None, workers) == [[1.0, 0.0, 1.0, 1.0]] * len(functions)
    finally:
        if workers:
            workers.close()


def test_a_parameter_with_a_default_keeps_it_where_no_row_has_such_a_column():
    assert call_rewards([with_default], ROWS, COMPLETIONS) == [[1.0] * 4]
    rows = [{**ROWS[0], "level": 1}, ROWS[1]]
    assert call_rewards([with_default], rows, COMPLETIONS) == [[0.0] * 4]


def by_level(completions, level, **columns):
    return level


def nothing():
    return []


def test_what_a_function_can_not_be_called_with_is_one_line(subtests):
    for function, rows, message in [
        (
            by_level,
            ROWS,
            "row 1: no column 'level'. The reward function 'by_level' takes 'level'; it has prompt, a",
        ),
        (by_level, [{**ROWS[0], "level": 1}, ROWS[1]], "row 2: no column 'level'"),
        (
            right,
            [ROWS[0], {"prompt": "?"}],
            "row 2: no answer. .*'right' takes 'answer'; .* give its param",
        ),
        (passing_on, [{"prompt": "?", "answers": None}], "row 1: no answer. .*'only_named' takes 'answer'"),
        (right, [{**ROWS[0], "prompts": 1}], "column 'prompts' of the data set"),
        (nothing, ROWS, "'nothing' takes neither prompts nor completions nor a column"),
        (len, ROWS, "'len' takes 'obj' by position; it is called by names"),
    ]:
        with subtests.test(function=function, rows=rows, message=message):
            with pytest.raises(ValueError, match=message):
                call_rewards([some, function], rows, COMPLETIONS)


def test_a_function_that_changes_its_columns_changes_them_for_itself_only():
    def careless(completions, answer, **columns):
        completions.clear()
        answer[0] = "9"
        return [0.0] * 4

    assert call_rewards([careless, right], ROWS, COMPLETIONS)[1] == [1.0, 0.0, 1.0, 1.0]


def test_completions_that_nobody_judges_have_no_reward_and_the_first_is_named_once(caplog, monkeypatch):
    monkeypatch.setattr(once, "_said", set())
    for _ in range(2):
        table = score_completions([some], ROWS, COMPLETIONS)
        assert table.isnan().any() and not table.isnan().all()
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("a reward of 0. The first is '4'")


def test_a_dotted_path_names_a_function(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("def my_reward(**arguments):\n    return [1.0]\nnumber = 3\n")
    (tmp_path / "broken_module.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert rewards.find_reward("my_module.my_reward")() == [1.0]
    assert rewards.find_reward("format") is rewards.format_reward
    for wrong, words in (
        ("my_module.other", "no 'other'"),
        ("my_module.number", "expected a function"),
        ("no_module.f", "no module 'no_module'"),
        ("my_module.", "expected a dotted path"),
        ("..f", "expected a dotted path"),
        (".my_module.f", "expected a dotted path"),
        (".f", "expected a dotted path"),
        ("corectness", "did you mean 'correctness'"),
    ):
        with pytest.raises(ValueError, match=words):
            rewards.find_reward(wrong)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        rewards.find_reward("broken_module.f")


@pytest.mark.parametrize("preset", rewards.PRESETS)
def test_a_preset_sets_functions_and_weights(preset, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path))
    functions = choose_rewards(DataConfig(reward_preset=preset), args)
    assert list(zip(functions, args.reward_weights, strict=True)) == rewards.get_preset(preset)
    own = GRPOConfig(output_dir=str(tmp_path), reward_weights=[2.0] * len(functions))
    choose_rewards(DataConfig(reward_preset=preset), own)
    assert own.reward_weights == [2.0] * len(functions)
    with pytest.raises(ValueError, match="reward_preset"):
        DataConfig(reward_preset=preset, reward_funcs=["format"])
