"""Each finding of the diagnosis comes for a run that shows it and for no other; a run that learns has none."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments
from written_runs import completion, healthy_rows, with_values, write_run

from tunix_torch.cli.command import main
from tunix_torch.report.diagnosis import diagnose
from tunix_torch.report.looked_for import curves_not_there, looked_for
from tunix_torch.report.record import RunRecord, read_run
from tunix_torch.run.callbacks import FindingsSoFar


def findings(rows, completions=()):
    return {finding.name: finding for finding in diagnose(RunRecord(None, rows, completions=list(completions)))}


def test_a_run_that_learns_has_none():
    for seed in range(20):
        assert findings(healthy_rows(seed=seed)) == {}


# What is changed of a run that learns, as functions of the share of steps that are done; and what is then found.
SHOWN = {
    "nothing to learn from": {"frac_reward_zero_std": lambda done: 0.95},
    "cut-off completions": {"completions__clipped_ratio": lambda done: 0.6 * done},
    "KL running away": {"kl": lambda done: 2 * done**3},
    "collapse": {"entropy": lambda done: 0.4 if done < 0.6 else 0.0005},
    "format learned, answers not": {
        "rewards__format_reward__mean": lambda done: min(1.0, 0.3 + done),
        "rewards__correctness_reward__mean": lambda done: 0.1 + 0.02 * done,
    },
    "learning rate too high": {"reward": lambda done: 1.0 + done if done < 0.5 else 1.05},
    "reward hacking suspected": {
        "eval_accuracy": lambda done: 0.7 - 0.4 * done,
        "eval_interval__accuracy_low": lambda done: 0.65 - 0.4 * done,
        "eval_interval__accuracy_high": lambda done: 0.75 - 0.4 * done,
    },
}
SHOWN["no progress"] = {
    "reward": lambda done: 1.4 + 0.1 * math.sin(90 * done),
    "eval_accuracy": lambda done: 0.5 + 0.02 * done,
    "eval_interval__accuracy_low": lambda done: 0.44 + 0.02 * done,
    "eval_interval__accuracy_high": lambda done: 0.56 + 0.02 * done,
}
# The same numbers a little less far: below the bounds.
NOT_SHOWN = {
    "nothing to learn from": {"frac_reward_zero_std": lambda done: 0.85},
    "cut-off completions": {"completions__clipped_ratio": lambda done: 0.2},
    "KL running away": {"kl": lambda done: 0.4 * done},
    "collapse": {"entropy": lambda done: 0.4 if done < 0.6 else 0.003},
    "format learned, answers not": {
        "rewards__format_reward__mean": lambda done: min(1.0, 0.3 + done),
        "rewards__correctness_reward__mean": lambda done: 0.1 + 0.3 * done,
    },
    "learning rate too high": {"reward": lambda done: 1.0 + done if done < 0.5 else 1.4},
    "reward hacking suspected": {  # within the interval
        "eval_accuracy": lambda done: 0.7 - 0.05 * done,
        "eval_interval__accuracy_low": lambda done: 0.65 - 0.05 * done,
        "eval_interval__accuracy_high": lambda done: 0.75 - 0.05 * done,
    },
}


FLAT = {"reward": SHOWN["no progress"]["reward"]}
PROGRESS = {
    "held-out answers are right more often": FLAT,
    "most questions are solved": SHOWN["no progress"] | {"frac_reward_zero_std": lambda done: 0.7},
    "the reward rises a little": SHOWN["no progress"] | {"reward": lambda done: FLAT["reward"](done) + 0.2 * done},
}


@pytest.mark.parametrize("what", PROGRESS)
def test_a_run_that_has_come_on_or_has_nothing_left_is_not_said_to_stand_still(what):
    assert findings(with_values(healthy_rows(), **PROGRESS[what])) == {}
    assert list(findings(with_values(healthy_rows(steps=29), **SHOWN["no progress"]))) == [], "too few logs"


def test_questions_of_which_hardly_one_is_right_are_not_taken_for_solved():
    wrong = {"eval_accuracy": 0.02, "eval_interval__accuracy_low": 0.005, "eval_interval__accuracy_high": 0.05}
    never = {key: lambda done, share=share: share for key, share in wrong.items()}
    rows = with_values(healthy_rows(), **FLAT, **never, frac_reward_zero_std=lambda done: 0.55)
    (finding,) = findings(rows).values()
    assert finding.name == "no progress" and "may hardly have moved" in finding.shows


@pytest.mark.parametrize("name", SHOWN)
def test_what_a_run_shows_is_named_alone_with_its_lines_and_what_to_try(name):
    rows = with_values(healthy_rows(), **SHOWN[name])
    found = findings(rows)
    assert list(found) == [name]
    assert found[name].shows and found[name].tries
    logged = {(row["step"], key) for row in rows for key in row}
    assert found[name].lines and all((line.step, line.key) in logged for line in found[name].lines)


def test_a_policy_that_writes_one_thing_is_not_said_to_have_solved_its_questions():
    equal = {"frac_reward_zero_std": lambda done: 0.95, "reward": lambda done: min(2.0, 0.5 + 2 * done)}
    solved = findings(with_values(healthy_rows(), **equal))["nothing to learn from"]
    assert "probably solved" in solved.shows
    found = findings(with_values(healthy_rows(), **equal, **SHOWN["collapse"]))
    assert list(found)[-2:] == ["collapse", "nothing to learn from"], "the finding before is the one that explains it"
    assert "alike" in found["nothing to learn from"].shows and "solved" not in found["nothing to learn from"].shows


@pytest.mark.parametrize("name", NOT_SHOWN)
def test_what_a_run_does_not_show_is_not_named(name):
    assert findings(with_values(healthy_rows(), **NOT_SHOWN[name])) == {}


def test_lines_hold_the_values_that_were_logged():
    rows = with_values(healthy_rows(), **SHOWN["KL running away"])
    (finding,) = findings(rows).values()
    by_step = {row["step"]: row for row in rows if "kl" in row}
    assert all(by_step[line.step]["kl"] == line.value for line in finding.lines)


def test_skipped_steps_and_jumps_of_the_kl_say_that_the_rate_is_too_high():
    rows = healthy_rows()
    one = [row | {"skipped_steps": 1} if "kl" in row else row for row in rows]
    assert findings(one) == {}
    two = [row | {"skipped_steps": 1 + (row["step"] > 30)} if "kl" in row else row for row in rows]
    (finding,) = findings(two).values()
    assert finding.name == "learning rate too high" and "2 steps were skipped" in finding.shows

    def jumping(times):
        return [row | {"kl": 0.9} if row["step"] in times and "kl" in row else row for row in rows]

    assert findings(jumping({15, 25})) == {}
    (finding,) = findings(jumping({15, 25, 35})).values()
    assert finding.name == "learning rate too high" and [line.step for line in finding.lines] == [15, 25, 35]


FIRST = 0.02  # of a run of 60 steps, the evaluation at its start and the first step
# A learning rate of 0.2, with which the default job lost its reward in the second step.
BROKEN = {
    "reward": lambda done: 1.25 if done < FIRST else 0.06 + 0.02 * math.sin(90 * done),
    "completions__clipped_ratio": lambda done: 0.0 if done < FIRST else 0.97,
    "eval_accuracy": lambda done: 0.44 if done < FIRST else 0.0,
    "eval_interval__accuracy_low": lambda done: 0.38 if done < FIRST else 0.0,
    "eval_interval__accuracy_high": lambda done: 0.5 if done < FIRST else 0.015,
}


def test_a_reward_that_is_lost_at_once_says_that_the_rate_is_too_high():
    """That completions no longer end follows from it, and more room for them would not help."""
    found = findings(with_values(healthy_rows(), **BROKEN))
    assert list(found)[0] == "learning rate too high" and "1.25" in found["learning rate too high"].shows
    assert found["cut-off completions"].tries == ("what the finding says that explains it: learning rate too high",)
    kept = {name: value for name, value in BROKEN.items() if name.startswith("eval")}
    unharmed = with_values(healthy_rows(), **BROKEN | dict.fromkeys(kept, lambda done: 0.44))
    assert "learning rate too high" not in findings(unharmed), "the answers are as right as before"
    lucky = {"reward": lambda done: 1.25 if done < FIRST else 0.8 + 0.2 * math.sin(90 * done)}
    noisy = [row for row in with_values(healthy_rows(), **lucky) if "eval_runtime" not in row]
    assert "learning rate too high" not in findings(noisy), "the first batch was lucky"


def test_without_evaluations_a_first_reward_that_may_be_chance_is_no_reward_lost_at_once():
    def found(first, then, deviation):
        shown = {"reward": lambda done: first if done < FIRST else then, "reward_std": lambda done: deviation}
        rows = with_values(healthy_rows(), **shown)
        return "learning rate too high" in findings([row for row in rows if "eval_runtime" not in row])

    assert found(1.25, 0.0, deviation=0.4), "each completion earned something before"
    assert not found(0.0625, 0.0, deviation=0.24), "one of sixteen completions was right"
    assert not found(0.51, 0.5, deviation=0.0)


def test_what_explains_that_completions_are_cut_off_is_named_whatever_stands_between():
    rows = with_values(healthy_rows(), **BROKEN, **SHOWN["KL running away"], **SHOWN["nothing to learn from"])
    found = findings(rows)
    assert list(found)[0] == "learning rate too high" and list(found)[-2] == "nothing to learn from"
    assert "another finding: learning rate too high" in found["cut-off completions"].shows


def test_empty_completions_are_a_collapse():
    rows = with_values(healthy_rows(), completions__mean_length=lambda done: 22.0 if done < 0.5 else 1.0)
    assert list(findings(rows)) == ["collapse"]


def test_rewards_that_rise_while_right_answers_fall_are_suspect_without_evaluations_too():
    rows = [row for row in healthy_rows() if "eval_runtime" not in row]
    assert findings(rows) == {}
    falling = with_values(
        rows, reward=lambda done: 1.0 + done, rewards__correctness_reward__mean=lambda done: 0.6 - 0.3 * done
    )
    assert "reward hacking suspected" in findings(falling)


def test_an_accuracy_without_intervals_must_fall_by_more_than_five_points():
    def falling(by):
        rows = [{k: v for k, v in row.items() if "interval" not in k} for row in healthy_rows()]
        return findings(with_values(rows, eval_accuracy=lambda done: 0.7 - by * done))

    assert falling(0.04) == {} and list(falling(0.06)) == ["reward hacking suspected"]


def kept(texts_by_step):
    """Completions to 16 questions of each step."""
    from tunix_torch.report.completions import Completion

    rows = [completion(s, i, text(i), prompt=f"question {i}") for s, text in texts_by_step.items() for i in range(16)]
    return [
        Completion(
            r["step"], r["prompt_index"], r["prompt"], r["answer"], r["completion"], {}, r["reward"], r["length"]
        )
        for r in rows
    ]


def test_the_same_text_for_every_question_is_repetition():
    rows = healthy_rows()
    assert findings(rows, kept({1: lambda i: f"answer {i}", 60: lambda i: f"other {i}"})) == {}
    assert findings(rows, kept({1: lambda i: "B", 60: lambda i: "B"})) == {}, "alike by nature, from the start"
    (finding,) = findings(rows, kept({1: lambda i: f"answer {i}", 60: lambda i: "I can't know."})).values()
    assert finding.name == "repetition" and "100%" in finding.shows


def test_a_text_that_repeats_itself_is_repetition_and_prose_is_not():
    prose = (
        "To find how many apples are left, we first count what Ann had, which is 48, and then take away the 17 that "
        "she gave to her brother. So 48 minus 17 is 31. After that she buys two bags of 6, or 12 apples, and 31 plus "
        "12 is 43. The answer is therefore 43 apples, number {}."
    )
    rows = healthy_rows()
    assert findings(rows, kept({60: lambda i: prose.format(i)})) == {}
    assert list(findings(rows, kept({60: lambda i: f"{i}: " + "so we add the two numbers. " * 20}))) == ["repetition"]


def test_a_run_of_a_few_logs_says_nothing():
    rows = with_values(healthy_rows(steps=4), frac_reward_zero_std=lambda done: 1.0, kl=lambda done: 5.0)
    assert findings(rows) == {}


def test_solved_questions_are_told_from_too_hard_ones():
    easy = with_values(healthy_rows(), frac_reward_zero_std=lambda done: 0.96, reward=lambda done: 1 + min(1, 2 * done))
    hard = with_values(
        healthy_rows(), frac_reward_zero_std=lambda done: 0.96, reward=lambda done: 0.1 + 0.1 * (done < 0.1)
    )
    assert "solved" in findings(easy)["nothing to learn from"].shows
    assert "too hard" in findings(hard)["nothing to learn from"].shows
    for constant, words, first in ((0.0, "too hard", "easier questions"), (0.3, "the same", "look at what")):
        rows = with_values(healthy_rows(), frac_reward_zero_std=lambda done: 1.0, reward=lambda done: constant)  # noqa: B023
        finding = findings(rows)["nothing to learn from"]
        assert words in finding.shows and finding.tries[0].startswith(first)
        assert any("look at what your reward functions return" in what for what in finding.tries)


def test_the_command_prints_findings_as_text_and_as_json(tmp_path, capsys):
    write_run(tmp_path / "a", with_values(healthy_rows(), **SHOWN["KL running away"]))
    main(["diagnose", str(tmp_path / "a")])
    printed = capsys.readouterr().out
    assert printed.endswith("Could not be looked for: repetition (completions: not kept).\n")
    assert printed.startswith("KL RUNNING AWAY\n") and "    step 60: kl = 2\n" in printed
    assert "    - a larger kl_penalty_coef\n" in printed
    main(["diagnose", str(tmp_path / "a"), "--json"])
    content = json.loads(capsys.readouterr().out)
    (finding,), completions = content["findings"], "repetition (completions: not kept)."
    assert content["looked_for"] == TROUBLES[:4] + TROUBLES[5:]
    assert content["could_not_be_looked_for"] == [completions]
    assert finding["name"] == "KL running away" and finding["lines"][-1] == {
        "step": 60,
        "key": "kl",
        "value": 2.0,
        "logs": 1,
    }
    write_run(tmp_path / "b", without(healthy_rows(), "kl"), {"kl_penalty_coef": 0.0})
    main(["diagnose", str(tmp_path / "b")])
    printed = capsys.readouterr().out
    assert printed.startswith("Nothing was found") and "KL that runs away" not in printed.partition("Could not")[0]
    assert "\nCould not be looked for: a KL that runs away (KL: not logged, since kl_penalty_coef is 0).\n" in printed
    write_run(tmp_path / "c", healthy_rows(steps=4))
    main(["diagnose", str(tmp_path / "c")])
    assert capsys.readouterr().out.startswith("Too early to tell: 4 logs of training steps so far")


def without(rows, *keys):
    """Rows in which these keys were not logged."""
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


TROUBLES = [
    "a learning rate that is too high (by the reward, the KL and skipped steps)",
    "a KL that runs away",
    "a reward that pays for the wrong thing",
    "a collapse",
    "repetition",
    "groups without a signal",
    "completions that are cut off",
    "a layout that is learned without the answers",
    "a reward that does not rise",
]


def test_what_was_looked_for_is_what_was_logged_and_the_rest_is_named_with_the_reason():
    texts = kept({1: lambda i: f"answer {i}"})

    def looked(rows, completions=texts, **settings):
        return looked_for(RunRecord(None, rows, settings, completions=completions))

    everything = looked(healthy_rows())
    assert list(everything.names) == TROUBLES and everything.missing == ()
    no_kl = looked(without(healthy_rows(), "kl"), use_grpo=True, kl_penalty_coef=0.0)
    by_the_reward = "a learning rate that is too high (by the reward and skipped steps)"
    assert list(no_kl.names) == [by_the_reward, *TROUBLES[2:]]
    assert no_kl.missing == ("a KL that runs away (KL: not logged, since kl_penalty_coef is 0).",)
    assert no_kl.as_lines()[-1] == f"Could not be looked for: {no_kl.missing[0]}"
    few = [row if row["step"] > 51 else {k: v for k, v in row.items() if k != "kl"} for row in healthy_rows()]
    assert looked(few).missing == ("a KL that runs away (kl: 9 logs, and this takes 10).",)
    for key, name in (
        ("reward", TROUBLES[2]),
        ("frac_reward_zero_std", TROUBLES[5]),
        ("completions/clipped_ratio", TROUBLES[6]),
        ("rewards/format_reward/mean", TROUBLES[7]),
    ):
        said = looked(without(healthy_rows(), key)).missing
        assert said[0].startswith(f"{name} ("), key
        assert [text for text in said[1:] if not text.startswith(f"{TROUBLES[8]} ({key}: not logged")] == [], key
    assert not looked(without(healthy_rows(), "entropy")).missing, "the length tells of a collapse too"
    assert looked(healthy_rows(), ()).missing == ("repetition (completions: not kept).",)
    assert looked(healthy_rows(evaluated_every=100)).missing[0].endswith("two evaluations are needed).")
    assert looked(healthy_rows(steps=4)).as_lines() == [], "too early to judge"


def test_of_supervised_fine_tuning_nothing_is_looked_for_that_only_sampling_shows():
    rows = [{"step": i, "loss": 2.0 - i / 10, "learning_rate": 1.0} for i in range(1, 9)]
    run = RunRecord(None, rows, {"use_grpo": False, "kl_penalty_coef": 0.01})
    looked = looked_for(run)
    assert looked.names == ("a learning rate that is too high (by skipped steps)",)
    assert len(looked.missing) == 8 and all("since SFT samples no completions" in text for text in looked.missing)
    assert curves_not_there(run) == ["Right answers: no evaluation was logged."]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"kl_penalty_coef": 0.0}, "since kl_penalty_coef is 0"),
        ({"use_kl_penalty": False, "kl_penalty_coef": 0.01}, "since use_kl_penalty is false"),
        ({"algorithm": "dapo", "kl_penalty_coef": 0.01}, "since the algorithm dapo has no KL penalty"),
        ({"teacher": "org/model", "kl_penalty_coef": 0.01}, "since a teacher replaces the KL penalty"),
        ({}, "not logged"),
    ],
)
def test_a_curve_of_the_kl_that_is_not_there_has_a_reason(settings, words):
    (said,) = curves_not_there(RunRecord(None, without(healthy_rows(), "kl"), settings))
    assert said.startswith("KL from the reference: not logged") and said.endswith(f"{words}.")
    assert curves_not_there(RunRecord(None, healthy_rows(), settings)) == []


def test_a_run_without_a_file_of_metrics_is_read_from_its_newest_state(tmp_path):
    """A trainer that a script has made writes none; its checkpoints hold what was logged."""
    for step in (9, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        state = {"log_history": healthy_rows(steps=step) + [{"epoch": 1.0}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(tmp_path)
    assert run.rows == healthy_rows(steps=100) and diagnose(run) == []
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": healthy_rows(steps=120)}))  # save_state()
    assert read_run(tmp_path).last_step == 120


def test_a_run_at_work_can_be_diagnosed(tmp_path):
    folder = write_run(tmp_path / "a", with_values(healthy_rows(), **SHOWN["collapse"]))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "los')  # a line that is being written
    assert [finding.name for finding in diagnose(read_run(folder))] == ["collapse"]


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda folder: (folder / "metrics.jsonl").unlink(), "holds neither a metrics.jsonl"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "holds neither a metrics.jsonl"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n{"step": 2}\n'), "line 2: expected"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"step": "1"}\n'), "line 1: expected"),
        (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\n"), "not UTF-8"),
        (lambda folder: only_a_state(folder, "{"), "trainer_state.json: not the state of a trainer"),
        (lambda folder: only_a_state(folder, "[]"), "trainer_state.json: not the state of a trainer"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: (folder / "starts.jsonl").write_text("[]\n"), "starts.jsonl, line 1"),
        (lambda folder: (folder / "crosscheck.json").write_text('{"rows": [1]}'), "crosscheck.json: not the table"),
        (lambda folder: (folder / "completions" / "completions_00001.parquet").write_bytes(b"PAR1"), "not what a run"),
        (lambda folder: write_columns(folder), "the column prompt is missing"),
    ],
)
@pytest.mark.parametrize("command", ["diagnose", "report"])
def test_what_is_damaged_is_one_line_and_exit_code_2(command, harm, words, tmp_path, capsys):
    folder = write_run(tmp_path / "a", healthy_rows(steps=6), {}, [completion(1)])
    harm(folder)
    with pytest.raises(SystemExit) as end:
        main([command, str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and words in line


def only_a_state(folder, text):
    """A run that has a checkpoint and no metrics.jsonl."""
    (folder / "metrics.jsonl").unlink()
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-6" / "trainer_state.json").write_text(text)


def write_columns(folder):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{k: v for k, v in completion(1).items() if k != "prompt"}])
    pyarrow.parquet.write_table(table, folder / "completions" / "completions_00001.parquet")


def test_no_such_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for name, words in (("nowhere", "no such folder"), ("file", "a file, expected folder")):
        with pytest.raises(SystemExit) as end:
            main(["diagnose", str(tmp_path / name)])
        assert end.value.code == 2 and words in capsys.readouterr().err


def said_so_far(rows, capsys, max_steps=1000):
    """What a run of these rows prints at its evaluations and checkpoints, where the state holds the rows up to them."""
    callback, args, lines = FindingsSoFar(), TrainingArguments(output_dir="out", report_to=[]), []
    for number, row in enumerate(rows, start=1):
        state = TrainerState(log_history=rows[:number], global_step=row["step"], max_steps=max_steps)
        if "eval_accuracy" in row:
            callback.on_evaluate(args, state, TrainerControl())
        callback.on_save(args, state, TrainerControl())
        said = capsys.readouterr().out
        lines += [(row["step"], said)] if said else []
    return lines


def test_a_run_that_learns_says_nothing_of_itself_at_any_moment(capsys):
    for seed in range(5):
        assert said_so_far(healthy_rows(seed=seed), capsys) == []


@pytest.mark.parametrize("name", SHOWN)
def test_a_run_at_work_names_a_finding_once_and_before_its_end(name, capsys):
    rows = with_values(healthy_rows(), **SHOWN[name])
    lines = [line for line in said_so_far(rows, capsys) if name in line[1]]
    assert len(lines) == 1 and lines[0][0] < rows[-1]["step"]
    assert lines[0][1].startswith("Diagnosis so far: ") and "tunix_torch.diagnose out" in lines[0][1]


def test_the_last_step_is_left_to_the_end_of_the_job(capsys):
    rows = with_values(healthy_rows(), **SHOWN["KL running away"])
    callback, state = FindingsSoFar(), TrainerState(log_history=rows, global_step=100, max_steps=100)
    callback.on_save(TrainingArguments(output_dir="out", report_to=[]), state, TrainerControl())
    assert capsys.readouterr().out == ""


NUMBERS = st.one_of(st.floats(), st.integers(-3, 3), st.sampled_from([0.0, 1.0, 0.5, 1e308, -1e308]), st.none())


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from([*healthy_rows()[0], *healthy_rows()[-1], "skipped_steps"]), NUMBERS),
        max_size=60,
    )
)
def test_whatever_was_logged_the_diagnosis_does_not_end_a_run(rows):
    diagnose(RunRecord(None, [{"learning_rate": 1e-3} | row | {"step": i} for i, row in enumerate(rows)]))
