"""A job's graphs and Tunix's, compiled for the same slice, are measured alike, and Tunix gets its best settings."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from commands import SMALL_JOB

ROOT = Path(__file__).parent.parent.parent


def run_module(module, *arguments, cache=None, timeout=900):
    environment = {k: v for k, v in os.environ.items() if k not in ("USE_TORCH_XLA", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    if cache is not None:
        environment["TUNIX_CACHE"] = str(cache)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


# ---- the table ----


def a_job(mesh_shape=None, **settings):
    """Return a job of the tiny model: four prompts with four completions each, on one chip or on a mesh."""
    from tunix_torch import GRPOConfig, ModelConfig
    from tunix_torch.preflight.chips import parse_topology
    from tunix_torch.preflight.plan import Job

    counts = {"per_device_train_batch_size": 4, "num_completions_per_prompt": 4, "generation_max_length": 8}
    args = GRPOConfig(output_dir="/nowhere", **counts | settings)
    mesh = {} if mesh_shape is None else {"mesh_shape": mesh_shape, "mesh_axes": "fsdp,tp"}
    return Job(ModelConfig(lora_rank=4, **mesh), args, parse_topology("v5e:2x4" if mesh else "v5e:1x1"))


def a_graph(name, runs, milliseconds, collectives=0):
    """Return the plan of a graph that reads HBM for so many milliseconds."""
    from tunix_torch.preflight.chips import CHIPS
    from tunix_torch.preflight.plan import CollectiveTraffic, GraphPlan

    chip = CHIPS["v5e"]
    graph = GraphPlan(name, runs, [2, 4], hbm_traffic=milliseconds * 1e-3 * chip.hbm_bytes_per_second)
    graph.collectives = {"all-reduce": CollectiveTraffic(collectives, 0.0)} if collectives else {}
    graph.bound_by(chip)
    return graph


def a_comparison():
    from tunix_torch.preflight.beside import Comparison
    from tunix_torch.preflight.plan import Plan
    from tunix_torch.preflight.tunix_plan import TunixPlan

    ours = [a_graph("decode", 7, 2, collectives=100), a_graph("learn", 4, 10), a_graph("optimizer", 1, 5)]
    tunix = TunixPlan([a_graph("decode", 8, 1, collectives=500), a_graph("learn", 2, 50)], [], "its best settings")
    return Comparison(Plan(a_job(), ours), tunix, collective_seconds=1e-6)


def test_a_step_is_the_sum_of_its_runs_and_each_collective_costs():
    comparison = a_comparison()
    assert comparison.step_seconds("ours") == pytest.approx((7 * 2.1 + 4 * 10 + 5) * 1e-3)
    assert comparison.step_seconds("Tunix") == pytest.approx((8 * 1.5 + 2 * 50) * 1e-3)
    assert [(stage.name, stage.side) for stage in comparison.stages][:2] == [("decode", "ours"), ("decode", "Tunix")]


def test_tunix_learning_is_compared_with_ours_and_the_optimizer():
    """Tunix's train step takes the optimizer's step too."""
    ratios = a_comparison().ratios
    assert ratios["learn"] == pytest.approx((4 * 10 + 5) / (2 * 50)) and "optimizer" not in ratios


def test_the_last_line_is_the_whole_step_and_the_json_has_every_figure():
    from tunix_torch.preflight.beside import as_dict, lines_of

    comparison = a_comparison()
    assert lines_of(comparison)[-1] == "A step takes at least 0.060 s here and 0.112 s in Tunix: 0.53 of it."
    document = json.loads(json.dumps(as_dict(comparison)))
    assert document["step_seconds"]["ours"] == pytest.approx(0.0597) and len(document["stages"]) == 5
    assert document["collectives"]["Tunix"]["decode"]["all-reduce"]["count"] == 500


# ---- Tunix's best settings ----


def planned(monkeypatch, seconds, **settings):
    """Plan Tunix's learning, where a pass takes `seconds(rows, rematerialisation)`; None: it does not fit."""
    from tunix_torch.preflight import tunix_plan
    from tunix_torch.preflight.chips import CHIPS
    from tunix_torch.preflight.compiler import Program

    chip = CHIPS["v5e"]

    def compile_tunix(request):
        name = {"rollout": "decode", "log-probabilities": "reference log-probabilities"}.get(request.part, "learn")
        taken = seconds(request.rows, request.rematerialisation) if name == "learn" else 0.001
        program = Program(error="RESOURCE_EXHAUSTED: Used 17.5G of 15.75G hbm." if taken is None else None)
        program.hbm_traffic = (taken or 0) * chip.hbm_bytes_per_second
        return [(name, program, 0.0)]

    monkeypatch.setattr(tunix_plan, "compile_tunix", compile_tunix)
    plan = tunix_plan.plan_tunix(a_job(**settings), 0.0)
    learn = next(graph for graph in plan.graphs if graph.name == "learn")
    return plan, learn


def test_tunix_gets_the_least_rematerialisation_that_fits_and_the_rows_that_take_the_least_time(monkeypatch):
    costs = {"NONE": 1.0, "BLOCK": 1.2, "DECODER": 1.4}
    plan, learn = planned(monkeypatch, lambda rows, kind: costs[kind] * (0.1 + rows), num_iterations=3)
    assert learn.runs == 1 * 3 and "learning passes of 16 rows, rematerialisation NONE" in plan.settings
    assert {attempt.rows for attempt in plan.attempts if attempt.graph == "learn"} == {4, 8, 16}


def test_what_does_not_fit_is_not_taken(monkeypatch):
    def seconds(rows, kind):
        return None if rows > 4 or (kind == "NONE") else rows + 0.1 * (kind == "DECODER")

    plan, learn = planned(monkeypatch, seconds)
    assert learn.runs == 4 and "learning passes of 4 rows, rematerialisation BLOCK" in plan.settings
    tried = [(attempt.rows, attempt.fits) for attempt in plan.attempts if attempt.rematerialisation == "BLOCK"]
    assert tried == [(4, True), (8, False)], "no more rows after some that do not fit"


def test_fewer_rows_than_a_group_are_taken_only_where_no_group_fits_and_are_named(monkeypatch):
    plan, learn = planned(monkeypatch, lambda rows, kind: None if rows > 2 else rows)
    assert learn.runs == 8 and "fewer rows than a group" in plan.settings
    with pytest.raises(ValueError, match="learning of Tunix does not fit v5e:1x1"):
        planned(monkeypatch, lambda rows, kind: None)


def test_rows_in_a_pass_are_spread_over_the_mesh(monkeypatch):
    plan, _ = planned(monkeypatch, lambda rows, kind: rows, mesh_shape="8,1")
    assert {attempt.rows for attempt in plan.attempts} == {8, 16}


# ---- the command ----


@pytest.mark.thorough
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, subtests):
    pytest.importorskip("torch_xla")
    pytest.importorskip("tunix")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for arguments, message in [
        (["--topology", "v5e:3x4"], "topology='v5e:3x4'"),
        (["--topology", "v5e:2x2", "--config", "/no/such.json"], "/no/such.json"),
        (["--topology", "v5e:2x2", "--collective_us", "-1"], "collective_us=-1.0"),
        (
            ["--topology", "v5e:1x1", *SMALL_JOB, "--model_name", tmp_path],
            "of model type 'llama' Tunix has no model here",
        ),
    ]:
        with subtests.test(arguments=arguments):
            result = run_module("preflight.beside_tunix", *arguments)
            assert result.returncode == 2 and message in result.stderr, result.stderr
            assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def a_request(folder, part, **changes):
    from tunix_torch.preflight.compile_tunix import TunixRequest
    from tunix_torch.preflight.models import model_config

    values = {"topology": "v5e:2x2", "mesh": [[2, 2], ["fsdp", "tp"]], "model": model_config(str(folder)).to_dict()}
    values |= {"dtype": "bfloat16", "lora_rank": 4, "lora_alpha": 4.0, "rows": 8, "prompt_length": 16}
    return TunixRequest(part=part, **values | {"completion_length": 8, "temperature": 1.0} | changes)


@pytest.mark.thorough
def test_tunix_sampler_is_compiled_with_its_own_layout(small_model, tmp_path):
    """Its weights lie on all chips, and its activations along both axes, so that whole weights are gathered."""
    pytest.importorskip("tunix")
    pytest.importorskip("libtpu")
    from tunix_torch.preflight.hlo import collectives_of

    request = a_request(small_model, "rollout")
    (tmp_path / "request").write_text(json.dumps(asdict(request)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    environment |= {"TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TUNIX_DEVICE": "cpu"}
    command = [sys.executable, "-m", "tunix_torch.preflight.compile_tunix", str(tmp_path / "request")]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    prefill, decode = json.loads((tmp_path / "result").read_text())
    assert (prefill["name"], decode["name"]) == ("prefill", "decode") and not prefill["error"] and not decode["error"]
    assert prefill["flops"] > 10 * decode["flops"], "16 tokens a row against one"
    model = request.model
    weight = f"bf16[{model['hidden_size']},{model['intermediate_size'] // 2}]"  # split along tp, whole along fsdp
    for graph in (prefill, decode):
        found = collectives_of((tmp_path / graph["program"]).read_text())
        assert weight in {collective.shape for collective in found if collective.kind == "all-gather"}
        assert {collective.group_size for collective in found} <= {2, 4}


@pytest.mark.slow
def test_a_tiny_model_is_compared(small_model, tmp_path):
    pytest.importorskip("torch_xla")
    pytest.importorskip("tunix")
    pytest.importorskip("libtpu")
    flags = ["--model_name", small_model, *SMALL_JOB, "--mesh_shape", "2,2", "--topology", "v5e:2x2"]
    result = run_module("preflight.beside_tunix", *flags, "--json", tmp_path / "beside.json", cache=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads((tmp_path / "beside.json").read_text())
    sides = {side: [s["name"] for s in document["stages"] if s["side"] == side] for side in ("ours", "Tunix")}
    assert sides["ours"] == [*sides["Tunix"], "optimizer"]
    assert set(document["ratios"]) == set(sides["Tunix"])
    assert {a["rematerialisation"] for a in document["tunix_attempts"]} == {None, "NONE"}, "a tiny model needs none"
    assert all(stage["hbm_traffic"] > 0 and stage["flops"] > 0 for stage in document["stages"])
    again = run_module("tunix_torch.cli", "beside_tunix", *flags, cache=tmp_path)
    assert again.stdout == result.stdout, "from what is kept"
