"""Training through XLA gives what the CPU gives, compiles nothing after warm-up, and leaves nothing to the host.

XLA runs on the CPU here: by torch-xla (`TUNIX_DEVICE=xla pytest -m xla`), or by torch_tpu and a plugin for the CPU
(`make test-tpu`). What the CPU itself computes comes from a second process, since a process keeps its device for life.
"""

import json
import subprocess
import sys

import pytest
import torch
from graphs import BY_TIMING, KIND, ROOT, environment, only_torch_xla

STEPS = 6

# This job runs on either device. Its prompts have many lengths, and it saves the adapter at its end.
JOB = """
import json, sys
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.learn import passes
from tunix_torch.model import tiny
from tunix_torch.rollout import ladders
from tunix_torch.runtime import device

passes.SHORTEST_PACKED = ladders.SHORTEST_HALVED = 2
settings = json.loads(sys.argv[3])
coarse = settings.pop("coarse", False)  # whether most rewards are equal

def length_reward(prompts, completions, **columns):  # which keeps completions of many lengths coming
    if coarse:
        return [float(len(text) > 4) for text in completions]
    return [-abs(len(text) - 4.0) for text in completions]

folder, output_dir = sys.argv[1], sys.argv[2]
args = GRPOConfig(
    output_dir=output_dir, report_to="none", disable_tqdm=True, per_device_train_batch_size=2, max_prompt_length=48,
    system_message="",
    generation_max_length=12, learning_rate=1e-2, stop_check_interval=4, **settings,
)
rows = [{**row, "question": row["question"] + "!" * (7 * i % 19)}
        for i, row in enumerate(tiny.arithmetic_rows("train", 64))]
trainer = TunixTrainer(folder, length_reward, args, rows, tiny.arithmetic_rows("test", 6))
trainer.sampler.eos_token_ids += (31, 38)  # two digits, so that many completions end early
completions, packed, lay_out = [], [], passes.lay_out
def recording_lay_out(*args):
    parts = lay_out(*args)
    packed.extend((trainer.state.global_step, part.blocks[0].segments is not None) for part in parts)
    return parts
passes.lay_out = recording_lay_out
collect = trainer.collect
def recording_collect(prompts):
    batch = collect(prompts)
    lengths = batch.completion_mask.sum(1).tolist()
    completions.append([row[:n] for row, n in zip(batch.completion_ids.tolist(), lengths)])
    return batch
trainer.collect = recording_collect
trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
trainer.save_model()
weights = {
    name: p.detach().cpu().flatten().tolist()
    for name, p in trainer.model.named_parameters()
    if "layers.3.mlp" in name and p.requires_grad
}
result = {"kind": device.KIND, "log": trainer.state.log_history}
result |= {"completions": completions, "weights": weights, "packed": packed}
if device.traces_graphs():
    from graphs import left_to_the_host
    result["left_to_the_host"] = left_to_the_host()
json.dump(result, open(output_dir + "/result.json", "w"))
"""


def run_job(kind, folder, output_dir, **settings):
    output_dir.mkdir(parents=True)
    command = [sys.executable, "-c", JOB, folder, str(output_dir), json.dumps({"max_steps": STEPS} | settings)]
    result = subprocess.run(command, env=environment(kind), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((output_dir / "result.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory, model_folder):
    root = tmp_path_factory.mktemp("xla")
    settings = {"save_strategy": "steps", "save_steps": 3, "eval_on_start": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 4, "num_eval_completions": 2, "per_device_eval_batch_size": 4}
    runs = {kind: run_job(kind, model_folder, root / kind, **settings) for kind in ("cpu", KIND)}
    return runs | {"settings": settings, "folder": root}


pytestmark = pytest.mark.xla


def logged(run, name):
    return [row[name] for row in run["log"] if name in row and "reward" in row]


def test_this_process_and_the_job_really_are_on_the_device(results):
    from tunix_torch.runtime import device

    assert device.KIND == results[KIND]["kind"] == KIND and results["cpu"]["kind"] == "cpu"
    assert device.torch_device().type == KIND


def test_no_operation_is_left_to_the_host(results):
    """What torch-xla lacks runs on the host without a warning."""
    assert results[KIND]["left_to_the_host"] == []


def test_first_five_steps_give_the_same_completions_as_on_the_cpu(results):
    assert results[KIND]["completions"][:5] == results["cpu"]["completions"][:5]


@pytest.mark.parametrize("name", ["loss", "reward", "kl", "entropy"])
def test_first_five_steps_give_the_same_numbers_as_on_the_cpu(results, name):
    assert logged(results[KIND], name)[:5] == pytest.approx(logged(results["cpu"], name)[:5], abs=1e-4)


def test_no_compilation_after_the_second_step_with_prompts_of_many_lengths(results):
    # The last row of each step is the one that counts.
    counts = {row["step"]: row["compilations"] for row in results[KIND]["log"]}
    assert counts[0] > 0, "nothing was counted"
    # an evaluation and a checkpoint lie between the two steps
    assert 0 <= counts[STEPS] - counts[2] <= BY_TIMING, counts


def test_some_passes_were_over_packed_completions_and_some_not(results):
    """Packed and plain passes must both occur, or the test of compilations covers only one. Step 0 only rehearses."""
    assert {packed for step, packed in results[KIND]["packed"] if step >= 1} == {True, False}


def test_adapter_after_training_on_xla_is_that_of_the_cpu(results):
    for name, expected in results["cpu"]["weights"].items():
        assert results[KIND]["weights"][name] == pytest.approx(expected, abs=2e-3), name


@pytest.mark.thorough
def test_a_run_on_xla_agrees_with_tunix(model_folder, tmp_path):
    pytest.importorskip("tunix")
    flags = (
        f"--use_grpo --device {KIND} --max_steps 3 --save_batches 3 --batch_size 2 --learning_rate 1e-2 "
        "--max_completion_length 12 --max_prompt_length 40 --num_eval_rows 2 --system_message="
    ).split()
    train = [sys.executable, "train.py", "--model_name", model_folder, "--output_dir", str(tmp_path / "run"), *flags]
    check = [sys.executable, "-m", "crosscheck", "--from-run", str(tmp_path / "run")]
    for command in (train, check):
        result = subprocess.run(command, env=environment(KIND), cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "all within tolerance" in result.stdout and "LoRA gradients" in result.stdout


@pytest.mark.thorough
def test_resumed_on_xla_equals_uninterrupted(results, model_folder, tmp_path):
    resume = {**results["settings"], "resume_from_checkpoint": str(results["folder"] / KIND / "checkpoint-3")}
    resumed = run_job(KIND, model_folder, tmp_path / "resumed", **resume)
    assert resumed["completions"] == results[KIND]["completions"][3:]
    for name, expected in results[KIND]["weights"].items():
        assert resumed["weights"][name] == pytest.approx(expected, abs=1e-6), name


@pytest.mark.thorough
def test_a_job_with_gradient_checkpointing_gives_what_the_cpu_gives_without(results, model_folder, tmp_path):
    settings = {"gradient_checkpointing": True, "max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    run = run_job(KIND, model_folder, tmp_path / "run", **settings)
    # Later completions are not compared, since the learning rate depends on max_steps.
    assert run["completions"] == results["cpu"]["completions"][:2]
    for name in ("loss", "kl"):
        assert logged(run, name) == pytest.approx(logged(results["cpu"], name)[:2], abs=1e-4)
    assert run["left_to_the_host"] == []


@pytest.mark.slow
def test_an_adapter_that_is_trained_further_by_accumulated_batches_is_that_of_the_cpu(results, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "loss_aggregation": "token-mean", "max_steps": 4}
    runs = [run_job(kind, str(results["folder"] / "cpu"), tmp_path / kind, **settings) for kind in ("cpu", KIND)]
    assert runs[0]["completions"][:4] == runs[1]["completions"][:4]
    for name in ("loss", "kl", "pg_loss", "grad_norm"):
        assert logged(runs[1], name)[:2] == pytest.approx(logged(runs[0], name)[:2], abs=1e-3), name
    assert logged(runs[1], "kl")[0] == pytest.approx(0, abs=1e-6) and logged(runs[1], "kl")[1] > 1e-6
    counts = {row["step"]: row["compilations"] for row in runs[1]["log"]}
    assert 0 <= counts[4] - counts[2] <= BY_TIMING, counts
    assert runs[1]["left_to_the_host"] == []


@pytest.mark.slow
def test_shared_rollouts_that_are_sampled_in_rounds_are_those_of_the_cpu(model_folder, tmp_path):
    """Half of the rewards are equal, so later steps need other numbers of rounds; none of them compiles anything."""
    settings = {"steps_per_generation": 2, "dynamic_sampling": True, "repetition_penalty": 1.3, "min_p": 0.001}
    runs = [
        run_job(kind, model_folder, tmp_path / kind, coarse=True, max_steps=8, **settings) for kind in ("cpu", KIND)
    ]
    # Of later rollouts single tokens may differ, since AdamW turns the rounding of small gradients into whole steps.
    assert runs[0]["completions"][0] == runs[1]["completions"][0]
    rounds = logged(runs[1], "dynamic_sampling/rounds")
    assert rounds[:2] == logged(runs[0], "dynamic_sampling/rounds")[:2] and len(set(rounds)) > 1, rounds
    for name in ("loss", "kl", "grad_norm"):
        assert logged(runs[1], name)[:2] == pytest.approx(logged(runs[0], name)[:2], abs=1e-3), name
    counts = {row["step"]: row["compilations"] for row in runs[1]["log"]}
    assert 0 <= counts[8] - counts[3] <= BY_TIMING, counts
    assert runs[1]["left_to_the_host"] == []


@only_torch_xla
def test_gradient_checkpointing_is_refused_where_a_gradient_would_be_lost():
    from models import add_nontrivial_lora, make_model

    from tunix_torch.model.forward import recompute_layers

    with pytest.raises(ValueError, match="layers share keys and values"):
        recompute_layers(add_nontrivial_lora(make_model("gemma4")))
    with pytest.raises(ValueError, match="gradient_checkpointing_kwargs=.*takes none"):
        recompute_layers(add_nontrivial_lora(make_model("gemma3")), {"use_reentrant": False})


def test_layers_under_gradient_checkpointing_give_the_same_gradient():
    from models import add_nontrivial_lora, make_batch, make_model

    from tunix_torch.learn.logprobs import token_logps
    from tunix_torch.learn.passes import plain_rows
    from tunix_torch.model.attention import ATTENTION
    from tunix_torch.model.forward import base_model, recompute_layers
    from tunix_torch.model.loading import place
    from tunix_torch.runtime import device

    model = place(add_nontrivial_lora(make_model("gemma3"))).train()
    base_model(model).set_attn_implementation(ATTENTION)  # as the trainer does
    batch = make_batch(place=device.torch_device())
    passes = []
    base_model(model).get_decoder().layers[0].mlp.register_forward_hook(
        lambda *_: passes.append(torch.is_grad_enabled())
    )

    def gradients():
        token_logps(model, plain_rows(batch))[0].square().sum().backward()
        device.sync()  # without this, each gradient would be a graph of its own
        found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        return found

    expected = gradients()
    recompute_layers(model)
    got = gradients()
    assert len(passes) == 1 + 2, "computed once, then twice"
    assert passes.count(False) == device.recomputes_reentrantly(), "re-entrant: the first time without a graph"
    for name in expected:
        assert expected[name].abs().max() > 0
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "loss_type": "vespo",
            "sampler_correction": "token_truncate",
            "use_adaptive_entropy": True,
            "entropy_coef": 0.02,
            "entropy_target": 4.2,
            "top_entropy_quantile": 0.4,
            "mask_truncated_completions": True,
            "num_iterations": 2,
            "off_policy_mask_threshold": 0.05,
        },
        {
            "loss_type": "sapo",
            "sampler_correction": "sequence_mask",
            "entropy_coef": 0.05,
            "use_bias_correction_kl": True,
            "scale_rewards": "batch",
            "gradient_accumulation_steps": 2,
            "overlong_buffer_length": 4,
        },
    ],
    ids=["vespo", "sapo"],
)
@pytest.mark.slow
def test_other_losses_give_the_same_numbers_and_compile_nothing_after_the_second_step(model_folder, tmp_path, settings):
    """With an adaptive entropy bonus too, whose weight is another number in each step.

    A mask is a step function, so that rounding grows: only three steps are compared.
    """
    cpu, xla = (run_job(kind, model_folder, tmp_path / kind, save_strategy="no", **settings) for kind in ("cpu", KIND))
    for name in ("loss", "kl", "entropy", "entropy_coef", "sampling/importance_sampling_ratio/mean"):
        assert logged(xla, name)[:3] == pytest.approx(logged(cpu, name)[:3], rel=1e-3, abs=1e-4), name
    compilations = logged(xla, "compilations")
    assert 0 <= compilations[-1] - compilations[1] <= BY_TIMING and xla["left_to_the_host"] == []
