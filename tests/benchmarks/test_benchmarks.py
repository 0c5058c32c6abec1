"""The bench gives every peer the same work, aggregates honestly, and runs a small job of all three peers."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import grpo_step
from benchmarks.shapes import slopes, variations
from benchmarks.stopwatch import PARTS, Stopwatch
from benchmarks.summary import ratios, spread_of, summarise, summarise_peer, table
from benchmarks.worker import PEERS, environment
from benchmarks.workload import (
    PRESETS,
    Spec,
    check_measured,
    check_spec,
    ends_itself,
    lengths,
    make_prompts,
    read_spec,
    rows_per_pass,
    share_of_even_words,
    write_spec,
)

ROOT = Path(__file__).parent.parent.parent


def run_bench(*args):
    command = [sys.executable, "-m", "benchmarks.grpo_step", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def result_of(spec, *steps):
    """Return what a worker writes whose steps took these seconds of learning."""
    return {
        "steps": [{"learning": seconds} for seconds in steps],
        "warmup_steps": [{"learning": 9.0}],
        "completion_lengths": [lengths(spec) for _ in steps],
        "losses": [0.0] * (len(steps) + 1),
        "peak_memory": 2**30,
    }


# ---- the work ----


@pytest.mark.parametrize("preset", PRESETS)
def test_spec_survives_json(preset, tmp_path):
    write_spec(PRESETS[preset], tmp_path / "spec.json")
    assert read_spec(tmp_path / "spec.json") == PRESETS[preset]


def test_without_spread_every_row_reaches_the_limit():
    spec = PRESETS["small"]
    assert lengths(spec) == [64] * 32
    assert not any(ends_itself(spec))


def test_spread_has_many_short_and_few_at_the_limit_and_is_the_same_every_time():
    spec = PRESETS["long"]
    drawn = lengths(spec)
    assert drawn == lengths(spec) and len(drawn) == 128
    assert min(drawn) >= 2 and max(drawn) == 256
    assert sum(length < 64 for length in drawn) > 64
    assert 1 <= sum(length == 256 for length in drawn) <= 6
    assert [not ends for ends in ends_itself(spec)] == [length == 256 for length in drawn]


@pytest.mark.parametrize("limit", [2, 3, 8])
def test_short_limits_leave_a_token_before_the_end(limit):
    assert set(lengths(replace(PRESETS["long"], completion_length=limit))) <= set(range(2, limit + 1))


def test_prompts_have_the_prompt_length_with_bos_and_no_special_word():
    spec = replace(Spec(), warmup=1, steps=2, num_prompts=3, prompt_length=10)
    prompts = make_prompts(spec)
    assert len(prompts) == 9 and len(set(prompts)) == 9
    assert all(len(prompt.split()) == 9 for prompt in prompts)
    assert all(4 <= int(word[1:]) < 512 for prompt in prompts for word in prompt.split())


def test_rows_of_a_pass_divide_the_batch():
    spec = Spec()  # a batch of 32 rows of 128 tokens
    assert rows_per_pass(spec, 1024) == 8
    assert rows_per_pass(spec, 10**9) == 32
    assert rows_per_pass(spec, 1) == 1
    assert rows_per_pass(spec, 1, multiple=4) == 4
    assert rows_per_pass(replace(spec, num_prompts=9), 1024) == 6  # it divides the 36 rows
    assert rows_per_pass(replace(spec, tokens_per_pass=2048), 1024) == 16


def test_reward_tells_completions_apart():
    assert share_of_even_words(["?"] * 3, ["w4 w6 w5 w8", "w11", ""]) == [0.75, 0.0, 0.0]


def test_worker_notices_work_that_was_not_done():
    spec = replace(PRESETS["long"], warmup=0, steps=1)
    right = lengths(spec)
    check_measured(spec, [right], [0.1])
    for found, losses in (
        ([right[:-1]], [0.1]),
        ([[right[0] - 1, *right[1:]]], [0.1]),
        ([right, right], [0.1]),
        ([right], [math.nan]),
        ([right], []),
    ):
        with pytest.raises(AssertionError):
            check_measured(spec, found, losses)


def test_forced_uniforms_end_rows_where_they_should_and_nowhere_else():
    import torch

    from benchmarks.peer_ours import force_lengths

    spec = replace(PRESETS["long"], num_prompts=2, num_completions=3, completion_length=12, seed=3)
    drawn = force_lengths(lambda seed, rows, count: torch.zeros(len(rows), count), spec)(0, range(6), 12)
    for row, (length, ends) in enumerate(zip(lengths(spec), ends_itself(spec), strict=True)):
        assert (drawn[row] == 0).nonzero().flatten().tolist() == ([length - 1] if ends else [])
    assert any(ends_itself(spec))


def test_every_peer_gets_the_same_threads_and_only_ours_sees_xla():
    spec = replace(Spec(), threads=3)
    chosen = {peer: environment(peer, spec) for peer in PEERS}
    assert {env["OMP_NUM_THREADS"] + env["NPROC"] for env in chosen.values()} == {"33"}
    assert chosen["ours"]["TUNIX_DEVICE"] == "cpu" and chosen["ours-xla"]["TUNIX_DEVICE"] == "xla"
    assert chosen["trl"]["USE_TORCH_XLA"] == chosen["tunix"]["USE_TORCH_XLA"] == "0"


# ---- the figures ----


def test_stopwatch_charges_the_innermost_part_and_all_of_the_step(monkeypatch):
    clock = iter(range(100))  # each look takes a second
    monkeypatch.setattr("benchmarks.stopwatch.time.perf_counter", lambda: float(next(clock)))

    class Trainer:
        def outer(self):
            self.inner()

        def inner(self):
            return "text"

    watch, trainer, seen = Stopwatch(), Trainer(), []
    watch.wrap(trainer, "outer", "learning", rest="learning")
    watch.wrap(trainer, "inner", "rollout", seen=seen.append)
    watch.start()
    trainer.outer()
    watch.end_step()
    trainer.inner()
    watch.end_step()
    assert seen == ["text", "text"]
    assert watch.steps == [
        {"other": 1.0, "learning": 3.0, "rollout": 1.0},  # the time after `outer` is learning too
        {"other": 2.0, "rollout": 1.0},
    ]


def test_stopwatch_leaves_a_call_with_the_part_around_it_when_told():
    class Trainer:
        def score(self):
            pass

    watch, trainer = Stopwatch(), Trainer()
    watch.wrap(trainer, "score", "reference", when=lambda: False)
    watch.start()
    trainer.score()
    watch.end_step()
    assert set(watch.steps[0]) == {"other"}


def test_figures_are_over_all_steps_of_all_rounds_without_the_warm_up():
    spec = replace(Spec(), warmup=1, steps=2)
    figures = summarise_peer([result_of(spec, 1.0, 2.0), result_of(spec, 4.0, 8.0)])
    assert figures["seconds_per_step"] == {"min": 1.0, "median": 3.0, "max": 8.0}
    assert figures["parts"]["learning"] == figures["seconds_per_step"]
    assert figures["parts"]["scoring"] is None
    assert set(figures["parts"]) == set(PARTS)
    assert figures["tokens_per_step"] == 2048 and figures["completions_per_step"] == 32
    assert figures["tokens_per_second"] == {"min": 256.0, "median": (512 + 1024) / 2, "max": 2048.0}
    assert figures["first_step_seconds"]["max"] == 9.0


def test_ratios_compare_rounds_with_their_own_neighbours():
    spec = replace(Spec(), warmup=1, steps=2)
    ours = [result_of(spec, 1.0, 1.0), result_of(spec, 10.0, 10.0), result_of(spec, 1.0, 1.0)]  # round 2 was slow
    peer = [result_of(spec, 4.0, 4.0), result_of(spec, 30.0, 30.0), result_of(spec, 5.0, 5.0)]
    assert ratios(peer, ours) == {"min": 3.0, "median": 4.0, "max": 5.0}
    assert ratios(peer[:1], ours) == spread_of([4.0])  # this peer failed after one round


def test_first_peer_is_the_measure():
    spec = replace(Spec(), warmup=1, steps=1)
    summary = summarise(spec, {"ours": [result_of(spec, 1.0)], "trl": [result_of(spec, 3.0)]})
    assert summary["ratios"] == {"trl": {"min": 3.0, "median": 3.0, "max": 3.0}}
    assert "trl takes 3.00 times as long as ours" in table(summary)


def test_peers_with_other_lengths_are_not_compared():
    spec = replace(Spec(), warmup=1, steps=1)
    other = result_of(spec, 1.0)
    other["completion_lengths"][0][5] -= 1
    with pytest.raises(AssertionError, match="different numbers of tokens"):
        summarise(spec, {"ours": [result_of(spec, 1.0)], "trl": [other]})


def test_a_peer_that_fails_is_shown_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    spec = replace(Spec(), threads=1, warmup=1, steps=1)
    calls = []

    def run_peer(peer, spec, spec_file):
        calls.append(peer)
        return "exit code 1\nno such thing" if peer == "trl" else result_of(spec, 1.0)

    monkeypatch.setattr(grpo_step, "run_peer", run_peer)
    results, errors = grpo_step.run_rounds(["ours", "trl", "tunix"], spec, tmp_path / "spec.json", 2)
    assert calls == ["ours", "trl", "tunix", "ours", "tunix"]
    assert errors == {"trl": "exit code 1\nno such thing"}
    assert {peer: len(found) for peer, found in results.items()} == {"ours": 2, "tunix": 2}
    assert "no such thing" in capsys.readouterr().err


# ---- the command ----


def test_mistakes_are_one_line(subtests):
    for args, message in [
        (["--peers", "ours,verl"], "peers='ours,verl': choose among ours, ours-xla, trl, tunix"),
        (["--peers", "ours,ours"], "name each once"),
        (["--preset", "huge"], "preset='huge': choose among small, long, 270m, 1b"),
        (["--num_completions", "1"], "num_completions=1: must be at least 2"),
        (["--rounds", "0"], "rounds=0: must be at least 1"),
        (["--threads", "4096"], "threads=4096: this process may use"),
        (["--preset", "1b"], "'tunix' on the CPU: --peers ours,trl"),
        (["--json", "/no/such/folder/x.json"], "expected a file in a folder that exists"),
        (["--num_prompts", "many"], "invalid int value"),
    ]:
        with subtests.test(args=args, message=message):
            done = run_bench("--peers", "ours", *args) if "1b" not in args else run_bench(*args)
            assert done.returncode == 2
            assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
            assert message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small", "long"])
def test_all_three_do_the_same_work(preset, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("tunix")
    sizes = {"num_prompts": 2, "num_completions": 3, "prompt_length": 6, "completion_length": 12}
    flags = {**sizes, "rounds": 1, "steps": 2, "warmup": 1, "threads": 1, "preset": preset}
    file = tmp_path / "bench.json"
    done = run_bench(
        "--json", str(file), *(word for name, value in flags.items() for word in (f"--{name}", str(value)))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert list(written["peers"]) == ["ours", "trl", "tunix"] and not written["errors"]
    assert set(written["ratios"]) == {"trl", "tunix"}
    expected = sum(lengths(replace(PRESETS[preset], **sizes)))
    for figures in written["peers"].values():
        for name in ("seconds_per_step", "tokens_per_second"):
            assert 0 < figures[name]["min"] <= figures[name]["median"] <= figures[name]["max"]
        assert all(figures["parts"][name]["median"] > 0 for name in PARTS)
        assert figures["tokens_per_step"] == expected and figures["completions_per_step"] == 6
        assert figures["peak_memory_bytes"] > 2**26
        assert len(figures["losses"][0]) == 3 and all(map(math.isfinite, figures["losses"][0]))
        assert any(figures["losses"][0][1:])  # once the LoRA has moved, the KL penalty is not 0
    assert "trl takes" in done.stdout


# ---- many shapes ----


def test_each_size_is_halved_and_doubled():
    spec = PRESETS["small"]
    shapes = variations(spec)
    assert shapes.pop("as it is") == spec and len(shapes) == 8
    for name, shape in shapes.items():
        field, size = name.split("=")
        assert getattr(shape, field) == int(size) and replace(shape, **{field: getattr(spec, field)}) == spec
        assert int(size) * 2 == getattr(spec, field) or int(size) == 2 * getattr(spec, field)
        check_spec(shape)


@pytest.mark.parametrize("fixed", [0.0, 7.0])
def test_slopes_are_one_where_growth_is_linear_whatever_the_fixed_cost(fixed):
    sizes = (4, 8, 16, 64)
    assert slopes(sizes, [fixed + 0.3 * n for n in sizes]) == pytest.approx([1.0] * 3)
    assert slopes(sizes, [fixed + 0.01 * n * n for n in sizes])[-1] > 1.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--peers ours", "peers='ours': a comparison needs two"),
        ("--preset tiny", "preset='tiny': choose among"),
        ("--json /nowhere/figures.json", "expected a file in a folder that exists"),
    ],
)
def test_mistakes_with_shapes_are_one_line(arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.shapes", *arguments.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_head_of_a_learning_pass_needs_under_a_tenth_of_its_logits():
    """The resident set also has what the allocator keeps for later, so the least of three runs is what is needed."""
    command = [sys.executable, "-m", "benchmarks.head_memory", "--json"]
    ratios = []
    while len(ratios) < 3 and min(ratios, default=1.0) >= 0.1:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        ratios.append(json.loads(done.stdout.splitlines()[-1])["ratio"])
    assert min(ratios) < 0.1, ratios
