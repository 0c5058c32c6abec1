"""All weights, DoRA and copied layers learn through XLA what they learn on the CPU, without compiling again.

XLA runs on the CPU here, through torch-xla or torch_tpu. What the CPU itself computes comes from a second process,
since a process keeps its device for life.
"""

import subprocess
import sys

import pytest
import torch
from graphs import KIND, environment

STEPS = 4

JOB = """
import sys, torch
from models import make_model
from peft import LoraConfig
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.model import tiny
from tunix_torch.runtime import device

SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 2}
CASES = {
    "whole": (None, SYNC),
    "dora": ({"use_dora": True}, SYNC),
    "copied head": ({"modules_to_save": ["lm_head", "input_layernorm", "o_proj"]}, {}),
    "copied embeddings": ({"modules_to_save": ["embed_tokens"]}, {}),
}

def digits_reward(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

tokenizer, results = tiny.make_tokenizer(), {}
tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
for case, (lora, settings) in CASES.items():
    model = make_model("gemma3", **tokens, vocab_size=len(tokenizer), initializer_range=0.05)
    args = GRPOConfig(
        output_dir=f"{sys.argv[1]}/{case}", report_to="none", disable_tqdm=True, max_steps=STEPS, learning_rate=1e-2,
        per_device_train_batch_size=2, max_prompt_length=32, generation_max_length=8, system_message="",
        save_strategy="steps", save_steps=2, adam_epsilon=1e-3, **settings,
    )
    config = lora and LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **lora)
    trainer = TunixTrainer(model, digits_reward, args, tiny.arithmetic_rows("train", 32), processing_class=tokenizer,
                           peft_config=config, full=config is None)
    trainer.train()
    weights = {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}
    results[case] = {"log": trainer.state.log_history, "weights": weights}
if device.traces_graphs():
    from graphs import left_to_the_host
    results["left_to_the_host"] = left_to_the_host()
torch.save(results, sys.argv[1] + "/results.pt")
""".replace("STEPS", str(STEPS))

pytestmark = [pytest.mark.xla, pytest.mark.thorough]
cases = pytest.mark.parametrize("case", ["whole", "dora", "copied head", "copied embeddings"])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the job recorded on each device, by its kind."""
    results = {}
    for kind in ("cpu", KIND):
        folder = tmp_path_factory.mktemp(kind)
        job = [sys.executable, "-c", JOB, str(folder)]
        result = subprocess.run(job, env=environment(kind), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        results[kind] = torch.load(folder / "results.pt")
    return results


@cases
def test_xla_learns_what_the_cpu_learns(results, case):
    cpu, xla = results["cpu"][case], results[KIND][case]
    for name in ("loss", "reward", "kl", "entropy"):
        numbers = [[row[name] for row in run["log"] if name in row] for run in (xla, cpu)]
        assert len(numbers[0]) == STEPS and numbers[0] == pytest.approx(numbers[1], abs=1e-4), name
    for name, weight in cpu["weights"].items():
        assert (xla["weights"][name] - weight).abs().max() < 1e-5, name


@cases
def test_nothing_is_compiled_after_the_second_step(results, case):
    """Neither where the reference moves, after steps 2 and 4, nor after a checkpoint, after step 2."""
    counts = {row["step"]: row["compilations"] for row in results[KIND][case]["log"] if "compilations" in row}
    assert counts[2] == counts[STEPS], counts


def test_no_operation_is_left_to_the_host(results):
    assert results[KIND]["left_to_the_host"] == []
