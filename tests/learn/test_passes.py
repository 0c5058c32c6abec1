"""However a batch is laid out, every token is computed once and found again, and the model learns the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import (
    FAMILIES,
    add_nontrivial_lora,
    assert_close,
    lora_gradients,
    make_batch,
    make_model,
    make_policy,
    token_logps,
    weighted,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tunix_torch.config.grpo import GRPOConfig
from tunix_torch.learn import passes
from tunix_torch.learn.packing import first_fit
from tunix_torch.learn.passes import bucketed_rows, lay_out, packed_rows, padded_rows, plain_rows, rehearsals
from tunix_torch.learn.step import learn, logps_without_gradient
from tunix_torch.model.attention import GROUPED
from tunix_torch.model.forward import base_model
from tunix_torch.runtime import device, mesh

ROWS = {
    "padded": padded_rows,
    "bucketed": bucketed_rows,
    "packed in 2": lambda batch: packed_rows(batch, 2),
    "packed in 3": lambda batch: packed_rows(batch, 3),
}
of_every_length = st.lists(st.integers(0, 12), min_size=8, max_size=8).filter(any)


# ---- one layout and another ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("own_attention", [False, True])
@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_gives_the_logps_and_gradients_of_plain_rows(family, own_attention, layout):
    """The groups have completions of 12, 5 and 1 tokens, of 12, 7 and 3, and of 9, 4 and 2."""
    model, batch = make_policy(family), make_batch()
    if own_attention:
        base_model(model).set_attn_implementation(GROUPED)
    plain, plain_entropy = token_logps(model, batch, 0.7, plain_rows)
    logps, entropy = token_logps(model, batch, 0.7, ROWS[layout])
    assert_close(logps, plain, 1e-5)
    assert_close(entropy, plain_entropy, 1e-5)
    assert_close(lora_gradients(model, weighted(logps, batch)), lora_gradients(model, weighted(plain, batch)), 1e-5)


@given(of_every_length)
def test_every_token_is_computed_once_and_its_result_found_again(lengths):
    batch = make_batch((3, 2), lengths)
    numbers = torch.arange(1, batch.completion_ids.numel() + 1).view(batch.completion_ids.shape)
    batch.completion_ids = numbers  # no two tokens are alike
    for layout, lay in ROWS.items():
        rows = lay(batch)
        if rows is None:
            assert layout.startswith("packed"), layout
            continue
        kept = [rows.ids_of(block) for block in rows.blocks]
        if rows.blocks[0].kept is not None:
            kept = [torch.cat([ids.flatten()[b.kept] for ids, b in zip(kept, rows.blocks, strict=True)])]
            assert sorted(kept[0].tolist()) == sorted(set(kept[0].tolist())), "a token is computed twice"
        assert torch.equal(rows.in_place(kept[0])[batch.completion_mask], numbers[batch.completion_mask]), layout


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_packed_completions_lie_each_in_one_bin_and_none_on_another(lengths, num_bins):
    starts = first_fit(lengths, num_bins, 9)
    if starts is None:
        assert sum(lengths) * 2 > num_bins * 9, "bins that are not even half full"
        return
    places = [start + i for start, length in zip(starts, lengths, strict=True) for i in range(length)]
    assert len(set(places)) == len(places) and all(0 <= place < num_bins * 9 for place in places)
    for start, length in zip(starts, lengths, strict=True):
        assert length == 0 or start // 9 == (start + length - 1) // 9


@given(of_every_length)
def test_little_padding_is_computed_where_completions_are_bucketed(lengths):
    rows = bucketed_rows(make_batch((3, 2), [8 * length for length in lengths]))
    for block in rows.blocks:
        assert block.tokens.shape[1] <= 16 or len(block.kept) > 3 / 4 * block.tokens.numel()


# ---- how many passes a batch takes ----


def config(tmp_path, **settings):
    defaults = {"num_completions_per_prompt": 4, "per_device_train_batch_size": 8, "max_prompt_length": 20}
    return GRPOConfig(output_dir=str(tmp_path), **defaults | {"generation_max_length": 12} | settings)


def ragged_batch(num_prompts=8, longest=12):
    """Make groups of four completions, in each of which one is as long as it can be."""
    return make_batch([20] * num_prompts, [1 + (5 * i) % longest if i % 4 else longest for i in range(4 * num_prompts)])


def test_passes_hold_as_many_rows_as_their_real_lengths_allow(tmp_path, monkeypatch):
    args = config(tmp_path)
    monkeypatch.setattr(mesh, "tokens_per_pass", lambda: 100)  # a group at its longest takes 68 tokens
    longest, shortest = (make_batch([20] * 8, [length] * 32) for length in (12, 2))
    for batch, length in ((longest, 12), (shortest, 2)):
        for part in lay_out(batch, args):
            tokens = len(part.batch.prompt_ids) * (20 + 4 * length)
            assert tokens <= 100 or len(part.batch.prompt_ids) == 1, "a pass exceeds the budget"
    groups_each = {len(lay_out(batch, args)) for batch in (longest, shortest)}
    assert len(groups_each) == 2, "shorter completions do not share passes"
    args.gradient_checkpointing = True
    assert len(lay_out(shortest, args)) == max(groups_each), "plain rows are as wide as the longest could be"
    args.micro_batch_size = 16
    assert {len(part.batch.completion_ids) for part in lay_out(shortest, args)} == {16}, "the user's size"


def shapes_of(rows):
    """Return the shapes on which the compiled programs of a pass depend."""
    tensors = [*rows.batch.tensors(), *(t for block in rows.blocks for t in vars(block).values())]
    return tuple(tensor.shape if isinstance(tensor, torch.Tensor) else tensor for tensor in tensors)


@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 8}, {"gradient_checkpointing": True}])
def test_where_shapes_are_static_rehearsals_have_all_that_can_occur(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "static_shapes", lambda: True)
    monkeypatch.setattr(passes, "SHORTEST_PACKED", 12)
    args = config(tmp_path, **settings)
    batch = ragged_batch()
    found = set()
    for length in range(1, 13):
        for lengths in ([length] * 32, [length, *[1] * 31], [12, *[length] * 31]):
            batch.lengths = torch.tensor(lengths)
            found |= {shapes_of(rows) for rows in lay_out(batch, args)}
    rehearsed = {shapes_of(rows) for parts in rehearsals(batch, args) for part in parts for rows in lay_out(part, args)}
    if args.gradient_checkpointing:
        assert len(found) == 1 and not rehearsed, "there is one shape, which the first step compiles"
    else:
        assert found == rehearsed and len(found) == 2
    for parts in rehearsals(batch, args):
        assert not any(part.token_weights.any() for part in parts), "a rehearsal teaches something"


# ---- no pass waits for the device ----

WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive"}


class OnDevice(TorchDispatchMode):
    """Treats some tensors, and all that is computed from them, as a GPU's, and refuses operations that wait for one."""

    def __init__(self, tensors):
        super().__init__()
        # Keys are the addresses of tensors. Tensors are kept, so that no other one gets the same address.
        self.tensors = {}
        self.add(tensors)

    def add(self, tensors):
        for tensor in tensors:
            self.tensors[tensor.untyped_storage().data_ptr()] = tensor.detach()

    def holds(self, tensor):
        return isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self.tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(map(self.holds, tree_leaves((args, kwargs)))):
            name = func._schema.name.removeprefix("aten::")
            assert name not in WAITING, f"{name} waits for a result"
            if name.startswith("index"):
                indices = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, torch.Tensor)]
                assert not any(index.dtype == torch.bool for index in indices), "the result's shape is waited for"
            self.add(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
        return result


class NoCopies(TorchFunctionMode):
    """Refuses copies of a GPU's tensor to main memory, which on the CPU call no operation that `OnDevice` could see."""

    def __init__(self, on_device):
        super().__init__()
        self.on_device = on_device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy):
            assert not self.on_device.holds(args[0]), f"{func.__name__} waits for a result"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: x.tolist(), lambda x: (x * 2).cpu()]
)
def test_what_waits_is_noticed(wait):
    tensor = torch.ones(3)
    with OnDevice([tensor]) as on_device, NoCopies(on_device), pytest.raises(AssertionError, match="wait"):
        wait(tensor)
    with OnDevice([]) as on_device, NoCopies(on_device):
        wait(tensor)


def learn_as_cuda(model, batch, args, monkeypatch):
    """Compute reference log-probabilities and learn from them as on CUDA, where nothing may be waited for."""
    monkeypatch.setattr(device, "KIND", "cuda")
    monkeypatch.setattr(mesh, "KIND", "cuda")
    tensors = [*batch.tensors(), *model.parameters(), *model.buffers()]

    def upload(tensor, place):
        on_device.add([copy := tensor.clone()])
        return copy

    monkeypatch.setattr(device, "upload", upload)
    with OnDevice(tensors) as on_device, NoCopies(on_device):
        return learn_once(model, batch, args)


def learn_once(model, batch, args):
    batch.ref_per_token_logps = logps_without_gradient(model, batch, args)
    return learn(model, batch, args, lambda loss: loss.backward())


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "llama"])
@pytest.mark.parametrize("settings", [{}, {"micro_batch_size": 8}, {"gradient_checkpointing": True}])
def test_on_cuda_nothing_is_waited_for_and_what_is_learned_is_that_of_the_cpu(family, settings, tmp_path, monkeypatch):
    args, results = config(tmp_path, beta=0.1, **settings), []
    for learn_with in (learn_once, lambda *given: learn_as_cuda(*given, monkeypatch)):
        model, batch = add_nontrivial_lora(make_model(family)), ragged_batch()
        batch.sampler_logps = torch.zeros(batch.completion_ids.shape)
        parts = learn_with(model, batch, args)
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((torch.cat([part["logps"] for part in parts]), gradients))
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert_close(on_cuda, on_cpu, 1e-5)


def test_on_cuda_32_short_rows_take_one_pass(tmp_path, monkeypatch):
    """Regression: CUDA took one pass for each group, and cut each of these into buckets, which made 24 passes."""
    args = config(tmp_path, generation_max_length=256, max_prompt_length=256)
    monkeypatch.setattr(device, "KIND", "cuda")
    monkeypatch.setattr(mesh, "KIND", "cuda")
    (rows,) = lay_out(ragged_batch(longest=48), args)
    assert len(rows.blocks) <= 5


def test_on_cuda_the_batch_of_the_benchmarks_takes_three_passes(tmp_path, monkeypatch):
    """16 groups of 8 completions, 256 + 512 tokens: 4,352 tokens a group: the budget of 32,768 holds seven."""
    sizes = {"num_completions_per_prompt": 8, "per_device_train_batch_size": 16}
    args = config(tmp_path, generation_max_length=512, **sizes | {"max_prompt_length": 256})
    monkeypatch.setattr(device, "KIND", "cuda")
    monkeypatch.setattr(mesh, "KIND", "cuda")
    parts = lay_out(make_batch([256] * 16, [512] * 128), args)
    groups = [len(part.batch.prompt_ids) for part in parts]
    assert groups == [6, 6, 4] and max(groups) * (256 + 8 * 512) <= 32_768


def test_any_budget_of_tokens_gives_the_same_numbers(tmp_path, monkeypatch):
    args, results = config(tmp_path), []
    for budget, num_passes in ((100, 8), (300, 2), (32_768, 1), (32_768, 1)):
        monkeypatch.setattr(mesh, "tokens_per_pass", lambda budget=budget: budget)
        model, batch = add_nontrivial_lora(make_model("gemma3")), ragged_batch()
        batch.sampler_logps = torch.zeros(batch.completion_ids.shape)
        parts = learn(model, batch, args, lambda loss: loss.backward())
        assert len(parts) == num_passes
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        results.append((torch.cat([part["logps"] for part in parts]), gradients))
    for logps, gradients in results[:-1]:
        assert_close(logps, results[-1][0], 1e-5)
        assert_close(gradients, results[-1][1], 1e-5)
    assert all(map(torch.equal, results[-1], results[-2])), "equal budgets give numbers that differ"
