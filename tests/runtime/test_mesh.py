"""Meshes of eight virtual devices give what one device gives: rollouts, losses, gradients, checkpoints, resumed runs.

Each run is a process of its own, since a process keeps its mesh. The tests run by
`TUNIX_DEVICE=xla pytest -m xla tests/runtime/test_mesh.py`.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunix_torch.preflight.hlo import collectives_of

ROOT = Path(__file__).parent.parent.parent
# A run takes STEPS steps and saves a checkpoint after step SAVED.
STEPS, SAVED = 5, 3
ONE, FAST, ALL = (1, 1), (2, 4), ((8, 1), (1, 8), (2, 4), (4, 2))

JOB = """
import sys, torch, torch_xla
from transformers import TrainerCallback
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.learn import passes
from tunix_torch.model import tiny
from tunix_torch.rollout import ladders, rows as rollout_rows
from tunix_torch.runtime import device
from tunix_torch.runtime.mesh import has_mesh, use_mesh
from tunix_torch.model.loading import load_model, place

ladders.cache_widths = lambda room: [3, room]  # so that the KV cache grows
folder, output_dir, mesh, checkpoint = sys.argv[1:]
use_mesh((tuple(map(int, mesh.split(","))), ("fsdp", "tp")))
if has_mesh():
    passes.SHORTEST_PACKED = ladders.SHORTEST_HALVED = 2

def digits_reward(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

def trained():
    return {name: p.detach().cpu().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

class Recorder(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        gradients.append({n: p.grad.cpu().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})

args = GRPOConfig(
    output_dir=output_dir, report_to="none", disable_tqdm=True, max_steps=STEPS, save_steps=SAVED, learning_rate=3e-3,
    per_device_train_batch_size=8, num_completions_per_prompt=4, max_prompt_length=32, generation_max_length=8,
    system_message="", stop_check_interval=2, max_grad_norm=0.0, eval_on_start=True, eval_strategy="steps",
    eval_steps=2, per_device_eval_batch_size=8,
)
rows, eval_rows = tiny.arithmetic_rows("train", 64), tiny.arithmetic_rows("test", 10)
trainer = TunixTrainer(folder, digits_reward, args, rows, eval_rows, callbacks=[Recorder()])
trainer.sampler.eos_token_ids += tuple(range(3, 112, 5))  # so that many end early
initial, gradients, completions = trained(), [], []
packed, lay_out = [], passes.lay_out
def recording_lay_out(*args):
    parts = lay_out(*args)
    packed.extend((trainer.state.global_step, part.blocks[0].segments is not None) for part in parts)
    return parts
passes.lay_out = recording_lay_out
halved, left_of = [], rollout_rows.Rows.left
def recording_left(rows):
    left = left_of(rows)
    if rows.most > 1:
        halved.append(rows.ladder.sizes.index(rows.group_size))
    return left
rollout_rows.Rows.left = recording_left
collect = trainer.collect
def recording_collect(prompts):
    batch = collect(prompts)
    completions.append(batch.completion_ids.cpu().masked_fill(~batch.completion_mask.cpu(), -1))
    return batch
trainer.collect = recording_collect
trainer.train(resume_from_checkpoint=checkpoint or None)
trainer.save_model()
final = trained()
shards = {}
for name, p in trainer.model.named_parameters():
    if has_mesh() and ("embed_tokens" in name or "layers.0.self_attn" in name):
        on_devices = torch_xla._XLAC._get_local_shards([p.data])[0]
        shards[".".join(name.split(".")[-3:])] = [list(shard.shape) for shard, _ in on_devices]
again = place(load_model(output_dir))
reloaded = {name: p.detach().cpu() for name, p in again.named_parameters() if "lora_" in name}
torch.save({"initial": initial, "gradients": gradients, "completions": completions, "final": final,
            "reloaded": reloaded, "shards": shards, "packed": packed, "halved": halved,
            "log": trainer.state.log_history}, output_dir + "/result.pt")
""".replace("STEPS", str(STEPS)).replace("SAVED", str(SAVED))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Save a model. Its vocabulary and heads divide by 8, its KV heads only by 2, so that both layouts occur."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from tunix_torch.model import tiny

    tokenizer = tiny.make_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    folder = tmp_path_factory.mktemp("mesh-model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Return `run(mesh, resumed_from=None)`, which runs that job once and returns what it recorded and its folder."""
    root, done = tmp_path_factory.mktemp("meshes"), {}

    def run(mesh, resumed_from=None):
        if (mesh, resumed_from) not in done:
            checkpoint = "" if resumed_from is None else str(run(resumed_from)["folder"] / f"checkpoint-{SAVED}")
            folder = root / str(len(done))  # the name has no spaces, because XLA_FLAGS has them between flags
            folder.mkdir()
            environment = {**os.environ, "TUNIX_DEVICE": "xla", "PYTHONPATH": str(ROOT)}
            environment["CPU_NUM_DEVICES"] = str(math.prod(mesh))
            if mesh != ONE and resumed_from is None:  # tests read the programs of these
                dump = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=SyncTensors.*"
                environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
            command = [sys.executable, "-c", JOB, model, str(folder), ",".join(map(str, mesh)), checkpoint]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr[-3000:]
            done[mesh, resumed_from] = torch.load(folder / "result.pt") | {"folder": folder, "said": result.stderr}
        return done[mesh, resumed_from]

    return run


pytestmark = [pytest.mark.xla, pytest.mark.thorough]
meshes = pytest.mark.parametrize(
    "mesh", [mesh if mesh == FAST else pytest.param(mesh, marks=pytest.mark.slow) for mesh in ALL]
)
changes = pytest.mark.parametrize(
    "before, after",
    [
        (FAST, ONE),
        *(
            pytest.param(*change, marks=pytest.mark.slow)
            for change in (((8, 1), (1, 8)), ((1, 8), (4, 2)), ((4, 2), FAST), (ONE, (8, 1)))
        ),
    ],
)


def logged(result, name):
    return [row[name] for row in result["log"] if name in row]


@meshes
def test_completions_are_those_of_one_device(run, mesh):
    for step, (ids, expected) in enumerate(zip(run(mesh)["completions"], run(ONE)["completions"], strict=True)):
        assert torch.equal(ids, expected), step


def test_on_a_mesh_some_passes_were_over_packed_completions_and_some_not(run):
    """Packed and plain passes must both occur, to be compared with one device, which packs none. Step 0 rehearses."""
    assert {packed for step, packed in run(FAST)["packed"] if step >= 1} == {True, False}
    assert not any(packed for _, packed in run(ONE)["packed"])


def test_on_a_mesh_some_groups_went_on_with_half_of_their_rows_and_some_did_not(run):
    assert {0} < set(run(FAST)["halved"]) and set(run(ONE)["halved"]) == {0}


@meshes
def test_losses_rewards_and_evaluations_are_those_of_one_device(run, mesh):
    assert len(logged(run(mesh), "kl")) == STEPS and len(logged(run(mesh), "eval_accuracy")) == 4
    for name in ("loss", "reward", "kl", "entropy", "eval_accuracy", "eval_mean_length"):
        assert logged(run(mesh), name) == pytest.approx(logged(run(ONE), name), abs=1e-5), name


@meshes
def test_gradients_are_those_of_one_device(run, mesh):
    for step, (gradients, expected) in enumerate(zip(run(mesh)["gradients"], run(ONE)["gradients"], strict=True)):
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        off = {name: float((gradients[name] - expected[name]).abs().max()) / largest for name in expected}
        assert largest > 0 and max(off.values()) < 1e-5, (step, largest, max(off, key=off.get), max(off.values()))


@meshes
def test_the_saved_adapter_is_that_in_memory_bit_for_bit_and_not_the_initial_one(run, mesh):
    result = run(mesh)
    saved = load_file(result["folder"] / "adapter_model.safetensors")
    assert len(saved) == len(result["final"]) == len(result["reloaded"]) == 28
    for name, weight in result["final"].items():
        assert torch.equal(saved[name.replace(".default", "")], weight), name
        assert torch.equal(result["reloaded"][name], weight), name
        assert not torch.equal(result["initial"][name], weight), name


def test_weights_really_are_split_over_the_mesh(run):
    """Weights are split over tp only: one that fsdp splits too would be gathered for each token that is decoded."""
    shapes = {
        "model.embed_tokens.weight": [28, 64],  # the whole is (112, 64)
        "q_proj.base_layer.weight": [32, 64],  # the whole is (128, 64)
        "o_proj.base_layer.weight": [64, 32],  # the whole is (64, 128)
        "k_proj.base_layer.weight": [32, 64],  # the matrix stays whole, since its two heads do not divide by tp=4
    }
    shards = run(FAST)["shards"]
    assert {name: shards[name] for name in shapes} == {name: [shape] * 8 for name, shape in shapes.items()}
    assert "The 2 KV heads do not divide by tp=4" in run(FAST)["said"]


@meshes
def test_a_decode_step_gathers_neither_cache_nor_weights(run, mesh):
    """A step gathers what layers hand to each other, rows by numbers or by heads and their numbers, and candidates.

    A cache has tokens besides, and so have the scores of attention; no gathered array has as many dimensions.
    """
    texts = [file.read_text() for file in (run(mesh)["folder"] / "dump").glob("*cpu_after_optimizations.txt")]
    steps = [text for text in texts if " dynamic-update-slice(" in text]
    moved = [collective for text in steps for collective in collectives_of(text)]
    assert len(steps) >= 4 and (mesh[1] == 1 or moved), "two widths of the cache, greedy and sampled"
    shapes = [sizes for c in moved if c.kind == "all-gather" for sizes in re.findall(r"\[([\d,]*)\]", c.shape)]
    gathered = {tuple(int(size) for size in sizes.split(",") if size not in ("", "1")) for sizes in shapes}
    assert not {sizes for sizes in gathered if len(sizes) > 3}, gathered
    weights = {(112, 64), (128, 64), (64, 128)}  # of the vocabulary, of MLP and queries, of outputs
    parts = {(a // n, b // m) for a, b in weights for n in (1, 2, 4) for m in (1, 2, 4)}
    assert not gathered & {sizes for sizes in parts if sizes[0] * sizes[1] > 32 * 64}, "more than 32 rows have"


@meshes
def test_no_compilation_after_the_second_step(run, mesh):
    counts = {row["step"]: row["compilations"] for row in run(mesh)["log"] if "compilations" in row}
    assert counts[0] > 0, "nothing was counted"
    assert counts[2] == counts[STEPS], counts  # an evaluation and a checkpoint lie between the two steps


@changes
def test_a_checkpoint_is_resumed_on_another_mesh(run, before, after):
    resumed, whole = run(after, resumed_from=before), run(before)
    for ids, expected in zip(resumed["completions"], whole["completions"][SAVED:], strict=True):
        assert torch.equal(ids, expected)
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), abs=1e-5)
    for name, weight in whole["final"].items():
        assert (resumed["final"][name] - weight).abs().max() < 1e-4, name
