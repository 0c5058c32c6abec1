"""What a step costs on CUDA: host waits, recorded graphs, operations of a decode step, and the kernel of attention.

No GPU is needed: see `host_cuda.py`. PyTorch dispatches everything as on CUDA, so what is counted here is what a GPU
would be given.
"""

import json
import subprocess
import sys

import pytest
import torch
from host_cuda import environment, why_not
from small_jobs import JOBS, log_of_job
from trainers import make_trainer

from tunix_torch.runtime import recorded

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

STEPS = 2
JOB = """
import sys
from collections import Counter
from host_cuda import GPU, HostCuda, end
import torch
from models import add_nontrivial_lora, make_batch, make_model
from trainers import make_trainer
from transformers import TrainerCallback
from tunix_torch.batch import TrainBatch
from tunix_torch.learn.logprobs import token_logps
from tunix_torch.learn.passes import Block, Pass, bucketed_rows, plain_rows
from tunix_torch.model.loading import load_base_model, load_tokenizer
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms
from tunix_torch.runtime import device

class AfterEachStep(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.emptied = gpu.num_emptied

    def on_log(self, args, state, control, **kwargs):
        assert gpu.num_emptied == self.emptied, "the allocator's cache was emptied in a step"
        replays = [graph.num_replays for graph in gpu.graphs]
        self.seen.append({"waits": list(gpu.waits), "replays": replays})
        gpu.waits.clear()

def train(folder, output_dir, steps):
    callback, model = AfterEachStep(), load_base_model(folder, torch.float32)
    trainer = make_trainer(model, output_dir, max_steps=steps, micro_batch_size=None, stop_check_interval=4,
                           callbacks=[callback], processing_class=load_tokenizer(folder))
    trainer.train()
    places = {tensor.device.type for tensor in trainer.model.state_dict().values()}
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {"steps": callback.seen, "log": log, "places": list(places)}

def on_gpu(x):
    if isinstance(x, list):
        return [on_gpu(y) for y in x]
    if isinstance(x, (Block, TrainBatch, Pass)):
        return type(x)(**{k: v if k in ("lengths", "rewards") else on_gpu(v) for k, v in vars(x).items()})
    return x.to(GPU) if isinstance(x, torch.Tensor) else x

def attention_of_passes(family, dtype):
    model = add_nontrivial_lora(make_model(family).to(dtype)).to(GPU)
    Sampler(model, (1,), 0)  # which gives the model this library's attention
    found = {}
    for name, lay_out in {"buckets": bucketed_rows, "plain rows": plain_rows}.items():
        rows = on_gpu(lay_out(make_batch()))
        gpu.operations.clear()
        gpu.waits.clear()
        token_logps(model, rows)[0].sum().backward()
        fused = [n for n in gpu.operations if n.startswith("_scaled_dot_product") and not n.endswith("backward")]
        found[name] = {"fused": fused, "softmax": gpu.operations["_softmax"], "waits": list(gpu.waits)}
    return found

def decode_step(family, dtype):
    counts, batch = [], on_gpu(make_batch())
    for layers in (2, 4):
        kinds = ["sliding_attention", "full_attention"] * (layers // 2)
        model = make_model(family, num_hidden_layers=layers, layer_types=kinds).to(dtype)
        sampler, params = Sampler(add_nontrivial_lora(model).to(GPU), (1,), 0, 32), SamplingParams(4, 0.8, 10, 0.9)
        gpu.graphs.clear()
        sampler.sample(batch.prompt_ids, batch.prompt_mask, 3, params, draw_uniforms((0, 1), range(9), 4))
        (graph,) = gpu.graphs
        counts.append(Counter(name for name, *_ in graph.calls))
    layer = {name: (counts[1][name] - counts[0][name]) / 2 for name in counts[1]}
    rest = {name: counts[0][name] - 2 * layer[name] for name in counts[0]}
    return {"layer": {k: v for k, v in layer.items() if v}, "rest": {k: v for k, v in rest.items() if v}}

folder, output_dir, result, steps, *models = sys.argv[1:]
assert device.KIND == "cuda"
with HostCuda() as gpu:
    found = train(folder, output_dir, int(steps))
    for name in models:
        family, dtype = name.split()[0], getattr(torch, name.split()[1])
        found[name] = attention_of_passes(family, dtype) | decode_step(family, dtype)
end(found, result)
"""

KERNELS = """
import sys
import torch
from host_cuda import GPU, HostCuda, end

found = {}
with HostCuda() as gpu:
    for dtype in ("float32", "bfloat16"):
        q, k = (torch.ones(2, 4, n, 256, dtype=getattr(torch, dtype)).to(GPU).requires_grad_() for n in (9, 21))
        mask = torch.ones(2, 1, 9, 21, dtype=torch.bool).to(GPU)  # as learning has it, of an odd width
        gpu.operations.clear()
        torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask).sum().backward()
        names = ("_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward")
        found[dtype] = [gpu.operations[name] for name in names] + [gpu.operations["_safe_softmax"]]
end(found, sys.argv[1])
"""


SMALL_JOBS = """
import sys
from host_cuda import HostCuda, end
from small_jobs import JOBS, log_of_job

with HostCuda():
    found = {name: log_of_job(name, sys.argv[1]) for name in JOBS}
end(found, sys.argv[2])
"""


def run(job, folder, *args, capability="90"):
    """Run a job in a process that has no GPU but thinks so; return what it has written to its result's file."""
    command = [sys.executable, "-c", job, *map(str, args)]
    done = subprocess.run(command, env=environment(folder, capability), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def measured(model_folder, tmp_path_factory):
    """What each step of a GRPO job cost and logged, and what is dispatched for passes and for a decode step."""
    folder = tmp_path_factory.mktemp("measured")
    run(JOB, folder, model_folder, folder / "out", folder / "result.json", STEPS, *MOST_OPERATIONS)
    return json.loads((folder / "result.json").read_text())


def test_a_job_on_cuda_mixes_no_devices_and_logs_what_the_cpu_logs(measured, model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=STEPS, micro_batch_size=None, stop_check_interval=4)
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    assert measured["places"] == ["cuda"] and len(measured["log"]) == len(expected) == STEPS
    for row, of_cpu in zip(measured["log"], expected, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length"):
            assert row[name] == pytest.approx(of_cpu[name], rel=1e-3, abs=1e-5), name


def test_a_step_waits_four_times_beside_the_looks_of_the_sampler(measured):
    """The completions, the sums of the learning step, whether the gradient is finite, and the loss that is logged."""
    for step in measured["steps"][1:STEPS]:
        looks = [wait for wait in step["waits"] if wait == "download in rows.py, left"]
        others = [wait for wait in step["waits"] if wait not in looks]
        assert len(looks) == 2, "12 tokens are looked at every 4"
        assert len(others) <= 4, others
        assert not any("upload" in wait for wait in others), others


def test_memory_is_given_back_before_a_recording_only_where_little_is_free(monkeypatch):
    """In `measured` there is enough, and the job itself asserts that no step empties the allocator's cache."""
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for free, times in ((2**33, 0), (2**33 - 1, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 2**36))
        recorded._make_room()
        assert len(emptied) == times


def test_graphs_are_kept_between_rollouts(measured):
    first, *later = [step["replays"] for step in measured["steps"][:STEPS]]
    for number, replays in enumerate(later, start=2):
        assert len(replays) == len(first), "a later rollout recorded a graph anew"
        assert replays == [number * count for count in first], "it did not replay them as often as the first"


def test_a_decode_step_has_no_more_operations_than_it_had(measured):
    """A layer's products, norms, rotations and attention, and what chooses the token; docs/gpu.md says what each is."""
    for name, most in MOST_OPERATIONS.items():
        found = measured[name]
        counts = sum(found["layer"].values()), sum(found["rest"].values())
        assert counts[0] <= most[0] and counts[1] <= most[1], (name, counts, found)


MOST_OPERATIONS = {  # of a decode step: in each layer, and beside the layers
    "gemma3 float32": (108, 72),
    "gemma3 bfloat16": (143, 81),
    "gemma2 bfloat16": (126, 74),
}


def test_learning_takes_the_memory_efficient_kernel_where_there_is_no_soft_cap(measured):
    for name in MOST_OPERATIONS:
        found = measured[name]
        for layout in ("buckets", "plain rows"):
            fused, softmax, waits = (found[layout][what] for what in ("fused", "softmax", "waits"))
            capped = name.startswith("gemma2")  # no fused kernel computes its attention
            assert fused == ([] if capped else ["_scaled_dot_product_efficient_attention"]), (name, layout)
            assert bool(softmax) == capped and not waits, (name, layout)


@pytest.mark.parametrize(("capability", "in_bfloat16"), [("75", [0, 0, 1]), ("80", [1, 1, 0])])
def test_heads_of_256_take_that_kernel_on_every_gpu_but_in_bfloat16_on_old_ones(capability, in_bfloat16, tmp_path):
    run(KERNELS, tmp_path, tmp_path / "result.json", capability=capability)
    found = json.loads((tmp_path / "result.json").read_text())
    assert found == {"float32": [1, 1, 0], "bfloat16": in_bfloat16}


@pytest.fixture(scope="module")
def small_jobs(tmp_path_factory):
    """By the name of each small job: the rows of its log, and the kinds of device that its tensors were on."""
    folder = tmp_path_factory.mktemp("small")
    run(SMALL_JOBS, folder, folder / "out", folder / "result.json")
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_so_do_sft_checkpointing_bfloat16_and_the_other_gemmas(name, small_jobs, tmp_path):
    (rows, places), (expected, _) = small_jobs[name], log_of_job(name, tmp_path)
    assert places == ["cuda"] and len(rows) == len(expected) == 2
    for what in ("loss", "grad_norm", *(() if name == "sft" else ("reward", "kl", "entropy"))):
        # In bfloat16 a token may be another one, and then all that follows is; so only the first step is compared.
        for row, of_cpu in list(zip(rows, expected, strict=True))[: 1 if "bfloat16" in name else 2]:
            near = {"rel": 0.3, "abs": 0.3} if "bfloat16" in name else {"rel": 1e-3, "abs": 1e-5}
            assert row[what] == pytest.approx(of_cpu[what], **near), what
