"""The branches that CUDA takes mix no devices: jobs run through them with all tensors on a device that is not the CPU.

No GPU is needed. torch_tpu refuses an operation on tensors of two devices, as CUDA does. What each job logs is what the
CPU logs, which takes branches of its own.
"""

import json
import subprocess
import sys

import pytest
from graphs import KIND, environment

pytestmark = [pytest.mark.xla, pytest.mark.slow, pytest.mark.skipif(KIND != "tpu", reason="about torch_tpu")]

JOB = """
import json, sys
from tunix_torch.runtime import device, mesh, recorded

class Unrecorded:
    # in place of a graph of CUDA: runs the step, and writes its results over the first arguments as a replay does
    def __init__(self, step, model):
        self.step = step
    def __call__(self, *args):
        return args[:recorded.write_over(self.step(*args), args)]
    def forget_moved(self):
        pass
    def forget(self):
        pass

recorded.RecordedStep = Unrecorded  # before anything that takes it from there is imported
if device.KIND == "tpu":  # shapes follow the data, steps are recorded, passes have a budget of tokens, norms are read
    device.static_shapes = device.traces_graphs = lambda: False
    device.step_kind = lambda: "recorded"
    device.counters = lambda: {}
    mesh.merges_lora, mesh.tokens_per_pass = lambda: False, lambda: 32_768

import torch
from models import make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainers import make_trainer
from tunix_torch.model import tiny

family, dtype, output_dir, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
tokenizer = tiny.make_tokenizer()
tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
tokens |= {"vocab_size_per_layer_input": len(tokenizer)} if family == "gemma4" else {}
model = make_model(family, **tokens, vocab_size=len(tokenizer), initializer_range=0.05).to(getattr(torch, dtype))
trainer = make_trainer(model, output_dir, processing_class=tokenizer, max_steps=2, micro_batch_size=None, **settings)
with sdpa_kernel(SDPBackend.MATH):  # torch_tpu's own kernel for attention needs a TPU
    trainer.train()
if device.KIND == "tpu":
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"tpu"}
json.dump(trainer.state.log_history, open(output_dir + "/log.json", "w"))
"""
SETTINGS = {
    "grpo": {},
    "checkpointing": {"gradient_checkpointing": True},
    "iterations": {"num_iterations": 2, "loss_type": "dapo", "entropy_coef": 0.01},
    "sft": {"use_grpo": False, "generation_max_length": 64},
}


def logged(kind, output_dir, family, dtype, settings):
    output_dir.mkdir()
    command = [sys.executable, "-c", JOB, family, dtype, str(output_dir), json.dumps(settings)]
    result = subprocess.run(command, env=environment(kind), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return [row for row in json.loads((output_dir / "log.json").read_text()) if "loss" in row]


@pytest.mark.parametrize(
    "family, dtype, settings",
    [
        *(("gemma3", "float32", name) for name in SETTINGS),
        ("gemma3", "bfloat16", "grpo"),
        *((family, "float32", "grpo") for family in ("gemma2", "gemma4", "llama", "qwen3")),
    ],
)
def test_a_job_through_the_branches_of_cuda_logs_what_the_cpu_logs(tmp_path, family, dtype, settings):
    runs = [logged(kind, tmp_path / kind, family, dtype, SETTINGS[settings]) for kind in ("cpu", "tpu")]
    assert len(runs[0]) == len(runs[1]) == 2
    for name in ("loss", "grad_norm", *(() if settings == "sft" else ("reward", "kl"))):
        # In bfloat16 a token may be another one, and then all that follows is.
        tolerance = {"abs": 1e-3, "rel": 1e-3} if dtype == "float32" else {"abs": 0.3, "rel": 0.3}
        assert runs[1][0][name] == pytest.approx(runs[0][0][name], **tolerance), name
