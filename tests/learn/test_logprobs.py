"""`token_logps` computes what Hugging Face's own forward computes, however rows are padded, grouped, cut or chunked."""

from dataclasses import fields, replace

import pytest
import torch
from models import (
    FAMILIES,
    add_nontrivial_lora,
    assert_close,
    hugging_face_logps,
    lora_gradients,
    make_batch,
    make_model,
    make_policy,
    token_logps,
    weighted,
    with_completions,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunix_torch.grpo import grpo_loss
from tunix_torch.learn import logprobs
from tunix_torch.learn.passes import bucketed_rows, padded_rows, plain_rows
from tunix_torch.model.forward import base_model

every_family = pytest.mark.parametrize("family", FAMILIES)


def pad(batch, left, right):
    """Add padding, `left` columns for prompts and `right` for completions, filled with ids that occur in text."""
    result = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if value is None or value.ndim == 1:
            continue
        columns = (left, 0) if field.name.startswith("prompt_") else (0, right)
        result[field.name] = torch.nn.functional.pad(value, columns, value=0 if "ids" not in field.name else 5)
    return replace(batch, **result)


# ---- what Hugging Face computes ----


@every_family
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logps_and_entropy_equal_hugging_faces_own_forward(family, temperature):
    model, batch = make_policy(family), make_batch()
    expected_logps, expected_entropy = hugging_face_logps(model, batch, temperature)
    logps, entropy = token_logps(model, batch, temperature)
    torch.testing.assert_close(logps, expected_logps, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=2e-5)
    assert logps.dtype == entropy.dtype == torch.float32
    assert logps.requires_grad and not entropy.requires_grad


@every_family
def test_lora_gradients_equal_those_through_hugging_faces_own_forward(family):
    model, batch = make_policy(family), make_batch()
    expected = lora_gradients(model, weighted(hugging_face_logps(model, batch, 0.7)[0], batch))
    actual = lora_gradients(model, weighted(token_logps(model, batch, 0.7)[0], batch))
    assert_close(actual, expected, 2e-5)


def test_gemma4_whose_full_layers_use_keys_as_values():
    """Gemma 4's larger models have no V projection, and other KV heads, in layers of full attention."""
    overrides = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}
    model, batch = make_policy("gemma4", **overrides), make_batch()
    torch.testing.assert_close(token_logps(model, batch)[0], hugging_face_logps(model, batch)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", [plain_rows, padded_rows, bucketed_rows])
def test_completions_of_one_token(layout):
    model, batch = make_policy("gemma3"), make_batch(completion_lengths=(1,) * 6)
    logps, _ = token_logps(model, batch, layout=layout)
    torch.testing.assert_close(logps, hugging_face_logps(model, batch)[0], rtol=0, atol=2e-5)


# ---- what must not matter ----


@every_family
@pytest.mark.parametrize("layout", [plain_rows, padded_rows, bucketed_rows])
def test_padding_changes_nothing(family, layout):
    model, batch = make_policy(family), make_batch()
    wide = pad(batch, left=5, right=3)
    logps, entropy = token_logps(model, batch, 0.7, layout)
    wide_logps, wide_entropy = token_logps(model, wide, 0.7, layout)
    width = batch.completion_ids.shape[1]
    assert_close(wide_logps[:, :width], logps, 1e-5)
    assert_close(wide_entropy[:, :width], entropy, 1e-5)
    assert not wide_logps[:, width:].any() and not wide_entropy[:, width:].any()
    assert_close(lora_gradients(model, wide_logps.sum()), lora_gradients(model, logps.sum()), 1e-5)


@every_family
def test_the_other_rows_of_a_batch_change_nothing(family):
    model, batch = make_policy(family), make_batch()
    together, _ = token_logps(model, batch)
    alone = torch.cat([token_logps(model, part)[0] for part in batch.split(1)])
    assert_close(alone, together, 1e-5)


@every_family
def test_the_order_of_prompts_and_of_completions_changes_nothing(family):
    model, batch = make_policy(family), make_batch()
    prompts, rows = [2, 0, 1], [8, 6, 7, 1, 2, 0, 3, 5, 4]
    shuffled = with_completions(batch, batch.completion_ids[rows], batch.completion_mask[rows])
    shuffled.prompt_ids, shuffled.prompt_mask = batch.prompt_ids[prompts], batch.prompt_mask[prompts]
    assert_close(token_logps(model, shuffled)[0], token_logps(model, batch)[0][rows], 1e-5)


@every_family
@pytest.mark.parametrize("size", [1, 3, 6])  # groups have 3 rows, so the last part of size 6 is smaller
def test_micro_batches_add_up_to_the_whole(family, size):
    model, batch = make_policy(family), make_batch()
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        logps, _ = token_logps(model, batch, 0.7)
    batch.old_per_token_logps = logps + 0.3 * torch.randn(logps.shape, generator=random)
    batch.ref_per_token_logps = logps + 0.3 * torch.randn(logps.shape, generator=random)

    def learn(part):
        logps, _ = token_logps(model, part, 0.7)
        old, ref = part.old_per_token_logps, part.ref_per_token_logps
        loss = grpo_loss(logps, old, ref, part.advantages, part.token_weights, beta=0.1).loss
        return loss.detach(), lora_gradients(model, loss)

    whole_loss, whole_gradients = learn(batch)
    losses, gradients = zip(*(learn(part) for part in batch.split(size)), strict=True)
    assert_close(sum(losses), whole_loss, 1e-5)
    assert_close(sum(gradients), whole_gradients, 1e-5)


# ---- the head in chunks ----


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("tokens_at_once", [1, 10, 107])  # there are 108 tokens
def test_the_chunked_head_equals_the_whole_one(family, tokens_at_once, monkeypatch):
    model, batch = make_policy(family), make_batch()
    logps, entropy = token_logps(model, batch, 0.7)
    gradients = lora_gradients(model, weighted(logps, batch))
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", tokens_at_once * 97)
    chunked_logps, chunked_entropy = token_logps(model, batch, 0.7)
    assert_close(chunked_logps, logps, 1e-6)
    assert_close(chunked_entropy, entropy, 1e-6)
    assert_close(lora_gradients(model, weighted(chunked_logps, batch)), gradients, 1e-6)
    with torch.no_grad():
        assert_close(token_logps(model, batch, 0.7)[0], logps, 1e-6)


@every_family
def test_tokens_after_a_hole_in_the_mask_count(family):
    model, batch = make_policy(family), make_batch()
    mask = batch.completion_mask.clone()
    mask[:, 1] = False
    batch = with_completions(batch, batch.completion_ids, mask)
    assert_close(token_logps(model, batch)[0], token_logps(model, batch, layout=plain_rows)[0], 1e-5)


class LargestOutput(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_no_tensor_holds_the_logits_of_all_tokens(chunked, gradient, monkeypatch):
    vocabulary = 2048
    model, batch = make_policy("gemma3", vocab_size=vocabulary), make_batch(vocabulary=vocabulary)
    all_logits = int(batch.completion_mask.sum()) * vocabulary
    if chunked:
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 4 * vocabulary)
    with LargestOutput() as largest, torch.set_grad_enabled(gradient):
        logps, _ = token_logps(model, batch)
        if gradient:
            logps.sum().backward()
    assert largest.numel < all_logits if chunked else largest.numel >= all_logits


def test_no_logits_are_kept_for_the_backward_pass(monkeypatch):
    model, batch = make_policy("gemma3", vocab_size=2048), make_batch()
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 4 * 2048)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        token_logps(model, batch)
    assert kept and all(2048 not in shape for shape in kept)


# ---- precision ----


@every_family
def test_a_bfloat16_model_learns_in_float32(family):
    model, batch = add_nontrivial_lora(make_model(family).to(torch.bfloat16)), make_batch()
    exact, _ = token_logps(make_policy(family), batch)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    assert dtypes == {torch.float32} and base_model(model).dtype == torch.bfloat16
    logps, entropy = token_logps(model, batch)
    assert logps.dtype == entropy.dtype == torch.float32
    assert (logps - exact).abs().mean() < 0.1
    gradients = lora_gradients(model, logps.sum())
    assert gradients.dtype == torch.float32 and gradients.isfinite().all() and gradients.any()
