"""Scores are float32 before the softmax: in bfloat16, attention errs no more than PyTorch's own, by every path."""

import pytest
import torch
from models import assert_close, make_model
from torch import nn

from tunix_torch.model.attention import SharedPrefixKV, attention_by_sdpa, grouped_attention
from tunix_torch.model.forward import logits
from tunix_torch.runtime import device, products

ROWS, HEADS, KV_HEADS, QUERIES, KEYS, WIDTH = 6, 4, 2, 24, 40, 32
PROMPTS, PREFIX = 2, 16
SCALE, CAP = 0.5, 30.0  # scores of about 4, the largest of 20, so that one rounded to bfloat16 is off by up to 0.06


@pytest.fixture
def tensors():
    """Queries, keys, values and a causal mask; of the rows of a prompt the first keys and values are equal."""
    random = torch.Generator().manual_seed(0)

    def draw(heads, length, scale=1.0):
        return (scale * torch.randn(ROWS, heads, length, WIDTH, generator=random)).bfloat16()

    q, k, v = draw(HEADS, QUERIES, 1.5), draw(KV_HEADS, KEYS), draw(KV_HEADS, KEYS)
    for x in (k, v):
        x[:, :, :PREFIX] = x[:: ROWS // PROMPTS, :, :PREFIX].repeat_interleave(ROWS // PROMPTS, dim=0)
    mask = torch.arange(KEYS) <= torch.arange(KEYS - QUERIES, KEYS)[:, None]
    return q, k, v, mask.expand(ROWS, 1, -1, -1)


def exact(q, k, v, mask, cap=None, weights_in=torch.float64):
    """Attention in float64, but for the type that its weights are rounded to: (R, Q, heads, D)."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1)
    scores = q @ k.mT * SCALE
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(weights_in).double()
    return (weights @ v).transpose(1, 2)


def error(found, expected):
    return float((found.double() - expected).square().mean().sqrt())


def own_error(q, k, v, mask):
    """The error of PyTorch's own attention."""
    repeated = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    own = nn.functional.scaled_dot_product_attention(q, *repeated, attn_mask=mask, scale=SCALE)
    return error(own.transpose(1, 2), exact(q, k, v, mask))


class Layer(nn.Module):
    """What an attention function asks its layer for."""

    num_key_value_groups = HEADS // KV_HEADS


@pytest.fixture(params=["eager", "traced"])
def way(request, monkeypatch):
    """Both forms of the products: where operations run as they are called, and where graphs are traced."""
    monkeypatch.setattr(device, "traces_graphs", lambda: request.param == "traced")


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("attention", [grouped_attention, attention_by_sdpa])
def test_attention_in_bfloat16_errs_no_more_than_pytorchs_own(tensors, attention, cap):
    q, k, v, mask = tensors
    found, _ = attention(Layer(), q, k, v, mask, SCALE, softcap=cap)
    assert error(found, exact(*tensors, cap)) <= 1.02 * own_error(*tensors)


@pytest.mark.parametrize("cap", [None, CAP])
def test_where_graphs_are_traced_only_the_weights_of_attention_are_rounded(tensors, cap, monkeypatch):
    """As PyTorch's fused kernels on a GPU have it: scores and softmax are float32, results have the values' type."""
    monkeypatch.setattr(device, "traces_graphs", lambda: True)
    found, _ = grouped_attention(Layer(), *tensors, SCALE, softcap=cap)
    assert error(found, exact(*tensors, cap)) <= 1.02 * error(
        exact(*tensors, cap, torch.bfloat16).bfloat16(), exact(*tensors, cap)
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cap", [None, CAP])
def test_so_does_a_decode_step(tensors, cap):
    q, k, v, mask = tensors
    q, mask = q[:, :, -1:], mask[:, :, -1:]
    of_prompts = (x[:: ROWS // PROMPTS, :, :PREFIX] for x in (k, v))
    kv = SharedPrefixKV(*of_prompts, *(x[:, :, PREFIX:] for x in (k, v)), None, ROWS // PROMPTS)
    assert kv.scores(q.view(ROWS, KV_HEADS, -1, WIDTH)).dtype == torch.float32
    found, _ = grouped_attention(Layer(), q, kv, kv, mask, SCALE, softcap=cap)
    assert error(found, exact(q, k, v, mask, cap)) <= 1.02 * own_error(q, k, v, mask)


def test_products_have_the_gradient_of_rounded_ones(monkeypatch):
    """On CUDA the product is an operation of its own, which PyTorch gives no gradient. Here the CPU computes it."""
    monkeypatch.setattr(products, "KIND", "cuda")
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 5, 8, generator=random).bfloat16().requires_grad_() for _ in range(2))
    weights = torch.randn(2, 3, 5, 5, generator=random)
    product = products.float32_product(a, b.mT)
    assert_close(product.double(), a.double() @ b.double().mT, 1e-6)
    expected = torch.autograd.grad((a @ b.mT * weights).sum(), [a, b])
    assert all(map(torch.equal, torch.autograd.grad((product * weights).sum(), [a, b]), expected))


def test_on_cuda_the_logits_of_a_head_are_not_rounded(monkeypatch):
    model = make_model("gemma3").bfloat16()
    hidden = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = logits(model, hidden)
    monkeypatch.setattr(products, "KIND", "cuda")
    monkeypatch.setattr(torch, "bmm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T
    assert error(logits(model, hidden), exact) < 1e-2 * error(rounded, exact)
