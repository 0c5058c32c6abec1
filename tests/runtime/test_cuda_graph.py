"""A decode step recorded as a CUDA graph gives what the step itself gives, and is recorded only when it must be.

The CPU has no such graphs, so the step's operations are recorded and replayed. As with CUDA, a recording computes
nothing, a replay runs no Python, tensors are known by their addresses, and nothing may wait for a result. This does
not notice a tensor on the wrong device; `test_cost_on_cuda.py` does, and `test_on_cuda.py` runs on a GPU.
"""

import copy
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
from tunix_torch.rollout import ladders, rows, steps
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms
from tunix_torch.runtime import device, mesh
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
    """Replace CUDA's recording; yield for every graph the rows of its first argument, and how often it was replayed."""
    counts: list[list[int]] = []

    def record(step: Callable[[], Any], args: Any, pool: Any) -> tuple[int, Callable[[], None]]:
        step()  # the real `record` also runs the step once before
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
    monkeypatch.setattr(cuda_graph, "new_pool", lambda: None)
    monkeypatch.setattr(device, "wait", lambda: None)
    yield counts


def make_policy(family: str = "gemma3", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return add_nontrivial_lora(make_model(family).to(dtype))


def sample_recorded(sampler: Sampler, params: SamplingParams = PARAMS, group: int = GROUP, seed: int = 2) -> Rollout:
    """Sample as on CUDA, where the decode step is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "KIND", "cuda")
        patch.setattr(mesh, "KIND", "cuda")
        return sample_with(sampler, params, group, seed)


def sample_eagerly(
    sampler: Sampler, params: SamplingParams = PARAMS, group: int = GROUP, seed: int = 2, few_shapes: bool = True
) -> Rollout:
    """Sample the same by a new sampler whose step is not recorded, in the same few shapes or in free ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "step_kind", lambda: "eager")
        if few_shapes:
            patch.setattr(rows, "make_ladder", ladders.FewShapes)
        fresh = Sampler(sampler.model, sampler.eos_token_ids, PAD, sampler.stop_check_interval)
        return sample_recorded(fresh, params, group, seed)


def sample_with(sampler: Sampler, params: SamplingParams = PARAMS, group: int = GROUP, seed: int = 2) -> Rollout:
    batch = make_batch()
    place = next(sampler.model.parameters()).device
    uniforms = draw_uniforms((0, seed), range(3 * group), params.max_new_tokens)
    return sampler.sample(batch.prompt_ids.to(place), batch.prompt_mask.to(place), group, params, uniforms)


def assert_equal(left: Rollout, right: Rollout) -> None:
    assert torch.equal(left.completion_ids, right.completion_ids)
    assert torch.equal(left.sampler_logps, right.sampler_logps)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_gives_the_same_completions(family, dtype, replays):
    model = make_policy(family, dtype)
    for params in (PARAMS, SamplingParams(20, 0.6, top_k=20, top_p=0.9), SamplingParams(20, repetition_penalty=2.0)):
        for eos in (SOME, NEVER):
            sampler = Sampler(model, eos, PAD)
            recorded = sample_recorded(sampler, params)
            assert_equal(recorded, sample_eagerly(sampler, params))
            if dtype == torch.float32:
                assert_same(recorded, sample_eagerly(sampler, params, few_shapes=False))
        assert replays[-1][1] == params.max_new_tokens - 1, "it was not replayed for every token"
    assert len(replays) == 6, "of a batch with one shape more than one graph was recorded"


@pytest.fixture
def many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladders, "SHORTEST_HALVED", 2)
    monkeypatch.setattr(ladders, "cache_widths", lambda room: [1, 4, 10, room])


def test_a_graph_is_recorded_for_every_width_of_the_cache_and_size_of_the_groups(replays, many_shapes):
    model = make_policy()
    sampler = Sampler(model, MORE, PAD, 2)
    assert_same(sample_recorded(sampler, group=7), sample_eagerly(sampler, group=7, few_shapes=False))
    assert {rows for rows, _ in replays} == {21, 12, 6}, "no group was halved twice"
    assert len(replays) <= 7 and all(count > 0 for _, count in replays)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_rollout_replays_the_graphs_of_the_last(family, replays, many_shapes):
    """A replay sees other keys, other random numbers and weights changed in place, and leaves earlier results alone."""
    sampler = Sampler(make_policy(family), MORE, PAD, 2)
    first = sample_recorded(sampler, group=7)
    kept, recorded = copy.deepcopy(first), len(replays)
    assert_equal(sample_recorded(sampler, group=7), first)
    assert len(replays) == recorded, "the same rollout was recorded again"
    with torch.no_grad():
        for name, parameter in sampler.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    second = sample_recorded(sampler, group=7, seed=3)
    assert_equal(second, sample_eagerly(sampler, group=7, seed=3))
    assert not torch.equal(second.completion_ids, first.completion_ids)
    assert_equal(first, kept)
    for shape_seed in (2, 3):
        recorded = len(replays)
        sample_recorded(sampler, group=7, seed=shape_seed)
        assert len(replays) == recorded, "shapes that both rollouts had are recorded again"


def test_prompts_of_other_lengths_replay_the_same_graphs(replays, model_folder, tmp_path):
    """Regression: the collator cut every batch to its longest prompt, so that most steps were recorded anew."""
    from trainers import make_trainer

    trainer = make_trainer(model_folder, tmp_path)
    collate, rows = trainer.data_collator, list(trainer.train_dataset)
    by_length = sorted(rows, key=lambda row: len(row["tunix/prompt_ids"]))
    widths, recorded = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "KIND", "cuda")
        patch.setattr(mesh, "KIND", "cuda")
        for some in (by_length[:4], by_length[-4:]):
            batch = collate(some)
            widths.append(batch["prompt_ids"].shape[1])
            uniforms = draw_uniforms((0, 0), range(4 * GROUP), PARAMS.max_new_tokens)
            trainer.sampler.sample(batch["prompt_ids"], batch["prompt_mask"], GROUP, PARAMS, uniforms)
            recorded.append(len(replays))
    assert len(by_length[0]["tunix/prompt_ids"]) < len(by_length[-1]["tunix/prompt_ids"])
    assert widths == [trainer.args.max_prompt_length] * 2 and recorded[0] == recorded[1] > 0


def test_weights_that_have_moved_are_noticed(replays):
    sampler = Sampler(make_policy(), NEVER, PAD)
    before = sample_recorded(sampler)
    parameters = {name: p for name, p in sampler.model.named_parameters() if "lora_B" in name}
    for parameter in parameters.values():
        parameter.data = parameter.data * -1
    after = sample_recorded(sampler)
    assert len(replays) == 2, "it was not recorded anew"
    assert not torch.equal(before.completion_ids, after.completion_ids)
    assert_equal(after, sample_eagerly(sampler))
    first = next(iter(parameters.values()))
    second = next(p for p in parameters.values() if p is not first and p.shape == first.shape)
    first.data, second.data = second.data, first.data
    assert_equal(sample_recorded(sampler), sample_eagerly(sampler))
    assert len(replays) == 3, "two weights that changed places were not noticed"


def test_an_adapter_that_is_switched_off_has_graphs_of_its_own(replays):
    sampler = Sampler(make_policy(), NEVER, PAD)
    on = sample_recorded(sampler)
    with sampler.model.disable_adapter():
        assert_equal(sample_recorded(sampler), sample_eagerly(sampler))
    assert_equal(sample_recorded(sampler), on)
    assert len(replays) == 2


def test_only_the_newest_kinds_of_batches_keep_their_graphs(replays):
    sampler = Sampler(make_policy(), NEVER, PAD)
    for group in range(1, steps.KEPT_RECORDINGS + 1):
        sample_recorded(sampler, group=group)
    for group in range(1, steps.KEPT_RECORDINGS + 1):
        sample_recorded(sampler, group=group)
    assert len(replays) == steps.KEPT_RECORDINGS
    sample_recorded(sampler, group=9)
    sample_recorded(sampler, group=steps.KEPT_RECORDINGS)
    assert len(replays) == steps.KEPT_RECORDINGS + 1
    assert_equal(sample_recorded(sampler, group=1), sample_eagerly(sampler, group=1))
    assert len(replays) == steps.KEPT_RECORDINGS + 2, "the oldest was kept"


def test_results_take_the_place_of_the_first_arguments(replays):
    def step(total: Tensor, number: Tensor, table: list[Tensor]) -> tuple[Tensor, Tensor]:
        table[0].index_copy_(0, number, total[None])
        return total + table[1], number + 1

    recorded = RecordedStep(step, torch.nn.Identity())
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
        RecordedStep(step, torch.nn.Identity())(torch.ones(3))
