"""A step that `compile_step` has traced once gives what the plain function gives, whatever has changed."""

import subprocess
import sys

import pytest
import torch
from graphs import KIND, environment, left_to_the_host, only_torch_xla

pytestmark = pytest.mark.xla


class Steps:
    """Runs a step that depends on a layer's weights and buffer, on the state, and on a cache changed in place."""

    def __init__(self, device):
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 4)
        self.layer.register_buffer("scale", torch.full((4,), 0.5))
        self.layer.to(device)

    def __call__(self, state, step, offsets, caches):
        new = torch.tanh(self.layer(state) * self.layer.scale) + 0.25 * offsets
        caches[0].index_copy_(1, step, new[:, None])
        return new + caches[0].sum(1) + caches[1].sum(1), step + 1

    def run(self, function, device, place=lambda tensor: tensor, rows=8):
        """Call the function five times from the same start; return the last state and caches, on the host."""
        start = [torch.ones(rows, 4), torch.zeros(1, dtype=torch.int64), torch.arange(4.0).repeat(rows, 1)]
        state, step, offsets = [tensor.to(device) for tensor in start]
        caches = [tensor.to(device) for tensor in (torch.zeros(rows, 6, 4), torch.ones(rows, 6, 4))]
        for tensor in (state, offsets, *caches):
            place(tensor)
        for _ in range(5):
            state, step = function(state, step, offsets, caches)
        return [tensor.detach().cpu() for tensor in (state, step, *caches)]


def num_traced():
    """How often the step was traced, by torch-xla's count of one of its operations, or by TorchDynamo's of graphs."""
    if KIND == "tpu":
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]
    import torch_xla.debug.metrics as metrics

    return metrics.counter_value("xla::tanh") or 0


def check_steps(place=lambda tensor: tensor):
    """Compare the compiled step with the plain one on the CPU, while weights change in every way they can."""
    from tunix_torch.runtime import device
    from tunix_torch.runtime.compiled import compile_step

    xla, cpu = Steps(device.torch_device()), Steps("cpu")
    for parameter in xla.layer.parameters():
        place(parameter.data)
    with torch.no_grad():
        compiled = compile_step(xla, xla.layer)

        def compare(what, rows=8):
            for got, expected in zip(
                xla.run(compiled, device.torch_device(), place, rows), cpu.run(cpu, "cpu", rows=rows), strict=True
            ):
                assert torch.allclose(got, expected, atol=1e-5), (what, got, expected)

        compare("first call")
        compare("again")
        for steps in (xla, cpu):
            optimizer = torch.optim.AdamW(steps.layer.parameters(), lr=0.1, foreach=False)
            for parameter in steps.layer.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        device.sync()
        compare("after an optimizer step")
        for steps in (xla, cpu):
            steps.layer.weight.data = steps.layer.weight.data * 2
        device.sync()
        compare("other data in a parameter")
        for steps, where in ((xla, device.torch_device()), (cpu, "cpu")):
            steps.layer.weight = torch.nn.Parameter(torch.full((4, 4), 0.3).to(where))
        place(xla.layer.weight.data)
        compare("another parameter")
        for steps in (xla, cpu):
            steps.layer.scale.mul_(3)
        device.sync()
        compare("a buffer")
        traced = num_traced()
        compare("nothing is traced any more")
        assert num_traced() == traced
        compare("another shape", rows=16)
        compare("the first shape again")


def test_a_compiled_step_sees_weights_that_change():
    check_steps()


@only_torch_xla
def test_a_compiled_step_sees_weights_that_change_on_a_mesh():
    code = (
        "from tunix_torch import device; device.use_mesh(((2, 2), ('fsdp', 'tp')))\n"
        "from tunix_torch.runtime.sharding import shard_rows\n"
        "from tests.runtime.test_compiled_step import check_steps\n"
        "check_steps(shard_rows)"
    )
    meshed = environment("xla", CPU_NUM_DEVICES="4")
    result = subprocess.run([sys.executable, "-c", code], env=meshed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@only_torch_xla  # TorchDynamo knows each input by where the step finds it
def test_a_compiled_step_refuses_what_it_would_take_for_a_constant():
    from tunix_torch.runtime import device
    from tunix_torch.runtime.compiled import compile_step

    hidden = torch.ones(4).to(device.torch_device())
    layer = torch.nn.Linear(4, 4).to(device.torch_device())
    state = torch.ones(2, 4).to(device.torch_device())
    with torch.no_grad(), pytest.raises(AssertionError, match="unknown origin"):
        compile_step(lambda state: (layer(state) + hidden,), layer)(state)
    with torch.no_grad(), pytest.raises(AssertionError, match="random"):
        compile_step(lambda state: (layer(state) + torch.rand_like(state),), layer)(state)


@only_torch_xla
@pytest.mark.parametrize("runs", [(5,), (2, 3), (1, 1, 3)])
def test_a_step_that_runs_many_times_in_one_call_leaves_what_as_many_calls_leave(runs):
    """One program serves every number of runs, and arguments that are changed in place have all of the changes."""
    from tunix_torch.runtime import device
    from tunix_torch.runtime.compiled import compile_step

    xla, calls = Steps(device.torch_device()), iter(runs)
    with torch.no_grad():
        expected = Steps("cpu").run(Steps("cpu"), "cpu")
        compiled = compile_step(xla, xla.layer)

        def call(*args):
            number = next(calls, 0)
            return compiled(*args, runs=number) if number else args[:2]

        before = num_traced()
        got = xla.run(call, device.torch_device())
        assert num_traced() - before == 1
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_a_step_is_made_anew_when_the_adapter_is_switched_off(model_folder):
    from tunix_torch import ModelConfig
    from tunix_torch.model.loading import add_lora, load_model, lora_config, place
    from tunix_torch.rollout.sampler import Sampler
    from tunix_torch.rollout.tokens import SamplingParams
    from tunix_torch.runtime import device

    model = add_lora(load_model(model_folder), lora_config(ModelConfig()))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    place(model)
    ids = torch.tensor([[2, 40, 41, 42]]).to(device.torch_device())

    def greedy(sampler):
        params = SamplingParams(6, temperature=0.0)
        return sampler.sample(ids, ids > 0, 1, params, torch.zeros(1, 6)).completion_ids.tolist()

    sampler = Sampler(model, [1], 0)
    on = greedy(sampler)
    with model.disable_adapter():
        off = greedy(sampler)
        assert off == greedy(Sampler(model, [1], 0)) != on
    assert greedy(sampler) == on


def test_nothing_is_compiled_for_completions_of_any_lengths(model_folder, monkeypatch):
    from tunix_torch.model.loading import load_model, place
    from tunix_torch.rollout import ladders
    from tunix_torch.rollout.rows import Rows
    from tunix_torch.rollout.sampler import Sampler
    from tunix_torch.rollout.tokens import SamplingParams
    from tunix_torch.runtime import device

    monkeypatch.setattr(ladders, "cache_widths", lambda room: [4, 8, room])
    monkeypatch.setattr(ladders, "SHORTEST_HALVED", 2)
    model, params = place(load_model(model_folder)), SamplingParams(16)
    ids = torch.tensor([[2, 40, 41, 42], [0, 2, 43, 44]]).to(device.torch_device())

    first_half = tuple(range(model.config.vocab_size // 2))
    sampler = Sampler(model, first_half, 0, stop_check_interval=1, compile_ahead=True)

    levels, left_of = set(), Rows.left

    def noting(rows):
        left = left_of(rows)
        levels.add(rows.ladder.sizes.index(rows.group_size))
        return left

    monkeypatch.setattr(Rows, "left", noting)

    def lengths(num_prompts, wanted):
        """Sample completions of the wanted lengths: the first token of the vocabulary ends one, the last does not."""
        prompts = ids[:num_prompts]
        uniforms = torch.where(torch.arange(16) + 1 < torch.tensor(wanted)[:, None], 1 - 1e-6, 0.0)
        rollout = sampler.sample(prompts, prompts > 0, len(wanted) // num_prompts, params, uniforms)
        return rollout.completion_mask.sum(1).tolist()

    for num_prompts in (2, 1):  # both numbers of prompts make eight rows
        assert lengths(num_prompts, [1] * 8) == [1] * 8
        count = device.num_compilations()
        for wanted in ([16] * 8, [2, 3, 1, 16, 9, 5, 1, 1], [5, 1, 1, 1, 12, 12, 1, 1], [10, 16, 16, 1, 9, 9, 16, 16]):
            assert lengths(num_prompts, wanted) == wanted
        assert device.num_compilations() == count > 0
    assert levels == {0, 1, 2}


@pytest.mark.parametrize("interval", [1, 3])
def test_a_penalty_is_compiled_once_and_stays_on_the_device(model_folder, monkeypatch, interval):
    """Greedy tokens are those of a full forward over each prefix, whose seen tokens are penalised; so they are in the
    first rollout, before which every step is rehearsed."""
    from tunix_torch.model.loading import load_model, place
    from tunix_torch.rollout import ladders
    from tunix_torch.rollout.sampler import Sampler
    from tunix_torch.rollout.tokens import SamplingParams
    from tunix_torch.runtime import device

    monkeypatch.setattr(ladders, "SHORTEST_HALVED", 2)
    monkeypatch.setattr(ladders, "cache_widths", lambda room: [4, 8, room])
    model, params = place(load_model(model_folder)), SamplingParams(16, temperature=0.0, repetition_penalty=1.5)
    ids = torch.tensor([[2, 40, 41, 42], [0, 2, 43, 44]])
    prompts, uniforms = ids.to(device.torch_device()), torch.zeros(2 * 2, 16)
    sampler = Sampler(model, [1], 0, stop_check_interval=interval, compile_ahead=True)

    def sampled():
        rollout = sampler.sample(prompts, prompts > 0, 2, params, uniforms)
        return rollout.completion_ids.cpu(), rollout.completion_mask.cpu()

    ids_found, mask_found = sampled()
    assert not left_to_the_host()
    count = device.num_compilations()
    assert torch.equal(sampled()[0], ids_found)
    assert device.num_compilations() == count > 0

    on_cpu = load_model(model_folder)
    for i in range(4):
        row = ids[i // 2][ids[i // 2] > 0]
        for token in ids_found[i][mask_found[i]].tolist():
            with torch.no_grad():
                scores = on_cpu(input_ids=row[None]).logits[0, -1]
            seen = scores[row]
            scores[row] = torch.where(seen < 0, seen * 1.5, seen / 1.5)
            assert scores.max() - scores[token] < 1e-4
            row = torch.cat((row, torch.tensor([token])))


def test_random_numbers_drawn_for_a_rehearsal_change_none_that_come_after():
    from tunix_torch.runtime import device

    def draw():
        return torch.rand(8, device=device.torch_device()).cpu()

    def two_draws(between):
        with device.random_numbers_kept():
            between()
        return draw(), draw()

    with device.random_numbers_kept():
        expected = two_draws(lambda: None)
    for _ in range(2):
        with device.random_numbers_kept():
            found = two_draws(draw)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(*expected)
