"""A one-chip job is planned from torch_tpu's own graphs, and its plan is that of torch-xla's graphs of the same job."""

import json
import re

import pytest
from commands import SMALL_JOB, run
from graphs import KIND, environment

pytestmark = [pytest.mark.xla, pytest.mark.skipif(KIND != "tpu", reason="about torch_tpu")]

# What `plan_tpu.py` says of the job below in torch-xla's environment, where libtpu is 0.0.21 (30 November 2026): runs,
# bytes of arguments, operations, bytes from and to HBM.
BY_TORCH_XLA = {
    "prefill": (1, 1.378e06, 3.808e07, 1.357e06),
    "decode": (7, 1.483e06, 9.947e06, 1.375e06),
    "reference log-probabilities": (2, 9.989e05, 4.515e07, 9.815e05),
    "learn": (2, 1.768e06, 1.168e08, 2.054e06),
    "optimizer": (1, 1.513e06, 2.202e06, 2.819e06),
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The plan as JSON, and the compiled program of each graph."""
    from tunix_torch.preflight.models import model_config, with_depth

    folder = tmp_path_factory.mktemp("planned")
    with_depth(model_config("tiny"), 2).save_pretrained(folder / "model")
    flags = [*SMALL_JOB, "--micro_batch_size", 4, "--topology", "v5e:1x1", "--json", folder / "plan.json"]
    kept = {"TUNIX_CACHE": str(folder), "TUNIX_KEEP_PROGRAMS": str(folder / "programs")}
    result = run("plan_tpu.py", "--model_name", folder / "model", *flags, timeout=900, **environment("tpu", **kept))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1].startswith("Fits v5e:1x1 with 100% of HBM to spare"), result.stdout
    programs = {path.name.rpartition("-")[0]: path.read_text() for path in (folder / "programs").iterdir()}
    return json.loads((folder / "plan.json").read_text()), programs


def test_the_plan_is_that_of_torch_xlas_graphs(planned):
    graphs = {graph["name"]: graph for graph in planned[0]["graphs"]}
    assert list(graphs) == list(BY_TORCH_XLA)
    for name, (runs, arguments, flops, traffic) in BY_TORCH_XLA.items():
        graph = graphs[name]
        assert graph["runs"] == runs, name  # so the micro-batches of a batch have one graph, and not one each
        assert graph["argument_bytes"] == pytest.approx(arguments, rel=0.02), name
        assert graph["flops"] == pytest.approx(flops, rel=0.2 if name == "optimizer" else 0.05), name
        assert graph["hbm_traffic"] == pytest.approx(traffic, rel=0.05), name
        assert graph["temporary_bytes"] > 0 and graph["held_bytes"] > 0 and not graph["collectives"], name


def test_the_decode_step_writes_its_caches_where_they_lie(planned):
    """Two layers, each with a cache for keys and one for values, of 8 rows, 1 head, 7 tokens and 32 numbers."""
    header = planned[1]["decode"].splitlines()[0]
    shapes = re.findall(r"\w+\[[\d,]*\]", header.partition("entry_computation_layout={(")[2].partition(")->")[0])
    overwritten = re.findall(r"\{\d+\}: \((\d+), \{\}", header.partition("input_output_alias={")[2])
    assert sorted(shapes[int(number)] for number in overwritten) == ["bf16[8,1,7,32]"] * 4, header[:2000]


def test_a_chip_needs_no_mesh(monkeypatch):
    """No test has a chip, on which the library must ask nothing of torch-xla."""
    from tunix_torch.runtime import device, mesh

    monkeypatch.setattr(device, "_HAS_CHIP", True)
    mesh.use_mesh(None)
    assert not mesh.has_mesh() and not mesh.merges_lora() and mesh.writes_caches_last()
