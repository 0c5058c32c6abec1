"""The decode step as a CUDA graph: recorded and replayed by its operations on the CPU, which has no such graphs.

As there, a recording computes nothing, a replay runs no Python, tensors are known by their addresses, and nothing may
wait for a result. A tensor on the wrong device is not seen so: the one test that needs a GPU would find it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from models import FAMILIES, PAD, add_nontrivial_lora, make_batch, make_model
from rollouts import GROUP, MORE, NEVER, PARAMS, SOME, assert_same
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tunix_torch.batch import Rollout
from tunix_torch.rollout import rows as static_rows
from tunix_torch.rollout.sampler import Sampler, SamplingParams, draw_uniforms
from tunix_torch.runtime import device
from tunix_torch.runtime import recorded as cuda_graph
from tunix_torch.runtime.recorded import RecordedStep

WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive", "lift_fresh"}


class Recording(TorchDispatchMode):
    """Keeps every operation with its tensors, and undoes what it changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert name not in WAITING, f"{name} waits for a result, or copies from the host"
        if name == "index":
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "shapes follow the data"
        for arg, declared in zip(args, func._schema.arguments, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                self.before.append((arg, arg.clone()))
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def undo(self) -> None:
        for tensor, was in reversed(self.before):
            tensor.copy_(was)

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Of every graph that is recorded, the shape of the first argument, and how often it has been replayed."""
    counts: list[list[int]] = []

    def record(step: Callable[[], Any], args: Any) -> tuple[int, Callable[[], None]]:
        step()  # as in the original
        with Recording() as recording:
            num_results = cuda_graph.write_over(step(), args)
        recording.undo()
        counts.append([len(args[0]), 0])
        mine = counts[-1]

        def replay() -> None:
            mine[1] += 1
            recording.replay()

        return num_results, replay

    monkeypatch.setattr(cuda_graph, "record", record)
    monkeypatch.setattr(device, "wait", lambda: None)
    yield counts


def make_unplaced(family: str = "gemma3", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A policy whose layers are those of Transformers and PEFT, as on CUDA: `place` would speed them up for the CPU."""
    return add_nontrivial_lora(make_model(family).to(dtype))


def make_sampler(model: torch.nn.Module, eos: tuple[int, ...], interval: int = 16) -> Sampler:
    sampler = Sampler(model, eos, PAD, interval)
    sampler._decode = sampler._decode_static
    return sampler


def sample_recorded(sampler: Sampler, params: SamplingParams = PARAMS, group: int = GROUP) -> Rollout:
    """A rollout whose decode step is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "KIND", "cuda")
        return sample_with(sampler, params, group)


def sample_with(sampler: Sampler, params: SamplingParams = PARAMS, group: int = GROUP) -> Rollout:
    batch = make_batch()
    place = next(sampler.model.parameters()).device
    uniforms = draw_uniforms((0, 2), range(3 * group), params.max_new_tokens)
    return sampler.sample(batch.prompt_ids.to(place), batch.prompt_mask.to(place), group, params, uniforms)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [PARAMS, SamplingParams(20, 0.6, top_k=20, top_p=0.9)])
def test_a_recorded_step_gives_the_same_completions(family, dtype, params, replays):
    model = make_unplaced(family, dtype)
    for eos in (SOME, NEVER):
        sampler = make_sampler(model, eos)
        recorded, expected = sample_recorded(sampler, params), sample_with(sampler, params)
        assert torch.equal(recorded.completion_ids, expected.completion_ids)
        assert torch.equal(recorded.sampler_logps, expected.sampler_logps)
        if dtype == torch.float32:
            assert_same(recorded, sample_with(Sampler(model, eos, PAD), params))  # rows leave, shapes follow the data
    assert replays[1][1] == params.max_new_tokens - 1, "it was not replayed for every token"
    assert len(replays) == 2, "of a batch with one shape more than one graph was recorded"


def test_a_graph_is_recorded_for_every_width_of_the_cache_and_size_of_the_groups(replays, monkeypatch):
    monkeypatch.setattr(static_rows, "SHORTEST_HALVED", 2)
    monkeypatch.setattr(static_rows, "cache_widths", lambda room: [1, 4, 10, room])
    model = make_unplaced()
    rollout = sample_recorded(make_sampler(model, MORE, interval=2), group=7)
    assert_same(rollout, sample_with(Sampler(model, MORE, PAD), group=7))
    assert {rows for rows, _ in replays} == {21, 12, 6}, "no group was halved twice"
    assert len(replays) <= 7 and all(count > 0 for _, count in replays)


def test_the_next_batch_sees_weights_wherever_they_are(replays):
    model = make_unplaced()
    sampler = make_sampler(model, NEVER)
    before = sample_recorded(sampler)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:  # in place, as an optimizer does, or in another place
                parameter.data = parameter * -1 if i % 2 else parameter.mul_(-1).data
    after = sample_recorded(sampler)
    assert not torch.equal(before.completion_ids, after.completion_ids)
    assert_same(after, sample_with(sampler))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_itself_records_the_step(family, monkeypatch):
    monkeypatch.setattr(static_rows, "SHORTEST_HALVED", 2)
    monkeypatch.setattr(static_rows, "cache_widths", lambda room: [1, 4, 10, room])
    model = make_unplaced(family)
    expected = sample_with(Sampler(model, MORE, PAD), group=7)
    rollout = sample_recorded(make_sampler(model.to("cuda"), MORE, interval=2), group=7)
    assert_same(Rollout(*(tensor.cpu() for tensor in vars(rollout).values())), expected)


def test_results_take_the_place_of_the_first_arguments(replays):
    def step(total: Tensor, number: Tensor, table: list[Tensor]) -> tuple[Tensor, Tensor]:
        table[0].index_copy_(0, number, total[None])
        return total + table[1], number + 1

    recorded = RecordedStep(step)
    total, number, table = torch.zeros(2), torch.zeros(1, dtype=torch.int64), [torch.zeros(4, 2), torch.ones(2)]
    for i in range(3):
        results = recorded(total, number, table)
        assert results[0] is total and results[1] is number
        assert total.tolist() == [i + 1.0] * 2 and int(number) == i + 1
    assert table[0].tolist() == [[0.0] * 2, [1.0] * 2, [2.0] * 2, [0.0] * 2]
    assert replays == [[2, 3]]
    other = [tree_map_only(Tensor, torch.clone, arg) for arg in (total, number, table)]
    recorded(*other)
    assert total.tolist() == [3.0] * 2 and other[0].tolist() == [4.0] * 2
    assert replays == [[2, 3], [2, 1]]


@pytest.mark.parametrize(
    "step",
    [
        lambda x: (x * float(x.sum()),),
        lambda x: (x[x > 0],),
        lambda x: (x + torch.tensor(1.0),),
        lambda x: (x * torch.equal(x, x),),
    ],
)
def test_what_cuda_could_not_record_is_refused(step, replays):
    with pytest.raises(AssertionError, match="waits|follow the data"):
        RecordedStep(step)(torch.ones(3))
