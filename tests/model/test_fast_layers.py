"""Faster layers give what Transformers' own give, gradients included, and step aside wherever they do not apply."""

import contextlib
import copy
import pickle

import pytest
import torch
from models import PAD, VOCABULARY, add_nontrivial_lora, make_batch, make_model
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from tunix_torch import GRPOConfig, ModelConfig, TunixTrainer, load_model, load_tokenizer
from tunix_torch.model import decoding, tiny
from tunix_torch.model.decoding import decode_weights, fast_layers
from tunix_torch.model.fast_layers import FastDecoderLayer, _ScaledNorm
from tunix_torch.model.forward import reference_policy
from tunix_torch.model.loading import add_lora, lora_config
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms

GEMMAS = pytest.mark.parametrize("family", ["gemma2", "gemma3"])
PARAMS, GROUP = SamplingParams(max_new_tokens=24), 5


def make_norm(kind=Gemma3RMSNorm, width=32, dtype=torch.float32):
    norm = kind(width, eps=1e-4).to(dtype).requires_grad_(False)
    norm.weight.normal_(generator=torch.Generator().manual_seed(0))
    fast = copy.deepcopy(norm)

    def compute(x):
        with fast_layers(fast):
            assert type(fast) is not kind and isinstance(fast, kind)
            return fast(x)

    return norm, fast, compute


@contextlib.contextmanager
def transformers_layers():
    """Within this context no layer has a faster form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_faster_class", lambda module: None)
        yield


def sample(model, eos=tuple(range(1, 9))):
    batch = make_batch()
    uniforms = draw_uniforms((0, 1), range(len(batch.prompt_ids) * GROUP), PARAMS.max_new_tokens)
    return Sampler(model, eos, PAD).sample(batch.prompt_ids, batch.prompt_mask, GROUP, PARAMS, uniforms)


def assert_same_rollouts(model, **options):
    """Check that faster layers give the rollouts of Transformers' own layers."""
    with transformers_layers():
        # A copy is sampled, because PEFT undoes a merge where the adapter is off.
        expected = sample(copy.deepcopy(model), **options)
    found = sample(model, **options)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    torch.testing.assert_close(found.sampler_logps, expected.sampler_logps, rtol=0, atol=2e-5)


def watch_layouts(monkeypatch):
    """Return a list that receives, for each decoder layer asked to lay out its weights, whether it could."""
    counts, lay_out = [], FastDecoderLayer.prepare_to_decode

    def watched(layer):
        lay_out(layer)
        counts.append(layer._layout is not None)

    monkeypatch.setattr(FastDecoderLayer, "prepare_to_decode", watched)
    return counts


@pytest.mark.parametrize("kind", [Gemma2RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("shape", [(1, 32), (3, 5, 32), (2, 4, 7, 32)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_norm_and_its_gradient(kind, shape, scale):
    norm, _, fast = make_norm(kind)
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
    assert torch.autograd.gradcheck(lambda x: _ScaledNorm.apply(x, scale, eps), x.requires_grad_(True))


def test_a_norm_whose_weight_changes_or_learns():
    norm, other, fast = make_norm()
    x = torch.randn(4, 32)
    fast(x)
    for change in (lambda w: w.mul_(3), lambda w: w.data.add_(1), lambda w: setattr(w, "data", w.data / 2)):
        for layer in (norm, other):
            change(layer.weight)
        torch.testing.assert_close(fast(x), norm(x), rtol=1e-5, atol=1e-5)
    for layer in (norm, other):
        layer.weight = torch.nn.Parameter(torch.full((32,), 0.5))
    for compute in (norm, fast):
        compute(x).square().sum().backward()
    assert torch.equal(other.weight.grad, norm.weight.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_take_transformers_way(dtype):
    norm, _, fast = make_norm(dtype=dtype)
    x = torch.randn(4, 32).to(dtype)
    assert torch.equal(fast(x), norm(x))


@GEMMAS
@pytest.mark.parametrize("lora", [True, False])
def test_completions_are_those_of_transformers_layers(family, lora, monkeypatch):
    model = make_model(family)
    model = add_nontrivial_lora(model) if lora else model
    packed = watch_layouts(monkeypatch)
    assert_same_rollouts(model)
    assert packed == [True, True]
    assert_same_rollouts(model, eos=(VOCABULARY,))  # no row ever ends


def test_several_kv_heads_and_none_shared():
    for heads, kv_heads in ((4, 2), (2, 2)):
        model = make_model("gemma3", num_attention_heads=heads, num_key_value_heads=kv_heads)
        assert_same_rollouts(add_nontrivial_lora(model))


@pytest.mark.parametrize("merged", [False, True])
def test_the_reference_policy_can_be_sampled_too(merged, monkeypatch):
    model = add_nontrivial_lora(make_model("gemma3"))
    if merged:
        model.merge_adapter()
        assert_same_rollouts(model)
    packed = watch_layouts(monkeypatch)
    with reference_policy(model):
        assert_same_rollouts(model)
    assert packed == [not merged] * 2


def test_each_rollout_sees_the_newest_weights():
    model = add_nontrivial_lora(make_model("gemma3"))
    for _ in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_A" in name or name.endswith("q_norm.weight"):
                    parameter.mul_(1.3)
        assert_same_rollouts(model)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_with_another_kind_of_lora_keep_their_own_form(lora, monkeypatch):
    packed = watch_layouts(monkeypatch)
    assert_same_rollouts(add_nontrivial_lora(make_model("gemma3"), **lora))
    assert packed == [False, False]


def test_another_activation_keeps_the_own_form(monkeypatch):
    packed = watch_layouts(monkeypatch)
    assert_same_rollouts(make_model("gemma3", hidden_activation="silu"))
    assert packed == [False, False]


# ---- the contexts ----


def classes_of(model):
    return [type(module) for module in model.modules()]


def test_every_module_has_its_own_class_again():
    """Modules also get their classes back when contexts are nested, and when an exception ends one."""
    model = add_nontrivial_lora(make_model("gemma3"))
    own = classes_of(model)
    with fast_layers(model):
        fast = classes_of(model)
        assert fast != own
        with decode_weights(model), fast_layers(model):
            assert classes_of(model) == fast
        assert classes_of(model) == fast
    assert classes_of(model) == own
    with pytest.raises(ZeroDivisionError), decode_weights(model):
        raise ZeroDivisionError
    assert classes_of(model) == own


def test_a_model_can_still_be_pickled():
    model = add_nontrivial_lora(make_model("gemma3"))
    expected = sample(model)
    for other in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(sample(other).completion_ids, expected.completion_ids)


def test_a_failure_while_weights_are_laid_out_leaves_no_layout(monkeypatch):
    model = make_model("gemma3")
    own = classes_of(model)
    layers = model.get_decoder().layers
    monkeypatch.setattr(layers[0], "prepare_to_decode", lambda: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError), decode_weights(model):
        pass
    assert all(getattr(layer, "_layout", None) is None for layer in layers) and classes_of(model) == own


def test_a_trainer_changes_no_class_and_its_numbers_do_not_depend_on_contexts(model_folder, tmp_path):
    """No class may change when the trainer is made, when it trains, or when a step fails."""
    args = GRPOConfig(
        output_dir=str(tmp_path),
        report_to="none",
        disable_tqdm=True,
        max_steps=2,
        per_device_train_batch_size=2,
        num_completions_per_prompt=2,
        generation_max_length=8,
        save_strategy="no",
        learning_rate=1e-2,
    )
    rows = tiny.arithmetic_rows("train", 16)
    failing = []

    def length_reward(prompts, completions, **columns):
        return [1 / 0 if failing else float(len(text)) for text in completions]

    def train(context):
        torch.manual_seed(0)
        model = add_lora(load_model(model_folder), lora_config(ModelConfig()))
        own = classes_of(model)
        trainer = TunixTrainer(
            model, length_reward, copy.deepcopy(args), rows, processing_class=load_tokenizer(model_folder)
        )
        assert classes_of(model) == own, "the trainer changed a class when it was made"
        with context(model):
            trainer.train()
        assert classes_of(model) == own, "training changed a class"
        failing.append(True)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        failing.clear()
        assert classes_of(model) == own, "a step that failed left a faster class"
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    weights, in_context = train(contextlib.nullcontext), train(fast_layers)
    assert all(torch.equal(weights[name], in_context[name]) for name in weights)
