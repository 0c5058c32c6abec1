"""A float32 model computes with float32's precision on a TPU, which by itself rounds what it multiplies to bfloat16."""

import json
import subprocess
import sys

import pytest
import torch
from graphs import KIND, environment, only_torch_xla

from tunix_torch.model import tiny
from tunix_torch.model.loading import place
from tunix_torch.runtime import device, mesh


def program_of(result):
    """The program that computes a tensor, as its device's compiler gets it."""
    if device.KIND == "tpu":
        from torch_tpu._internal.sync import sync

        return sync.computation_mlir([result])
    import torch_xla

    return torch_xla._XLAC._get_xla_tensors_hlo([result])


def test_products_that_may_be_rounded_are_not_exact(monkeypatch):
    monkeypatch.setattr(device, "KIND", "cuda")
    for precision, exact in (("highest", True), ("high", False), ("medium", False)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert device.multiplies_exactly(torch.float32) == exact and not device.multiplies_exactly(torch.bfloat16)


@pytest.mark.xla
def test_every_product_of_a_float32_model_asks_for_float32s_precision():
    model = place(tiny.make_model(tiny.make_tokenizer()))
    ids = torch.arange(8, device=device.torch_device())[None]
    program = program_of(model.get_decoder().layers[0].mlp(model.get_input_embeddings()(ids)))
    products = [line for line in program.splitlines() if " dot(" in line or "stablehlo.dot_general" in line]
    assert len(products) == 3
    assert all(line.lower().count("highest") == 2 for line in products), products


# Traces the five graphs of a job for one chip, and writes the lines of each that multiply matrices.
PLANNED = """
import json
import sys
from tunix_torch import GRPOConfig, ModelConfig
from tunix_torch.preflight.models import model_config, with_depth
from tunix_torch.preflight.trace import make_trainer, trace_step
from tunix_torch.runtime import device

device.plan_for_tpu()
args = GRPOConfig(output_dir=sys.argv[1], per_device_train_batch_size=2, max_prompt_length=16, generation_max_length=8,
                  micro_batch_size=4, beta=0.04)
trainer = make_trainer(with_depth(model_config("tiny"), 2), ModelConfig(model_dtype="float32", lora_rank=16), args)
found = {}
for graph in trace_step(trainer):
    if graph.dialect == "stablehlo":
        text = graph.program.decode()
    else:
        from jax._src.lib import xla_client
        text = xla_client.XlaComputation(graph.program).as_hlo_text()
    assert " convolution(" not in text and "stablehlo.convolution" not in text, graph.name
    found[graph.name] = [line for line in text.splitlines() if " dot(" in line or "stablehlo.dot_general" in line]
json.dump(found, open(sys.argv[1] + "/found.json", "w"))
"""


@pytest.mark.xla
@pytest.mark.thorough
def test_so_does_every_product_of_every_graph_that_is_planned_for_a_float32_model(tmp_path):
    """But those of `einsum` through torch-xla, in attention: torch-xla gives them no precision, nor a way to ask."""
    env = environment(KIND, TORCH_TPU_INTERNAL_DETECT_REPEATED_OPS="off", JAX_PLATFORMS="cpu")
    result = subprocess.run([sys.executable, "-c", PLANNED, tmp_path], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    forward = 2 * 7 * 3 + 1  # of two layers: seven projections, each with the two matrices of its LoRA; and the head
    least = {"prefill": forward, "decode": forward, "reference log-probabilities": 2 * 7 + 1, "learn": 2 * forward}
    assert list(found) == [*least, "optimizer"]
    for name, products in found.items():
        assert len(products) >= least.get(name, 0), (name, len(products))
        rounded = [line for line in products if line.lower().count("highest") != 2]
        of_einsum = [line for line in rounded if "frontend_attributes={grad_x=" in line]
        assert rounded == of_einsum, (name, rounded)
        assert bool(of_einsum) == (KIND == "xla" and name != "optimizer"), f"{name}: docs/tpu.md says otherwise"


@only_torch_xla
@pytest.mark.xla
def test_on_a_tpu_a_lora_is_never_merged_into_its_layer(monkeypatch):
    assert mesh.merges_lora()
    monkeypatch.setattr(device, "_planned_for_tpu", True)
    assert not mesh.merges_lora()
