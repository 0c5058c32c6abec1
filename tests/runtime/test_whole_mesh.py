"""All weights learn on a mesh of eight virtual devices as on one: rollouts, losses, gradients, checkpoints, resuming.

Each run is a process of its own, since a process keeps its mesh. The tests run by
`TUNIX_DEVICE=xla pytest -m xla tests/runtime/test_whole_mesh.py`.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunix_torch.model.adapter import REFERENCE_FILE

ROOT = Path(__file__).parent.parent.parent
# A run takes STEPS steps, saves a checkpoint after step SAVED, and moves its reference after every second step.
STEPS, SAVED = 5, 3
ONE, MESH = (1, 1), (2, 4)

JOB = """
import sys, torch, torch_xla
from transformers import TrainerCallback
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.model import tiny
from tunix_torch.model.loading import load_model, place
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.runtime.mesh import has_mesh, use_mesh

folder, output_dir, mesh, checkpoint = sys.argv[1:]
use_mesh((tuple(map(int, mesh.split(","))), ("fsdp", "tp")))

def digits_reward(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

def on_cpu(weights):
    return {name: w.detach().cpu().clone() for name, w in weights.items()}

class Recorder(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        gradients.append({n: p.grad.cpu().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})

args = GRPOConfig(
    output_dir=output_dir, report_to="none", disable_tqdm=True, max_steps=STEPS, save_steps=SAVED, learning_rate=3e-3,
    per_device_train_batch_size=8, num_completions_per_prompt=4, max_prompt_length=32, generation_max_length=8,
    system_message="", max_grad_norm=0.0, sync_ref_model=True, ref_model_mixup_alpha=0.5, ref_model_sync_steps=2,
    adam_epsilon=1e-3,  # else where a gradient is nearly 0, its rounding decides where the weight goes
)
rows = tiny.arithmetic_rows("train", 64)
trainer = TunixTrainer(folder, digits_reward, args, rows, callbacks=[Recorder()], full=True)
initial, gradients, completions = on_cpu(dict(trainer.model.named_parameters())), [], []
collect = trainer.collect
def recording_collect(prompts):
    batch = collect(prompts)
    completions.append(batch.completion_ids.cpu().masked_fill(~batch.completion_mask.cpu(), -1))
    return batch
trainer.collect = recording_collect
trainer.train(resume_from_checkpoint=checkpoint or None)
trainer.save_model()

def shape_on_devices(tensor):
    return [list(shard.shape) for shard, _ in torch_xla._XLAC._get_local_shards([tensor])[0]]

shards = {}
if has_mesh():
    for name, p in trainer.model.named_parameters():
        moment = trainer.optimizer.state[p]["exp_avg"]
        shards[name] = [shape_on_devices(tensor) for tensor in (p.data, trainer.reference[name], moment)]
again = place(load_model(output_dir)).eval()
torch.save({"initial": initial, "gradients": gradients, "completions": completions, "shards": shards,
            "final": on_cpu(dict(trainer.model.named_parameters())), "reference": on_cpu(trainer.reference),
            "reloaded": on_cpu(dict(again.named_parameters())), "log": trainer.state.log_history},
           output_dir + "/result.pt")
""".replace("STEPS", str(STEPS)).replace("SAVED", str(SAVED))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Save a model whose vocabulary and heads divide by 8, and its KV heads only by 2."""
    from models import make_model

    from tunix_torch.model import tiny

    tokenizer = tiny.make_tokenizer()
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "head_dim": 16}
    settings = tokens | shape | {"vocab_size": -(-len(tokenizer) // 8) * 8, "initializer_range": 0.1}
    folder = tmp_path_factory.mktemp("mesh-model")
    make_model("gemma3", **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Return `run(mesh, resumed_from=None)`, which runs that job once and returns what it recorded and its folder."""
    root, done = tmp_path_factory.mktemp("meshes"), {}

    def run(mesh, resumed_from=None):
        if (mesh, resumed_from) not in done:
            checkpoint = "" if resumed_from is None else str(run(resumed_from)["folder"] / f"checkpoint-{SAVED}")
            folder = root / str(len(done))
            folder.mkdir()
            environment = {**os.environ, "TUNIX_DEVICE": "xla", "PYTHONPATH": str(ROOT)}
            environment["CPU_NUM_DEVICES"] = str(math.prod(mesh))
            command = [sys.executable, "-c", JOB, model, str(folder), ",".join(map(str, mesh)), checkpoint]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-3000:]
            done[mesh, resumed_from] = torch.load(folder / "result.pt") | {"folder": folder}
        return done[mesh, resumed_from]

    return run


pytestmark = [pytest.mark.xla, pytest.mark.thorough]


def logged(result, name):
    return [row[name] for row in result["log"] if name in row]


def furthest(weights, expected):
    """The largest difference of any weight, by name."""
    return max((float((weight - expected[name]).abs().max()), name) for name, weight in weights.items())


def test_a_mesh_learns_what_one_device_learns(run):
    meshed, single = run(MESH), run(ONE)
    for ids, expected in zip(meshed["completions"], single["completions"], strict=True):
        assert torch.equal(ids, expected)
    assert len(logged(meshed, "kl")) == STEPS and logged(meshed, "kl")[0] == pytest.approx(0, abs=1e-7)
    for name in ("loss", "reward", "kl", "entropy"):
        assert logged(meshed, name) == pytest.approx(logged(single, name), abs=1e-5), name
    for gradients, expected in zip(meshed["gradients"], single["gradients"], strict=True):
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        assert gradients.keys() == meshed["initial"].keys() and furthest(gradients, expected)[0] < 1e-5 * largest
    assert furthest(meshed["final"], single["final"])[0] < 1e-5
    assert furthest(meshed["reference"], single["reference"])[0] < 1e-5


@pytest.mark.parametrize("mesh", [ONE, MESH])
def test_the_saved_model_is_that_in_memory_bit_for_bit(run, mesh):
    result = run(mesh)
    saved = load_file(result["folder"] / "model.safetensors")
    for name, weight in result["final"].items():
        assert torch.equal(saved[name], weight) and torch.equal(result["reloaded"][name], weight), name
        assert not torch.equal(result["initial"][name], weight), name
    kept = load_file(result["folder"] / f"checkpoint-{STEPS}" / REFERENCE_FILE)
    assert kept.keys() == result["reference"].keys()


@pytest.mark.parametrize("resumed_from", [None, MESH])
def test_weights_reference_and_moments_are_split_alike(run, resumed_from):
    """Also in a resumed run, which loads all three from files."""
    shards = run(MESH, resumed_from)["shards"]
    for name, shape in (
        ("model.embed_tokens.weight", [28, 64]),  # the whole is (112, 64)
        ("model.layers.0.self_attn.q_proj.weight", [32, 64]),  # the whole is (128, 64)
        ("model.layers.0.mlp.down_proj.weight", [64, 32]),  # the whole is (64, 128)
        ("model.norm.weight", [64]),
    ):
        assert shards[name] == [[shape] * 8] * 3, name


@pytest.mark.parametrize("mesh", [ONE, MESH])
def test_nothing_is_compiled_after_the_second_step(run, mesh):
    """Neither where the reference moves, after steps 2 and 4, nor where a checkpoint is saved, after step 3."""
    counts = {row["step"]: row["compilations"] for row in run(mesh)["log"] if "compilations" in row}
    assert counts[1] > 0 and counts[2] == counts[STEPS], counts


@pytest.mark.parametrize("after", [ONE, MESH])
def test_a_checkpoint_of_a_mesh_is_resumed(run, after):
    resumed, whole = run(after, resumed_from=MESH), run(MESH)
    for ids, expected in zip(resumed["completions"], whole["completions"][SAVED:], strict=True):
        assert torch.equal(ids, expected)
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    limit = 0 if after == MESH else 1e-5
    assert furthest(resumed["final"], whole["final"])[0] <= limit
    assert furthest(resumed["reference"], whole["reference"])[0] <= limit
