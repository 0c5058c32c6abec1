"""Time to accuracy: both trainers get the default job, clock and curves are honest, and both run a small job."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.arithmetic_job import PROMPT, ROWS_FILE, Job, make_inputs, read_job, read_rows, seed_folder, write_job
from benchmarks.curves import Point, draw, first_crossing, make_curve, ratios, summarise, table
from benchmarks.learner import Run, check_run, remember_answers
from benchmarks.time_to_accuracy import caption, make_jobs, parse_args

ROOT = Path(__file__).parent.parent.parent


def run_bench(*args, **environment):
    command = [sys.executable, "-m", "benchmarks.time_to_accuracy", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})


def curve_of(*accuracies, every=2, seconds_per_step=1.0, seed=42):
    """Return a curve of these accuracies at the start and after every `every` steps of `seconds_per_step` each."""
    steps = [(i + 1) * every for i in range(len(accuracies) - 1)]
    seconds = [(i + 1) * seconds_per_step for i in range(steps[-1])]
    measured = {str(step): value for step, value in zip(steps, accuracies[1:], strict=True)}
    return make_curve(seed, seconds, 5.0, accuracies[0], measured)


# ---- the work ----


def test_the_job_is_the_embedded_default(tmp_path):
    from benchmarks.learner_ours import settings
    from tunix_torch.config.flags import parse_job

    model, data, default = parse_job(["--use_grpo", "--num_completions_per_prompt", "4"])
    ours, theirs = settings(Job(), tmp_path).to_dict(), default.to_dict()
    different = {name for name in theirs if ours[name] != theirs[name]}
    beside_training = {"output_dir", "logging_dir", "logging_strategy", "save_strategy", "save_steps", "report_to"}
    beside_training |= {"disable_tqdm", "per_device_eval_batch_size"}
    beside_training |= {name for name in theirs if name.startswith("eval_")} | {"num_eval_completions", "do_eval"}
    assert different - beside_training == {"train_sampling_strategy"}  # so that TRL takes rows in the same order
    assert (Job().lora_rank, Job().lora_alpha) == (model.lora_rank, model.lora_alpha) and model.lora_dropout == 0
    assert Job().num_questions == data.num_eval_rows
    # None stands for the rewards correctness and format, with weight 1 each.
    assert data.reward_funcs is data.reward_preset is default.reward_weights is None


def test_trl_gets_the_same_settings_and_one_optimizer_step_a_rollout(tmp_path):
    pytest.importorskip("trl")
    from benchmarks import learner_ours, learner_trl

    job = replace(Job(), trl_rows=16, seed=3)
    ours, trl = learner_ours.settings(job, tmp_path), learner_trl.settings(job, tmp_path)
    shared = "seed max_steps learning_rate lr_scheduler_type warmup_steps max_grad_norm weight_decay adam_beta1 "
    shared += "adam_beta2 adam_epsilon num_iterations epsilon beta"
    assert not [name for name in shared.split() if getattr(ours, name) != getattr(trl, name)]
    assert trl.optim.startswith("adamw_torch") and ours.optim == "adamw_torch"
    assert (trl.temperature, trl.top_p, trl.top_k) == (
        ours.generation_temperature,
        ours.generation_top_p,
        ours.generation_top_k,
    )
    assert trl.max_completion_length == ours.generation_max_length
    assert trl.num_generations == ours.num_completions_per_prompt
    assert trl.generation_batch_size == 128 == trl.per_device_train_batch_size * trl.gradient_accumulation_steps
    assert trl.steps_per_generation == trl.gradient_accumulation_steps


def test_inputs_are_those_of_train_py_and_trl_tokenises_prompts_as_ours_does(cache, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from tunix_torch import DataConfig, GRPOConfig
    from tunix_torch.data.prompts import prepare_rows
    from tunix_torch.data.rows import PROMPT_IDS
    from tunix_torch.data.sources import load_data

    monkeypatch.setenv("TUNIX_CACHE", cache)
    folder = seed_folder(tmp_path, 7)
    folder.mkdir()
    job = replace(Job(), seed=7)
    write_job(job, folder)
    assert read_job(folder) == job
    make_inputs([job], tmp_path)
    rows, tokenizer = read_rows(folder), AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = load_data(DataConfig(), 7)[0]
    assert [(row["question"], row["answer"]) for row in rows] == [(row["question"], row["answer"]) for row in expected]
    assert len(rows) % GRPOConfig(output_dir=str(tmp_path), batch_size=32).per_device_train_batch_size == 0
    ours = prepare_rows(rows[:50], tokenizer, job.prompt_length, overlong="raise")
    theirs = tokenizer(text=[row[PROMPT] for row in rows[:50]])["input_ids"]  # TRL's GRPOTrainer calls it so
    assert [row[PROMPT_IDS] for row in ours] == theirs
    assert [row[PROMPT_IDS] for row in prepare_rows(expected[:50], tokenizer, job.prompt_length)] == theirs
    assert (tmp_path / "model" / "model.safetensors").is_file() and (folder / ROWS_FILE).is_file()


def test_adapters_are_saved_at_first_often_then_every_so_often_and_at_the_end():
    assert replace(Job(), steps=7, eval_first=0, eval_every=3).saved_steps == [3, 6, 7]
    assert replace(Job(), steps=6, eval_first=0, eval_every=3).saved_steps == [3, 6]
    assert replace(Job(), steps=2, eval_first=0, eval_every=3).saved_steps == [2]
    assert replace(Job(), steps=9, eval_first=4, eval_every=3).saved_steps == [1, 2, 3, 4, 6, 9]
    assert replace(Job(), steps=9, stop_after=3, eval_first=4, eval_every=3).saved_steps == [1, 2, 3]


def test_a_peer_that_takes_other_rows_is_noticed():
    job = replace(Job(), steps=2, num_prompts=2, num_completions=2)
    rows = [{"answer": str(i)} for i in range(3)]  # the second step begins anew after the third row
    right = [["0", "0", "1", "1"], ["2", "2", "0", "0"]]
    check_run(job, rows, Run([1.0, 2.0], 5.0, right))
    for seconds, answers in (
        ([1.0], right),
        ([1.0, 2.0], right[:1]),
        ([1.0, 2.0], [right[0], ["2", "0", "2", "0"]]),
        ([1.0, 2.0], right[::-1]),
    ):
        with pytest.raises(AssertionError):
            check_run(job, rows, Run(seconds, 5.0, answers))


def test_a_reward_that_is_listened_to_says_the_same_under_the_same_name():
    from tunix_torch.rewards import correctness_reward

    seen = []
    reward = remember_answers(correctness_reward, seen)
    completions = ["<answer>1</answer>", "<answer>3</answer>"]
    assert reward(prompts=["?", "?"], completions=completions, answer=["1", "2"], other=[0, 0]) == [1.0, 0.0]
    assert seen == [["1", "2"]] and reward.__name__ == "correctness_reward"


def test_the_clock_stands_still_while_the_adapter_is_saved(monkeypatch, tmp_path):
    import torch
    from transformers import TrainerControl

    from benchmarks import learning_clock

    now, saved = [0.0], []
    monkeypatch.setattr(learning_clock.time, "perf_counter", lambda: now[0])

    class Model(torch.nn.Linear):
        def save_pretrained(self, folder, state_dict):
            saved.append((folder.name, sorted(state_dict)))
            now[0] += 100.0

    model = Model(1, 1)
    model.bias.requires_grad_(False)
    clock = learning_clock.LearningClock(replace(Job(), stop_after=3, eval_first=0, eval_every=2), tmp_path)
    control, stops = TrainerControl(), []
    now[0] = 7.0
    clock.start()
    for seconds in (2.0, 1.0, 1.5):
        now[0] += seconds
        clock.on_step_end(None, None, control, model=model)
        stops.append(control.should_training_stop)
    assert clock.seconds == [2.0, 3.0, 4.5]  # the first has all that comes before it
    assert saved == [("step-2", ["weight"]), ("step-3", ["weight"])]
    assert stops == [False, False, True]


# ---- the figures ----


def test_the_crossing_is_the_first_measured_point_at_the_goal():
    curve = curve_of(0.6, 0.85, 0.9, 0.88, 0.95, seconds_per_step=1.5)
    assert first_crossing(curve, 0.9) == Point(4, 6.0, 0.9)
    assert first_crossing(curve, 0.94) == Point(8, 12.0, 0.95)
    assert first_crossing(curve, 0.96) is None
    assert first_crossing(curve, 0.5) == Point(0, 0.0, 0.6)


def test_points_come_in_the_order_of_steps_whatever_the_order_of_names():
    curve = make_curve(1, [float(i + 1) for i in range(10)], 0.0, 0.5, {"10": 0.9, "2": 0.6})
    assert curve.points == [Point(0, 0.0, 0.5), Point(2, 2.0, 0.6), Point(10, 10.0, 0.9)]


def test_ratios_compare_seeds_and_who_never_gets_there_takes_infinitely_long():
    fast, slow, never = curve_of(0.6, 0.9), curve_of(0.6, 0.9, seconds_per_step=3.0), curve_of(0.6, 0.7)
    assert ratios([slow, slow], [fast, slow], 0.9) == [3.0, 1.0]
    assert ratios([never, fast, never], [fast, never, never], 0.9) == [math.inf, 0.0]
    assert ratios([slow], [fast], 0.6) == []  # both begin at the goal


def test_summary_counts_who_got_there_and_says_never_as_null():
    ours = [curve_of(0.6, 0.7, 0.9, seed=42), curve_of(0.6, 0.9, 0.8, seed=1)]
    trl = [curve_of(0.6, 0.7, 0.95, seconds_per_step=3.0, seed=42), curve_of(0.6, 0.7, 0.8, seed=1)]
    summary = summarise({"ours": ours, "trl": trl}, 0.9)
    figures = summary["peers"]["ours"]
    assert figures["seconds_to_goal"] == figures["steps_to_goal"] == {"min": 2.0, "median": 3.0, "max": 4.0}
    assert figures["seconds_per_step"] == figures["first_step_seconds"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    assert (figures["runs_at_goal"], figures["final_accuracy"]["min"]) == (2, 0.8)
    assert figures["curves"]["1"] == [(0, 0.0, 0.6), (2, 2.0, 0.9), (4, 4.0, 0.8)]
    assert summary["peers"]["trl"]["seconds_to_goal"] == {"min": 12.0, "median": None, "max": None}
    assert summary["peers"]["trl"]["runs_at_goal"] == 1
    assert summary["ratios"] == {"trl": {"min": 3.0, "median": None, "max": None}}
    json.dumps(summary, allow_nan=False)


def test_table_is_markdown_and_shows_never():
    ours, trl = [curve_of(0.6, 0.9)], [curve_of(0.6, 0.7)]
    lines = table(summarise({"ours": ours, "trl": trl}, 0.9)).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| ours | 2.0 (2.0, 2.0) | 2 (2, 2) | 1 of 1 |")
    assert lines[3].startswith("| trl | never (never, never) |") and lines[3].endswith("| never (never, never) |")


def test_caption_has_command_machine_and_date():
    versions = {"torch": "2.9.1", "transformers": "5.12.1", "peft": "0.21.2", "trl": "1.16.0", "jax": "0.10.2"}
    summary = {"command": "python -m it", "date": "2026-01-31", "machine": {"processor": "8086, 2 cores"} | versions}
    text = caption(summary | {"job": {"threads": 2, "num_questions": 256}, "start_accuracy": 0.65625})
    assert text == (
        "`python -m it`, 2026-01-31, 8086, 2 cores, 2 thread(s); torch 2.9.1, transformers 5.12.1, peft 0.21.2, "
        "trl 1.16.0. Of 256 held-out questions 65.6% were right before training."
    )


@pytest.mark.parametrize("name", ["curves.png", "curves.svg"])
def test_picture_has_both_curves(name, tmp_path):
    draw({"ours": [curve_of(0.6, 0.9), curve_of(0.6, 0.7)], "trl": [curve_of(0.6, 0.7)]}, 0.9, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 5000


# ---- the command ----


def test_every_seed_is_a_job_and_flags_are_in_all_of_them():
    jobs = make_jobs(parse_args(["--seeds", "42, 1", "--steps", "5", "--threads", "1", "--trl_rows", "64"]))
    assert [job.seed for job in jobs] == [42, 1]
    assert {(job.steps, job.threads, job.trl_rows, job.eval_every) for job in jobs} == {(5, 1, 64, Job().eval_every)}


def test_mistakes_are_one_line(subtests):
    for args, message in [
        (["--seeds", "42,x"], "seeds='42,x': expected whole numbers, each once"),
        (["--seeds", "1,2,1"], "each once"),
        (["--goal", "90"], "goal=90.0: must be in (0, 1]"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        (["--stop_after", "281"], "stop_after=281: must be from 1 to steps=280"),
        (["--threads", "4096"], "threads=4096: this process may use"),
        (["--trl_rows", "48"], "trl_rows=48: must divide the 128 completions of a step"),
        (["--json", "/no/such/folder/x.json"], "expected a file in a folder that exists"),
        (["--picture", "curves.xls"], "expected a name that ends in .png, .svg, .pdf"),
        (["--num_questions", "many"], "invalid int value"),
    ]:
        with subtests.test(args=args, message=message):
            done = run_bench(*args)
            assert done.returncode == 2
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
            assert message in done.stderr


@pytest.mark.slow
def test_both_train_and_are_evaluated(cache, tmp_path):
    pytest.importorskip("trl")
    flags = {"seeds": "3,4", "stop_after": 2, "eval_first": 1, "eval_every": 2, "num_questions": 4, "threads": 1}
    flags |= {"json": tmp_path / "bench.json", "picture": tmp_path / "curves.png"}
    done = run_bench(*(word for name, value in flags.items() for word in (f"--{name}", str(value))), TUNIX_CACHE=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "bench.json").read_text())
    assert list(written["peers"]) == ["ours", "trl"] and list(written["ratios"]) == ["trl"]
    for figures in written["peers"].values():
        assert list(figures["curves"]) == ["3", "4"] and figures["runs"] == 2
        for points in figures["curves"].values():
            assert [point[0] for point in points] == [0, 1, 2]
            assert 0 == points[0][1] < points[1][1] < points[2][1]
            assert all(0 <= point[2] <= 1 for point in points)
        # The cached model lacks its warm start, so it can't reach the goal.
        assert figures["runs_at_goal"] == 0 and figures["seconds_to_goal"]["max"] is None
        assert figures["startup_seconds"]["min"] > 0
    turns = [line.partition(": 2 steps")[0] for line in done.stdout.splitlines() if ": 2 steps" in line]
    assert turns == ["seed 3, ours", "seed 3, trl", "seed 4, ours", "seed 4, trl"]
    assert "| trl | never" in done.stdout and (tmp_path / "curves.png").is_file()
