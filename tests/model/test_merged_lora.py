"""A merged LoRA layer gives what PEFT's own gives, gradients included, and leaves the base weights as they are."""

import contextlib
import copy

import pytest
import torch
from models import FAMILIES, add_nontrivial_lora, make_batch, make_model, token_logps
from peft import LoraConfig
from torch import nn

from tunix_torch.model import decoding
from tunix_torch.model.decoding import fast_layers
from tunix_torch.model.forward import reference_policy
from tunix_torch.model.loading import LORA_TARGETS, add_lora
from tunix_torch.model.merged_lora import MergedLinear, _MergedProduct

CONTEXTS = contextlib.ExitStack()  # this holds the contexts of the running test's models


@pytest.fixture(autouse=True)
def contexts(monkeypatch):
    """End contexts with their test, and let only LoRA layers have a faster form in them."""
    monkeypatch.setattr(decoding, "FAST", {})
    with CONTEXTS:
        yield


def merge_lora(model):
    """Give the model merged layers until the test ends."""
    CONTEXTS.enter_context(fast_layers(model))


def make_pair(family="gemma3", **lora):
    """Make the same model twice, with PEFT's layers and with merged ones."""
    theirs = add_nontrivial_lora(make_model(family), **lora)
    ours = copy.deepcopy(theirs)
    merge_lora(ours)
    return theirs, ours


def merged_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, MergedLinear)]


def gradients(model):
    logps, _ = token_logps(model, make_batch())
    model.zero_grad()
    logps.square().sum().backward()
    return logps.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_those_of_peft(family):
    theirs, ours = make_pair(family)
    assert len(merged_layers(ours)) == sum(name.endswith("lora_A.default") for name, _ in ours.named_modules())
    (expected, expected_grads), (logps, grads) = gradients(theirs), gradients(ours)
    torch.testing.assert_close(logps, expected, rtol=0, atol=1e-4)
    assert grads.keys() == expected_grads.keys()
    largest = max(float(grad.abs().max()) for grad in expected_grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=2e-5 * largest, msg=name)


def test_the_gradient_is_that_of_the_mathematics():
    """The comparison is in float64, so that rounding hides nothing."""
    x, a, b, w = (torch.randn(shape, dtype=torch.float64) for shape in [(2, 3, 5), (2, 5), (4, 2), (4, 5)])

    def merged(x, a, b):
        return _MergedProduct.apply(x, a, b, (w + 0.7 * b @ a).detach(), 0.7)

    def plain(x, a, b):
        return x @ w.t() + 0.7 * (x @ a.t()) @ b.t()

    def results(function):
        inputs = [t.clone().requires_grad_(True) for t in (x, a, b)]
        out = function(*inputs)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        return [out.detach(), *(t.grad for t in inputs)]

    for left, right in zip(results(merged), results(plain), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: torch.optim.AdamW([p], lr=0.1).step(),
        lambda p: torch.optim.AdamW([p], lr=0.1, fused=True).step(),
        lambda p: torch.optim.SGD([p], lr=0.1, foreach=True).step(),
        lambda p: p.data.mul_(1.5),  # optimizers outside PyTorch do this; it changes no version
        lambda p: p.data.copy_(torch.rand_like(p)),
        lambda p: setattr(p, "data", p.data * 2),
    ],
)
@pytest.mark.parametrize("matrix", ["lora_A", "lora_B"])
def test_every_way_of_changing_a_matrix_is_seen(change, matrix):
    _, ours = make_pair()
    layer, x = merged_layers(ours)[0], torch.randn(7, 32)
    layer(x).square().sum().backward()
    change(getattr(layer, matrix)["default"].weight)
    expected = super(MergedLinear, layer).forward(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_the_reference_policy_is_the_base_model_to_the_bit():
    base, batch = make_model("gemma3"), make_batch()
    before = {name: p.clone() for name, p in base.named_parameters()}
    expected, _ = token_logps(base, batch)
    model = add_nontrivial_lora(base)
    merge_lora(model)
    token_logps(model, batch)
    with reference_policy(model):
        assert torch.equal(token_logps(model, batch)[0], expected)
    for name, parameter in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name


def test_dropout_goes_peft_s_way_while_learning():
    theirs, ours = make_pair(lora_dropout=0.5)
    x = torch.randn(5, 32)
    mine, its = merged_layers(ours)[0], next(m for m in theirs.modules() if hasattr(m, "lora_A"))
    for training in (True, False):
        mine.train(training), its.train(training)
        torch.manual_seed(3)
        expected = its(x)
        torch.manual_seed(3)
        torch.testing.assert_close(mine(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_lora_keep_peft_s_layer(lora):
    model = add_lora(make_model("gemma3"), LoraConfig(target_modules=["q_proj"], **lora))
    merge_lora(model)
    assert not merged_layers(model)


def test_weights_that_would_round_updates_away_are_not_merged():
    model = add_lora(make_model("gemma3").to(torch.bfloat16), LoraConfig(target_modules=["q_proj"]))
    merge_lora(model)
    assert not merged_layers(model)


def test_a_model_can_still_be_copied_saved_and_merged_for_good(tmp_path):
    _, ours = make_pair()
    ids = make_batch().prompt_ids
    with torch.no_grad():
        expected = ours(ids).logits
        twin = copy.deepcopy(ours)
        torch.testing.assert_close(twin(ids).logits, expected)
        for layer in merged_layers(twin):
            nn.init.zeros_(layer.lora_B["default"].weight)
        assert not torch.allclose(twin(ids).logits, expected)
        torch.testing.assert_close(ours(ids).logits, expected)  # changing the twin leaves ours alone
        torch.testing.assert_close(ours.merge_and_unload()(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "lora", [{}, {"lora_bias": True}, {"use_dora": True}, {"target_modules": ["q_proj"]}, {"lora_dropout": 0.3}]
)
def test_an_adapter_that_comes_later_gives_what_peft_gives(lora):
    """The later adapter may be of another kind, or leave out layers."""
    theirs, ours = make_pair()
    ids = make_batch().prompt_ids
    for model in (theirs, ours):
        model.add_adapter("second", LoraConfig(**{"target_modules": LORA_TARGETS, "r": 3} | lora))
        model.set_adapter("second")
        random = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "second" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=random)
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-3, atol=1e-3)


def test_learning_works_after_inference_mode():
    """Regression: a merged weight made in inference mode was used again and could not be kept for the backward pass."""
    theirs, ours = make_pair()
    with torch.inference_mode():
        ours(make_batch().prompt_ids)
    (_, expected), (_, grads) = gradients(theirs), gradients(ours)
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=2e-5 * largest, msg=name)


def test_another_base_weight_is_seen():
    _, ours = make_pair()
    layer, x = merged_layers(ours)[0], torch.randn(7, 32)
    for _ in range(5):  # the allocator often gives the same address again
        layer(x)
        layer.base_layer.weight = nn.Parameter(torch.randn(layer.base_layer.weight.shape), requires_grad=False)
        torch.testing.assert_close(layer(x), super(MergedLinear, layer).forward(x), rtol=1e-4, atol=1e-4)
    layer.base_layer.weight.mul_(2)
    torch.testing.assert_close(layer(x), super(MergedLinear, layer).forward(x), rtol=1e-4, atol=1e-4)


def test_other_types_and_autocast_take_peft_s_way():
    theirs, ours = make_pair()
    with torch.autocast("cpu", torch.bfloat16):
        logps, _ = token_logps(ours, make_batch())
        torch.testing.assert_close(logps, token_logps(theirs, make_batch())[0])
    logps.sum().backward()
    theirs, ours = theirs.double(), ours.double()
    with torch.no_grad():
        ids = make_batch().prompt_ids
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)
