"""A GPU computes what the CPU computes, graphs replay what the step does, and nothing waits where nothing should.

These tests need a GPU: `benchmarks/first_gpu.sh` runs them, with TUNIX_DEVICE=cuda.
"""

import warnings

import pytest
import torch
from models import FAMILIES, PAD, add_nontrivial_lora, assert_close, lora_gradients, make_batch, make_model, weighted
from rollouts import GROUP, MORE, NEVER, PARAMS, assert_same
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainers import make_trainer

from tunix_torch.batch import Rollout, TrainBatch
from tunix_torch.learn.logprobs import token_logps
from tunix_torch.learn.passes import bucketed_rows, plain_rows
from tunix_torch.rollout import ladders, rows
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import draw_uniforms
from tunix_torch.runtime import device
from tunix_torch.runtime.products import float32_product

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(device.KIND != "cuda", reason="needs a GPU, and TUNIX_DEVICE=cuda")]

LAYOUTS = {"bucketed": bucketed_rows, "plain": plain_rows}


def make_policy(family, dtype=torch.float32):
    return add_nontrivial_lora(make_model(family).to(dtype))


def sample(sampler, group=GROUP, seed=2):
    batch, place = make_batch(), next(sampler.model.parameters()).device
    uniforms = draw_uniforms((0, seed), range(3 * group), PARAMS.max_new_tokens)
    return sampler.sample(batch.prompt_ids.to(place), batch.prompt_mask.to(place), group, PARAMS, uniforms)


def sample_eagerly(sampler, group=GROUP, seed=2, few_shapes=False):
    """Sample by a step that is not recorded, in the few shapes of the recorded one or in free ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "step_kind", lambda: "eager")
        if few_shapes:
            patch.setattr(rows, "make_ladder", ladders.FewShapes)
        return sample(Sampler(sampler.model, sampler.eos_token_ids, PAD, sampler.stop_check_interval), group, seed)


def in_main_memory(rollout):
    return Rollout(*(tensor.cpu() for tensor in vars(rollout).values()))


def on_gpu(batch):
    kept = {name: getattr(batch, name) for name in ("lengths", "rewards")}
    return TrainBatch(**{k: v if v is None else v.to("cuda") for k, v in vars(batch).items()} | kept)


@pytest.fixture
def many_shapes(monkeypatch):
    monkeypatch.setattr(ladders, "SHORTEST_HALVED", 2)
    monkeypatch.setattr(ladders, "cache_widths", lambda room: [1, 4, 10, room])


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_the_cpu(family, many_shapes):
    model = make_policy(family)
    expected = in_main_memory(sample_eagerly(Sampler(model, MORE, PAD), group=7))
    sampler = Sampler(model.to("cuda"), MORE, PAD, 2)
    for _ in range(2):
        assert_same(in_main_memory(sample(sampler, group=7)), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_gives_bit_for_bit_what_the_step_gives(family, dtype):
    sampler = Sampler(make_policy(family, dtype).to("cuda"), NEVER, PAD)
    for seed in (2, 3):
        recorded, eager = sample(sampler, seed=seed), sample_eagerly(sampler, seed=seed, few_shapes=True)
        assert torch.equal(recorded.completion_ids, eager.completion_ids)
        assert torch.equal(recorded.sampler_logps, eager.sampler_logps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probabilities_and_gradients_are_those_of_the_cpu(family, layout):
    results = []
    for place in ("cpu", "cuda"):
        model, batch = make_policy(family).to(place), make_batch()
        Sampler(model, NEVER, PAD)  # which gives the model this library's attention
        batch = batch if place == "cpu" else on_gpu(batch)
        with pytest.MonkeyPatch.context() as patch:
            if place == "cpu":
                patch.setattr(device, "upload", lambda tensor, place: tensor)
            logps, _ = token_logps(model, LAYOUTS[layout](batch))
        results.append((logps.detach().cpu(), lora_gradients(model, weighted(logps.cpu(), make_batch())).cpu()))
    for of_cpu, of_gpu in zip(*results, strict=True):
        assert_close(of_gpu, of_cpu, 1e-4)


def test_replayed_rollouts_and_learning_passes_wait_for_nothing():
    model = make_policy("gemma3").to("cuda")
    sampler = Sampler(model, NEVER, PAD, stop_check_interval=PARAMS.max_new_tokens)
    batch, given = on_gpu(make_batch()), make_batch()
    ids, mask = given.prompt_ids.to("cuda"), given.prompt_mask.to("cuda")
    uniforms = draw_uniforms((0, 2), range(3 * GROUP), PARAMS.max_new_tokens)
    sampler.sample(ids, mask, GROUP, PARAMS, uniforms)  # records
    token_logps(model, bucketed_rows(batch))[0].sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(ids, mask, GROUP, PARAMS, uniforms)
        token_logps(model, bucketed_rows(batch))[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_waits_four_times_beside_the_looks_of_the_sampler(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=4, micro_batch_size=None, stop_check_interval=4)
    steps = []
    trainer.log = lambda logs, *_: steps.append(len(said))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert max(later - earlier for earlier, later in zip(steps[1:3], steps[2:4], strict=True)) <= 4 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_memory_efficient_kernel_can_compute_attention(dtype, layout):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("in bfloat16 it needs the architecture of an A100 or later")
    model = make_policy("gemma3", dtype).to("cuda")
    Sampler(model, NEVER, PAD)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        token_logps(model, LAYOUTS[layout](on_gpu(make_batch())))[0].sum().backward()


def test_products_of_bfloat16_are_not_rounded():
    a, b = (torch.randn(2, 3, 8, 64).to("cuda", torch.bfloat16).requires_grad_() for _ in range(2))
    product = float32_product(a, b.mT)
    assert product.dtype == torch.float32
    assert_close(product.double(), a.double() @ b.double().mT, 1e-6)
    (of_a,) = torch.autograd.grad(product.sum(), [a])
    assert_close(of_a.double(), b.double().sum(dim=2, keepdim=True).expand_as(a), 1e-2)
