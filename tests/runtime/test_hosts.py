"""Two processes that take themselves for hosts of one mesh run the same graphs, and only the first writes files.

XLA on the CPU has one process, so each has a whole mesh of its own, and only what they tell each other is real. The
same graphs in the same order are what torch-xla needs of real hosts, on which this has never been run. The tests run
by `TUNIX_DEVICE=xla pytest -m xla tests/runtime/test_hosts.py`.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
# The run takes STEPS steps. In step KILLED, host 1 gets a SIGTERM.
STEPS, KILLED = 3, 2
REWARD = """
import random
def luck_reward(prompts, completions, **columns):
    return [random.SystemRandom().random() for _ in completions]
"""
JOB = """
import os, pathlib, shutil, signal, sys, torch
from tunix_torch import DataConfig, GRPOConfig, ModelConfig, TunixTrainer
from tunix_torch.rollout import ladders
from tunix_torch.run import job
from tunix_torch.runtime import device, mesh, together
import torch_xla.debug.metrics as met

model, host = sys.argv[1], int(sys.argv[2])
mesh.hosts = lambda: (host, 2, "localhost")
ladders.SHORTEST_HALVED = 2
mesh.use_mesh(((2, 2), ("fsdp", "tp")))
result = {"refused": [], "code": None}

def train():
    args = GRPOConfig(
        output_dir="run", report_to="none", max_steps=STEPS, save_steps=9, learning_rate=3e-3, eval_steps=2,
        per_device_train_batch_size=4, num_completions_per_prompt=2, max_prompt_length=32, generation_max_length=6,
        system_message="", stop_check_interval=4, eval_on_start=True, per_device_eval_batch_size=4, save_batches=1,
        early_stopping_patience=9, metric_for_best_model="runtime", resume_from_checkpoint="auto",
    )
    data = DataConfig(num_train_rows=32, num_eval_rows=6, reward_funcs=["luck.luck_reward", model + "/../reward"])
    return job.train(ModelConfig(model_name=model, mesh_shape="2,2", lora_rank=4), data, args)

def expect_refusal(call):
    try:
        call()
    except ValueError as error:
        result["refused"].append(str(error))

def files():
    return {str(path): path.stat().st_mtime_ns for path in pathlib.Path("run").rglob("*")}

step = TunixTrainer.grpo_training_step
def step_with_sigterm(trainer, prompts):
    if host == 1 and trainer.state.global_step == KILLED - 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(trainer, prompts)
TunixTrainer.grpo_training_step = step_with_sigterm
try:
    train()
except SystemExit as end:
    result["code"] = end.code
result["files"] = files()

expect_refusal(train)  # host 1 does not have the checkpoint
if host == 1:
    shutil.copytree("../0/run", "run", ignore=shutil.ignore_patterns("run.lock"))  # which host 0 may just remove
before = files()
trainer = train()
result["written"] = files().keys() - before.keys() | {name for name in before if files()[name] != before[name]}
result["adapter"] = {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}
result["best"] = trainer.state.best_metric
result["log"] = [{k: v for k, v in row.items() if "second" not in k} for row in trainer.state.log_history]
expect_refusal(lambda: together.check_same(lambda: {"seed": 0, "beta": host}))
expect_refusal(lambda: together.decided_by_first(lambda: int("a reward function's mistake")))
result["counted"] = {name: met.counter_value(name) for name in met.counter_names()}
result["measured"] = {name: met.metric_data(name)[0] for name in met.metric_names()}
if host == 1:
    expect_refusal(together.wait)  # host 0 has ended
torch.save(result, "result.pt")
""".replace("STEPS", str(STEPS)).replace("KILLED", str(KILLED))


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Run both hosts; return what each recorded, with the `graphs` that it compiled and ran, in their order."""
    from tunix_torch.model import tiny

    root, tokenizer = tmp_path_factory.mktemp("hosts"), tiny.make_tokenizer()
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    models.make_model("gemma3", vocab_size=len(tokenizer), **special).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    models.save_reward_model(root / "reward")
    (root / "luck.py").write_text(REWARD)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for host in range(2):
        (root / str(host)).mkdir()
        environment = {
            **os.environ,
            "TUNIX_DEVICE": "xla",
            "CPU_NUM_DEVICES": "4",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # this makes compiling faster
            "PT_XLA_DEBUG_LEVEL": "2",
            "PT_XLA_DEBUG_FILE": str(root / f"{host}.graphs"),
            "PYTHONHASHSEED": "0",
            "MASTER_PORT": str(port),
            "PYTHONPATH": f"{ROOT}:{root}",
        }
        command = [sys.executable, "-c", JOB, str(root / "model"), str(host)]
        with open(root / f"{host}.out", "w") as out:
            running.append(subprocess.Popen(command, env=environment, cwd=root / str(host), stdout=out, stderr=out))
    codes = [process.wait(timeout=600) for process in running]
    assert codes == [0, 0], [(root / f"{host}.out").read_text()[-3000:] for host in range(2)]
    graphs = [
        re.findall(r"(\w+ Analysis|hash): .*?([0-9a-f]{20,})", (root / f"{i}.graphs").read_text()) for i in range(2)
    ]
    return [
        torch.load(root / str(i) / "result.pt") | {"graphs": graphs[i], "out": (root / f"{i}.out").read_text()}
        for i in range(2)
    ]


pytestmark = [pytest.mark.xla, pytest.mark.thorough]


def test_both_hosts_run_the_same_graphs_in_the_same_order(hosts):
    first, second = hosts
    assert len(first["graphs"]) > 100 and second["graphs"] == first["graphs"]
    assert first["counted"]["ReplicateShardedData"] > 0, "nothing was gathered from the mesh"
    assert second["counted"] == first["counted"] and second["measured"] == first["measured"]


def test_both_end_with_the_same_adapter_and_metrics_though_rewards_and_clocks_differ(hosts):
    first, second = hosts
    assert all(torch.equal(second["adapter"][name], weight) for name, weight in first["adapter"].items())
    assert any(weight.any() for name, weight in first["adapter"].items() if "lora_B" in name), "nothing was learnt"
    # The last row of the log is left out, since it holds train_runtime.
    assert second["log"][:-1] == first["log"][:-1] and second["best"] == first["best"]


def test_a_sigterm_on_one_host_stops_both_after_the_same_step(hosts):
    assert [result["code"] for result in hosts] == [143, 143]
    assert f"run/checkpoint-{KILLED}/trainer_state.json" in hosts[0]["files"]


def test_only_the_first_host_writes_and_prints(hosts):
    first, second = hosts
    assert {"run/batches/step-0001.safetensors", f"run/checkpoint-{KILLED}/optimizer.pt"} <= first["files"].keys()
    assert {"run/adapter_model.safetensors", "run/training_curves.png"} <= first["written"]
    assert not second["files"] and not second["written"]
    for said in ("2 hosts", "Stopped by SIGTERM", "evaluation: accuracy"):
        assert said in first["out"] and said not in second["out"], said


def test_hosts_that_differ_are_refused_on_each_of_them(hosts):
    for result in hosts:
        missing, differing, undecided, *ended = result["refused"]
        assert missing.startswith(f"files in run/checkpoint-{KILLED}: ") and "but none on host 1" in missing
        assert differing.startswith("beta: 0 on host 0, but 1 on host 1; ")
        assert undecided.endswith("a reward function's mistake\"")
    assert ended and ended[0].startswith("another host or process has ended or says nothing, and so this one ends")


def test_hosts_are_the_workers_of_one_slice_and_need_a_mesh(monkeypatch):
    from tunix_torch.runtime import mesh

    monkeypatch.setattr(mesh.xla_runtime, "process_count", lambda: 2)
    monkeypatch.setattr(mesh, "is_tpu", lambda: True)
    with pytest.raises(ValueError, match="mesh_shape: 2 hosts need a mesh"):
        mesh.use_mesh(None)
    monkeypatch.setattr(mesh, "_mesh", object())
    monkeypatch.setattr(mesh.xla_tpu, "worker_id", lambda: 1)
    monkeypatch.setattr(mesh.xla_tpu, "get_worker_ips", lambda: ["10.0.0.5", "10.0.0.6"])
    assert mesh.hosts() == (1, 2, "10.0.0.5")
    monkeypatch.setattr(mesh.xla_tpu, "get_worker_ips", lambda: ["10.0.0.5"])
    with pytest.raises(ValueError, match="2 hosts, but the slice has 1"):
        mesh.hosts()
