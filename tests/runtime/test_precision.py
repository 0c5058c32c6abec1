"""A float32 model computes with float32's precision on a TPU, which by itself rounds what it multiplies to bfloat16."""

import pytest
import torch
from graphs import only_torch_xla

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


@only_torch_xla
@pytest.mark.xla
def test_on_a_tpu_a_lora_is_never_merged_into_its_layer(monkeypatch):
    assert mesh.merges_lora()
    monkeypatch.setattr(device, "_planned_for_tpu", True)
    assert not mesh.merges_lora()
