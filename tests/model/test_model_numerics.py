"""`token_logps` computes what Hugging Face's own forward computes, however rows are padded, grouped, cut or chunked."""

from contextlib import nullcontext
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    FAMILIES,
    WINDOW,
    add_nontrivial_lora,
    hugging_face_logits,
    hugging_face_logps,
    make_batch,
    make_model,
)
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunix_torch.grpo import grpo_loss
from tunix_torch.learn import logprobs
from tunix_torch.learn.logprobs import token_logps
from tunix_torch.learn.packing import pack
from tunix_torch.model.attention import GROUPED, attention_masks, prompt_positions
from tunix_torch.model.forward import base_model, logits, reference_policy
from tunix_torch.model.loading import LORA_TARGETS, add_lora

every_family = pytest.mark.parametrize("family", FAMILIES)


def make_policy(family, **overrides):
    return add_nontrivial_lora(make_model(family, **overrides))


def lora_gradients(model, loss):
    """All LoRA gradients of a scalar loss as one vector."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


def weighted(logps, batch):
    """A scalar in which every token counts differently."""
    return (logps * torch.linspace(-1, 2, logps.numel()).view(logps.shape) * batch.completion_mask).sum()


def assert_close(actual, expected, tolerance):
    """Largest difference, relative to the largest entry of what is expected."""
    scale = expected.detach().abs().max()
    assert scale > 1e-3, "nothing to compare with"
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(tolerance * scale))


def pad(batch, left, right):
    """More padding: `left` columns for prompts, `right` for completions, filled with ids that occur in text."""
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
    """The layout of Gemma 4's larger models: no V projection and other KV heads in layers of full attention."""
    overrides = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}
    model, batch = make_policy("gemma4", **overrides), make_batch()
    torch.testing.assert_close(token_logps(model, batch)[0], hugging_face_logps(model, batch)[0], rtol=0, atol=2e-5)


@every_family
def test_sharing_the_prompt_changes_neither_logps_nor_gradients(family):
    model, batch = make_policy(family), make_batch()
    shared, shared_entropy = token_logps(model, batch, 0.7, share_prefix=True)
    plain, plain_entropy = token_logps(model, batch, 0.7, share_prefix=False)
    assert_close(shared, plain, 1e-5)
    assert_close(shared_entropy, plain_entropy, 1e-5)
    assert_close(lora_gradients(model, weighted(shared, batch)), lora_gradients(model, weighted(plain, batch)), 1e-5)


@every_family
@pytest.mark.parametrize("own_attention", [False, True])
@pytest.mark.parametrize("num_bins", [2, 3])
def test_packing_completions_changes_neither_logps_nor_gradients(family, own_attention, num_bins):
    """With bins of 12 tokens for groups of 12 and 5 and 1, of 12 and 7 and 3, and of 9 and 4 and 2 tokens."""
    model, batch = make_policy(family), make_batch()
    if own_attention:
        base_model(model).set_attn_implementation(GROUPED)
    packing, starts = pack(batch.completion_mask.sum(1).tolist(), 3, num_bins, 12)
    logps, entropy = token_logps(model, batch, 0.7)
    packed, packed_entropy = token_logps(model, replace(batch, packing=packing, starts=starts), 0.7)
    assert_close(packed, logps, 1e-5)
    assert_close(packed_entropy, entropy, 1e-5)
    assert_close(lora_gradients(model, weighted(packed, batch)), lora_gradients(model, weighted(logps, batch)), 1e-5)


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4), st.integers(1, 4), st.sampled_from([1, 2]))
def test_every_token_is_packed_once_and_in_its_place(lengths, num_bins, num_groups):
    packed = pack(lengths * num_groups, 4, num_bins, 9)
    if packed is None:
        assert sum(lengths) * 2 > num_bins * 9, "bins that are not even half full"
        return
    packing, starts = packed
    assert packing.shape == (num_groups * num_bins, 9)
    of_group = packing.view(num_groups, -1)
    for group, found in enumerate(of_group):
        for row, length in enumerate(lengths):
            start = int(starts[4 * group + row])
            assert found[start : start + length].tolist() == list(range(row * 9, row * 9 + length))
            assert length == 0 or start // 9 == (start + length - 1) // 9, "in one bin"
        assert int((found >= 0).sum()) == sum(lengths)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_completions_of_one_token(share_prefix):
    model, batch = make_policy("gemma3"), make_batch(completion_lengths=(1,) * 6)
    logps, _ = token_logps(model, batch, share_prefix=share_prefix)
    torch.testing.assert_close(logps, hugging_face_logps(model, batch)[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_masks_are_causal_leave_out_padding_and_let_every_token_see_itself(family):
    """Also at padding: an attention without any key is NaN on some devices."""
    key_mask, query_slots = torch.arange(20) >= torch.tensor([[0], [7]]), torch.tensor([0, 3, 7, 8, 19])
    masks = attention_masks(make_model(family).config, key_mask, query_slots, torch.float32)
    windows = {"full_attention": 20, "sliding_attention": WINDOW}
    masks = masks if isinstance(masks, dict) else {"full_attention": masks}
    for kind, mask in masks.items():
        assert mask.shape == (2, 1, 5, 20)
        for row, i, key in np.ndindex(2, 5, 20):
            query = int(query_slots[i])
            seen = query == key or (bool(key_mask[row, key]) and query - windows[kind] < key < query)
            if family == "gemma2":  # eager attention adds the mask to its scores
                assert mask[row, 0, i, key] == (0.0 if seen else torch.finfo(torch.float32).min)
            else:
                assert mask.dtype == torch.bool and mask[row, 0, i, key] == seen


def test_positions_start_at_the_first_real_token():
    mask = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert prompt_positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


# ---- what must not matter ----


@every_family
@pytest.mark.parametrize("share_prefix", [True, False])
def test_padding_changes_nothing(family, share_prefix):
    model, batch = make_policy(family), make_batch()
    wide = pad(batch, left=5, right=3)
    logps, entropy = token_logps(model, batch, 0.7, share_prefix)
    wide_logps, wide_entropy = token_logps(model, wide, 0.7, share_prefix)
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
    shuffled = replace(
        batch,
        prompt_ids=batch.prompt_ids[prompts],
        prompt_mask=batch.prompt_mask[prompts],
        completion_ids=batch.completion_ids[rows],
        completion_mask=batch.completion_mask[rows],
    )
    assert_close(token_logps(model, shuffled)[0], token_logps(model, batch)[0][rows], 1e-5)


@every_family
@pytest.mark.parametrize("size", [1, 3, 6])  # of groups of 3; the last part of 6 is a smaller one
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


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 99, None])
def test_a_cut_batch_keeps_each_completion_with_its_prompt(size):
    batch = make_batch((3, 2, 4), (1,) * 12)
    numbers = torch.arange(12)
    batch = replace(
        batch,
        prompt_ids=torch.arange(3)[:, None],
        completion_ids=(numbers // 4)[:, None],
        advantages=numbers.float(),
        sampler_logps=numbers[:, None].float(),
    )
    parts = batch.split(size)
    for part in parts:
        copies = len(part.completion_ids) // len(part.prompt_ids)
        assert torch.equal(part.prompt_ids.repeat_interleave(copies, dim=0), part.completion_ids)
        assert len(part.prompt_mask) == len(part.prompt_ids)
        assert part.old_per_token_logps is None and part.ref_per_token_logps is None
    assert all(len(part.completion_ids) == min(size or 12, 12) for part in parts[:-1])
    for field in ("completion_ids", "completion_mask", "advantages", "token_weights", "sampler_logps"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))


# ---- the head in chunks ----


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize("tokens_at_once", [1, 10, 107])  # of 108
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
def test_attention_that_keeps_groups_of_heads_together_is_the_models_own(family):
    model, batch = make_policy(family), make_batch()
    logps, entropy = token_logps(model, batch)
    gradients = lora_gradients(model, weighted(logps, batch))
    base_model(model).set_attn_implementation(GROUPED)
    grouped_logps, grouped_entropy = token_logps(model, batch)
    assert_close(grouped_logps, logps, 1e-5)
    assert_close(grouped_entropy, entropy, 1e-5)
    assert_close(lora_gradients(model, weighted(grouped_logps, batch)), gradients, 1e-5)


@every_family
def test_tokens_after_a_hole_in_the_mask_count(family):
    model, batch = make_policy(family), make_batch()
    mask = batch.completion_mask.clone()
    mask[:, 1] = False
    batch = replace(batch, completion_mask=mask)
    assert_close(token_logps(model, batch)[0], token_logps(model, batch, share_prefix=False)[0], 1e-5)


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


# ---- the reference policy ----


@every_family
def test_the_reference_policy_is_the_model_before_the_lora(family):
    model, batch = make_model(family), make_batch()
    before, _ = token_logps(model, batch)
    model = add_nontrivial_lora(model)
    with reference_policy(model):
        reference, _ = token_logps(model, batch)
    assert torch.equal(reference, before)
    assert not reference.requires_grad


@pytest.mark.parametrize("failure", [False, True])
def test_the_adapter_is_on_and_trainable_after_the_reference_policy(failure):
    model, batch = make_policy("gemma3"), make_batch()
    before, _ = token_logps(model, batch)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(KeyboardInterrupt) if failure else nullcontext(), reference_policy(model):
        assert (token_logps(model, batch)[0] - before).abs().max() > 0.1
        if failure:
            raise KeyboardInterrupt
    after, _ = token_logps(model, batch)
    assert torch.equal(after, before)
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert lora_gradients(model, after.sum()).abs().max() > 0


@every_family
def test_a_fresh_lora_changes_nothing_and_is_all_that_learns(family):
    model, batch = make_model(family), make_batch()
    before, _ = token_logps(model, batch)
    model = add_lora(model, LoraConfig(r=4, target_modules=LORA_TARGETS, task_type="CAUSAL_LM"))
    assert torch.equal(token_logps(model, batch)[0], before)
    assert all(("lora_" in name) == parameter.requires_grad for name, parameter in model.named_parameters())


def test_there_is_no_reference_policy_without_an_adapter():
    with pytest.raises(AssertionError, match="adapter"), reference_policy(make_model("llama")):
        pass


# ---- caps and precision ----


def test_logits_are_soft_capped():
    model = make_model("gemma2")
    hidden = 100 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    raw = model.lm_head(hidden)
    assert raw.abs().max() > 30
    torch.testing.assert_close(logits(model, hidden), 3.0 * torch.tanh(raw / 3.0))


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_the_gemma2_of_these_tests_is_one_whose_caps_matter(cap):
    ids = make_batch().prompt_ids[0]
    capped, free = (hugging_face_logits(make_model("gemma2", **overrides), ids) for overrides in ({}, {cap: None}))
    assert (capped - free).abs().max() > 0.1


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_the_models_of_these_tests_have_windows_that_matter(family):
    ids = make_batch().prompt_ids[0]
    narrow, wide = (
        hugging_face_logits(make_model(family, **overrides), ids) for overrides in ({}, {"sliding_window": 99})
    )
    assert torch.allclose(narrow[:8], wide[:8], atol=1e-4)
    assert (narrow[-1] - wide[-1]).abs().max() > 0.05


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
