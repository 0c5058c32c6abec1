"""A float32 model computes with float32's precision on a TPU, which by itself rounds what it multiplies to bfloat16."""

import pytest
import torch

from tunix_torch.model import tiny
from tunix_torch.model.loading import place
from tunix_torch.runtime import device, mesh


def test_products_that_may_be_rounded_are_not_exact(monkeypatch):
    monkeypatch.setattr(device, "KIND", "cuda")
    for precision, exact in (("highest", True), ("high", False), ("medium", False)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert device.multiplies_exactly(torch.float32) == exact and not device.multiplies_exactly(torch.bfloat16)


@pytest.mark.xla
def test_every_product_of_a_float32_model_asks_for_float32s_precision():
    import torch_xla

    model = place(tiny.make_model(tiny.make_tokenizer()))
    ids = torch.arange(8, device=device.torch_device())[None]
    hlo = torch_xla._XLAC._get_xla_tensors_hlo([model(ids, use_cache=False).logits])
    products = [line for line in hlo.splitlines() if " dot(" in line]
    assert len(products) > 7 * model.config.num_hidden_layers
    assert all("operand_precision={highest,highest}" in line for line in products), products


@pytest.mark.xla
def test_on_a_tpu_a_lora_is_never_merged_into_its_layer(monkeypatch):
    assert mesh.merges_lora()
    monkeypatch.setattr(device, "_planned_for_tpu", True)
    assert not mesh.merges_lora()
