"""What a step costs on CUDA: host waits, recorded graphs, operations of a decode step, and the kernel of attention.

No GPU is needed: see `host_cuda.py`. PyTorch dispatches everything as on CUDA, so what is counted here is what a GPU
would be given.
"""

import json
import subprocess
import sys

import pytest
from host_cuda import environment, why_not
from trainers import make_trainer

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

STEPS = 2
TRAIN = """
import json, sys
from host_cuda import HostCuda
import torch
from trainers import make_trainer
from transformers import TrainerCallback
from tunix_torch.model.loading import load_base_model, load_tokenizer
from tunix_torch.runtime import device

folder, output_dir, result, steps = sys.argv[1:]
seen = []

class AfterEachStep(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        self.emptied = gpu.num_emptied

    def on_log(self, args, state, control, **kwargs):
        replays = [graph.num_replays for graph in gpu.graphs]
        assert gpu.num_emptied == self.emptied, "the allocator's cache was emptied in a step"
        seen.append({"waits": list(gpu.waits), "replays": replays})
        gpu.waits.clear()

assert device.KIND == "cuda"
with HostCuda() as gpu:
    model = load_base_model(folder, torch.float32)
    trainer = make_trainer(model, output_dir, max_steps=int(steps), micro_batch_size=None, stop_check_interval=4,
                           callbacks=[AfterEachStep()], processing_class=load_tokenizer(folder))
    trainer.train()
    places = {tensor.device.type for tensor in trainer.model.state_dict().values()}
log = [row for row in trainer.state.log_history if "loss" in row]
json.dump({"steps": seen, "log": log, "places": list(places)}, open(result, "w"))
"""

DISPATCHED = """
import json, sys
from collections import Counter
from host_cuda import GPU, HostCuda
from models import add_nontrivial_lora, make_batch, make_model
from tunix_torch.learn.logprobs import token_logps
from tunix_torch.learn.passes import Block, Pass, bucketed_rows, plain_rows
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms
from tunix_torch.runtime import device
import torch

def on_gpu(x):
    if isinstance(x, torch.Tensor):
        return x.to(GPU)
    if isinstance(x, list):
        return [on_gpu(y) for y in x]
    if isinstance(x, Block) or type(x).__name__ == "TrainBatch":
        return type(x)(**{k: v if k in ("lengths", "rewards") else on_gpu(v) for k, v in vars(x).items()})
    return x

def attention(gpu, work):
    gpu.operations.clear()
    gpu.waits.clear()
    work()
    fused = [name for name in gpu.operations if name.startswith("_scaled_dot_product") and "backward" not in name]
    return {"fused": fused, "softmax": gpu.operations["_softmax"], "waits": list(gpu.waits)}

found = {}
with HostCuda() as gpu:
    for kind in json.loads(sys.argv[2]):
        family, dtype = kind.split()
        small = add_nontrivial_lora(make_model(family, head_dim=32).to(getattr(torch, dtype))).to(GPU)
        Sampler(small, (1,), 0)
        batch = make_batch()
        laid = {"buckets": bucketed_rows(batch), "plain rows": plain_rows(batch)}
        of_family = found[kind] = {}
        for name, rows in laid.items():
            rows = Pass(on_gpu(rows.batch), on_gpu(rows.blocks), rows.shares_prompts, on_gpu(rows.source))
            of_family[name] = attention(gpu, lambda: token_logps(small, rows)[0].sum().backward())
        steps = []
        for layers in (2, 4):
            kinds = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}
            kinds = kinds if family.startswith("gemma") else {}
            model = make_model(family, num_hidden_layers=layers, **kinds).to(getattr(torch, dtype))
            sampler = Sampler(add_nontrivial_lora(model).to(GPU), (1,), 0, 32)
            gpu.graphs.clear()
            params = SamplingParams(4, 0.8, top_k=10, top_p=0.9)
            ids, mask = (x.to(GPU) for x in (batch.prompt_ids, batch.prompt_mask))
            sampler.sample(ids, mask, 3, params, draw_uniforms((0, 1), range(9), 4))
            (graph,) = gpu.graphs
            steps.append(Counter(name for name, *_ in graph.calls))
        a_layer = {name: (steps[1][name] - steps[0][name]) / 2 for name in steps[1]}
        of_family["layer"] = {name: count for name, count in a_layer.items() if count}
        of_family["rest"] = {name: steps[0][name] - 2 * a_layer[name] for name in steps[0]}
        of_family["rest"] = {name: count for name, count in of_family["rest"].items() if count}
json.dump(found, open(sys.argv[1], "w"))
"""


def run(job, folder, *args, capability="90"):
    """Run a job in a process that has no GPU but thinks so; return what it has written to its result's file."""
    command = [sys.executable, "-c", job, *map(str, args)]
    done = subprocess.run(command, env=environment(folder, capability), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """What three steps of GRPO cost, and what they logged."""
    folder = tmp_path_factory.mktemp("trained")
    run(TRAIN, folder, model_folder, folder / "out", folder / "result.json", STEPS)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def dispatched(tmp_path_factory):
    """What is dispatched for a learning pass and for a decode step, on a GPU of the architecture of an H100."""
    folder = tmp_path_factory.mktemp("dispatched")
    run(DISPATCHED, folder, folder / "result.json", json.dumps(list(MOST_OPERATIONS)))
    return json.loads((folder / "result.json").read_text())


def test_a_job_on_cuda_mixes_no_devices_and_logs_what_the_cpu_logs(trained, model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=STEPS, micro_batch_size=None, stop_check_interval=4)
    trainer.train()
    expected = [row for row in trainer.state.log_history if "loss" in row]
    assert trained["places"] == ["cuda"] and len(trained["log"]) == len(expected) == STEPS
    for row, of_cpu in zip(trained["log"], expected, strict=True):
        for name in ("loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length"):
            assert row[name] == pytest.approx(of_cpu[name], rel=1e-3, abs=1e-5), name


def test_a_step_waits_four_times_beside_the_looks_of_the_sampler(trained):
    """The completions, the sums of the learning step, whether the gradient is finite, and the loss that is logged."""
    for step in trained["steps"][1:STEPS]:
        looks = [wait for wait in step["waits"] if wait == "download in rows.py, left"]
        others = [wait for wait in step["waits"] if wait not in looks]
        assert len(looks) == 2, "12 tokens are looked at every 4"
        assert len(others) <= 4, others
        assert not any("upload" in wait for wait in others), others


def test_graphs_are_kept_between_rollouts(trained):
    first, *later = [step["replays"] for step in trained["steps"][:STEPS]]
    for number, replays in enumerate(later, start=2):
        assert len(replays) == len(first), "a later rollout recorded a graph anew"
        assert replays == [number * count for count in first], "it did not replay them as often as the first"


def test_a_decode_step_has_no_more_operations_than_it_had(dispatched):
    """A layer's products, norms, rotations and attention, and what chooses the token; docs/gpu.md says what each is."""
    for name, most in MOST_OPERATIONS.items():
        found = dispatched[name]
        counts = sum(found["layer"].values()), sum(found["rest"].values())
        assert counts[0] <= most[0] and counts[1] <= most[1], (name, counts, found)


MOST_OPERATIONS = {  # of a decode step: in each layer, and beside the layers
    "gemma3 float32": (0, 0),
    "gemma3 bfloat16": (0, 0),
    "gemma2 bfloat16": (0, 0),
}


def test_learning_takes_the_memory_efficient_kernel_where_there_is_no_soft_cap(dispatched):
    for name, found in dispatched.items():
        for layout in ("buckets", "plain rows"):
            fused, softmax, waits = (found[layout][what] for what in ("fused", "softmax", "waits"))
            capped = name.startswith("gemma2")  # no fused kernel computes its attention
            assert fused == ([] if capped else ["_scaled_dot_product_efficient_attention"]), (name, layout)
            assert bool(softmax) == capped and not waits, (name, layout)
