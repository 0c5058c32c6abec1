"""Faster layers give what Transformers' own give, gradients included, and step aside wherever they do not apply."""

import copy
import pickle

import pytest
import torch
from models import PAD, VOCABULARY, add_nontrivial_lora, make_batch, make_model
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from tunix_torch.model import fast_layers
from tunix_torch.model.fast_layers import _FastDecoderLayer, packed_for_decoding, speed_up_layers
from tunix_torch.model.forward import reference_policy
from tunix_torch.model.merged_lora import merge_lora
from tunix_torch.rollout.sampler import Sampler, SamplingParams, draw_uniforms

GEMMAS = pytest.mark.parametrize("family", ["gemma2", "gemma3"])
PARAMS, GROUP = SamplingParams(max_new_tokens=24), 5


def make_norm(kind=Gemma3RMSNorm, width=32, dtype=torch.float32):
    norm = kind(width, eps=1e-4).to(dtype).requires_grad_(False)
    norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    fast = copy.deepcopy(norm)
    speed_up_layers(fast)
    assert type(fast) is not kind and isinstance(fast, kind)
    return norm, fast


def make_pair(model):
    """The model with Transformers' layers, and with faster ones."""
    fast = copy.deepcopy(model)
    merge_lora(fast)
    speed_up_layers(fast)
    return model, fast


def decoder_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, _FastDecoderLayer)]


def sample(model, eos=tuple(range(1, 9))):
    batch = make_batch()
    uniforms = draw_uniforms((0, 1), range(len(batch.prompt_ids) * GROUP), PARAMS.max_new_tokens)
    return Sampler(model, eos, PAD).sample(batch.prompt_ids, batch.prompt_mask, GROUP, PARAMS, uniforms)


def assert_same_rollouts(theirs, ours, **options):
    expected, found = sample(theirs, **options), sample(ours, **options)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    torch.testing.assert_close(found.sampler_logps, expected.sampler_logps, rtol=0, atol=2e-5)


def watch_packing(monkeypatch):
    """How many decoder layers each `packed_for_decoding` packed."""
    counts, pack = [], fast_layers._FastDecoderLayer.pack

    def watched(layer):
        pack(layer)
        counts.append(layer._packed is not None)

    monkeypatch.setattr(fast_layers._FastDecoderLayer, "pack", watched)
    return counts


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 32), (3, 5, 32), (2, 4, 7, 32)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_norm_and_its_gradient(kind, shape, scale):
    norm, fast = make_norm(kind)
    x = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(1))).requires_grad_(True)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    (expected_grad,) = torch.autograd.grad(norm(x), x, upstream)
    (grad,) = torch.autograd.grad(fast(x), x, upstream)
    torch.testing.assert_close(fast(x), norm(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5 * float(expected_grad.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(fast(x), norm(x), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_norm_is_that_of_the_mathematics():
    x, scale = (torch.randn(s, dtype=torch.float64) for s in [(2, 3, 5), (5,)])
    eps = torch.tensor(0.1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: fast_layers._ScaledNorm.apply(x, scale, eps), x.requires_grad_(True))


def test_a_norm_whose_weight_changes_or_learns():
    norm, fast = make_norm()
    x = torch.randn(4, 32)
    fast(x)
    for change in (lambda w: w.mul_(3), lambda w: w.data.add_(1), lambda w: setattr(w, "data", w.data / 2)):
        for layer in (norm, fast):
            change(layer.weight)
        torch.testing.assert_close(fast(x), norm(x), rtol=1e-5, atol=1e-5)
    for layer in (norm, fast):
        layer.weight = torch.nn.Parameter(torch.full((32,), 0.5))
        layer(x).square().sum().backward()
    assert torch.equal(fast.weight.grad, norm.weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_transformers_way(dtype):
    norm, fast = make_norm(dtype=dtype)
    x = torch.randn(4, 32).to(dtype)
    assert torch.equal(fast(x), norm(x))


@GEMMAS
@pytest.mark.parametrize("lora", [True, False])
def test_completions_are_those_of_transformers_layers(family, lora, monkeypatch):
    model = make_model(family)
    theirs, ours = make_pair(add_nontrivial_lora(model) if lora else model)
    packed = watch_packing(monkeypatch)
    assert_same_rollouts(theirs, ours)
    assert packed == [True, True] and all(layer._packed is None for layer in decoder_layers(ours))
    assert_same_rollouts(theirs, ours, eos=(VOCABULARY,))  # no row ever leaves


def test_several_kv_heads_and_none_shared():
    for heads, kv_heads in ((4, 2), (2, 2)):
        model = make_model("gemma3", num_attention_heads=heads, num_key_value_heads=kv_heads)
        assert_same_rollouts(*make_pair(add_nontrivial_lora(model)))


@pytest.mark.parametrize("merged", [False, True])
def test_the_reference_policy_can_be_sampled_too(merged, monkeypatch):
    theirs, ours = make_pair(add_nontrivial_lora(make_model("gemma3")))
    if merged:
        ours.merge_adapter()
        assert_same_rollouts(theirs, ours)
    packed = watch_packing(monkeypatch)
    with reference_policy(theirs), reference_policy(ours):
        assert_same_rollouts(theirs, ours)
    assert packed == [not merged] * 2


def test_each_rollout_sees_the_newest_weights():
    theirs, ours = make_pair(add_nontrivial_lora(make_model("gemma3")))
    for _ in range(2):
        for model in (theirs, ours):
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_A" in name or name.endswith("q_norm.weight"):
                        parameter.mul_(1.3)
        assert_same_rollouts(theirs, ours)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_with_another_kind_of_lora_are_not_packed(lora, monkeypatch):
    theirs, ours = make_pair(add_nontrivial_lora(make_model("gemma3"), **lora))
    packed = watch_packing(monkeypatch)
    assert_same_rollouts(theirs, ours)
    assert packed == [False, False]


def test_another_activation_is_not_packed(monkeypatch):
    theirs, ours = make_pair(make_model("gemma3", hidden_activation="silu"))
    packed = watch_packing(monkeypatch)
    assert_same_rollouts(theirs, ours)
    assert packed == [False, False]


def test_a_model_can_still_be_pickled():
    _, ours = make_pair(add_nontrivial_lora(make_model("gemma3")))
    expected = sample(ours)
    assert torch.equal(sample(pickle.loads(pickle.dumps(ours))).completion_ids, expected.completion_ids)


def test_a_failure_while_packing_leaves_nothing_packed(monkeypatch):
    _, ours = make_pair(make_model("gemma3"))
    layers = decoder_layers(ours)
    monkeypatch.setattr(layers[1], "pack", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError), packed_for_decoding(ours):
        pass
    assert all(layer._packed is None for layer in layers)
