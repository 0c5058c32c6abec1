"""Pairs and a teacher give through XLA what they give on the CPU, and compile nothing after the second step.

XLA runs on the CPU here, through torch-xla or torch_tpu. Both jobs run in processes of their own.
"""

import json
import subprocess
import sys

import pytest
from graphs import BY_TIMING, KIND, environment

STEPS = 5
JOB = """
import json, sys
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.learn import passes
from tunix_torch.model import tiny
from tunix_torch.rollout import ladders
from tunix_torch.runtime import device

passes.SHORTEST_PACKED = ladders.SHORTEST_HALVED = 2
folder, output_dir, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
args = GRPOConfig(
    output_dir=output_dir, report_to="none", disable_tqdm=True, per_device_train_batch_size=4, max_prompt_length=48,
    system_message="", generation_max_length=24, learning_rate=1e-2, stop_check_interval=4, save_strategy="no",
    per_device_eval_batch_size=4, **settings,
)
rows = [{**row, "question": row["question"] + "!" * (7 * i % 19), "chosen": "so " * (i % 5) + row["answer"],
         "rejected": "no" * (i % 3 + 1)} for i, row in enumerate(tiny.arithmetic_rows("train", 64))]
trainer = TunixTrainer(folder, None, args, rows, rows[:6] if args.preference_loss else None)
trainer.train()
result = {"kind": device.KIND, "log": trainer.state.log_history}
if device.traces_graphs():
    from graphs import BY_TIMING, left_to_the_host
    result["left_to_the_host"] = left_to_the_host()
json.dump(result, open(output_dir + "/result.json", "w"))
"""
JOBS = {
    "dpo": {
        "use_grpo": False,
        "preference_loss": "dpo",
        "eval_steps": 3,
        "eval_strategy": "steps",
        "eval_on_start": True,
        "micro_batch_size": 4,
    },
    "orpo": {"use_grpo": False, "preference_loss": "orpo"},
    "teacher": {"teacher": "FOLDER", "generation_temperature": 1.5},
    "base": {"teacher": "base", "gradient_checkpointing": True},
}

pytestmark = pytest.mark.xla


def run_job(kind, folder, output_dir, settings):
    output_dir.mkdir(parents=True)
    command = [sys.executable, "-c", JOB, folder, str(output_dir), json.dumps({"max_steps": STEPS} | settings)]
    result = subprocess.run(command, env=environment(kind), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((output_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def teacher_folder(model_folder, tmp_path_factory):
    import torch

    from tunix_torch.model import tiny
    from tunix_torch.model.loading import load_base_model

    folder = tmp_path_factory.mktemp("teacher")
    model, random = load_base_model(model_folder, torch.float32), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "name", ["dpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("teacher", "orpo", "base"))]
)
def test_xla_learns_what_the_cpu_learns_and_compiles_nothing_after_the_second_step(
    model_folder, teacher_folder, tmp_path, name
):
    settings = {k: teacher_folder if v == "FOLDER" else v for k, v in JOBS[name].items()}
    cpu, xla = (run_job(kind, model_folder, tmp_path / kind, settings) for kind in ("cpu", KIND))
    assert (cpu["kind"], xla["kind"]) == ("cpu", KIND)
    assert xla["left_to_the_host"] == []
    steps = [[row for row in run["log"] if "loss" in row] for run in (cpu, xla)]
    compilations = [row["compilations"] for row in steps[1]]
    assert len(steps[0]) == STEPS
    for ours, theirs in zip(*steps, strict=True):
        for number in {"loss", "rewards/margins", "logps/chosen", "teacher_kl"} & ours.keys():
            assert theirs[number] == pytest.approx(ours[number], rel=1e-3, abs=1e-4), (number, ours["step"])
    evaluations = [[row["eval_loss"] for row in run["log"] if "eval_loss" in row] for run in (cpu, xla)]
    assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-3, abs=1e-4)
    assert 0 <= compilations[-1] - compilations[1] <= BY_TIMING, compilations
