"""Masks, positions, attention and logits of all families are right, and one model holds policy and reference."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from models import (
    FAMILIES,
    WINDOW,
    add_nontrivial_lora,
    assert_close,
    hugging_face_logits,
    lora_gradients,
    make_batch,
    make_model,
    make_policy,
    token_logps,
    weighted,
)
from peft import LoraConfig

from tunix_torch.model.attention import GROUPED, attention_masks, prompt_positions
from tunix_torch.model.forward import base_model, logits, reference_policy
from tunix_torch.model.loading import LORA_TARGETS, add_lora

every_family = pytest.mark.parametrize("family", FAMILIES)


# ---- masks and attention ----


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
def test_masks_are_causal_leave_out_padding_and_let_every_token_see_itself(family):
    """Padding sees itself too, since attention without any key is NaN on some devices."""
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


# ---- caps and windows ----


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
