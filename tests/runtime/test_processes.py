"""Two processes with half of the prompts each give what one process gives: completions, losses, gradients, LoRA.

They talk through gloo on the CPU, as processes of several GPUs under `accelerate launch` talk through NCCL.
"""

import pytest
import torch
from several_processes import asked_for, launch, marked

pytestmark = pytest.mark.thorough

# A case takes STEPS optimizer steps, each with PROMPTS prompts over all processes.
STEPS, PROMPTS = 4, 4

JOB = """
import sys, datasets, torch
from transformers import TrainerCallback
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.model import tiny
from tunix_torch.runtime import together
from several_processes import completions_of, make_pairs, settings_of_case, spoil_loss
from trainers import digits_reward

folder, root, steps, prompts = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
asked = sys.argv[5].split(",")

def capitals_reward(prompts, completions, log_metric, log_extra, **columns):
    log_metric("capitals", sum(c.isupper() for text in completions for c in text) / len(completions))
    log_extra("length", [len(ids) for ids in columns["completion_ids"]])
    return [None if "e" in text else sum(c.isupper() for c in text) / 4 for text in completions]

def picky_reward(prompts, completions, **columns):
    if any(len(prompt) % 4 == 0 for prompt in prompts):
        raise ValueError("not this prompt")
    return digits_reward(prompts, completions)

def trained(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

class Recorder(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})

CASES = {
    "grpo": {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2,
             "num_eval_completions": 2, "eval_on_start": True},
    "resumed": {},
    "token_mean": {"loss_aggregation": "token-mean", "micro_batch_size": 1, "num_iterations": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "micro_batch_size": 4},
    "shared": {"steps_per_generation": 2},
    "streamed": {},
    "whole": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "batch": {"scale_rewards": "batch", "top_entropy_quantile": 0.5, "use_adaptive_entropy": True, "entropy_coef": 0.1,
              "entropy_target": 4.4, "mask_truncated_completions": True, "sampler_correction": "token_truncate"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum", "gradient_accumulation_steps": 2},
    "dropped": {"on_reward_error": "skip_group", "max_reward_errors": 1.0, "scale_rewards": "batch"},
    "sft": {"use_grpo": False, "eval_strategy": "steps", "eval_steps": 2, "generation_max_length": 64},
    "pairs": {"use_grpo": False, "eval_strategy": "steps", "eval_steps": 2, "preference_loss": "dpo"},
    "skipped": {"use_grpo": False, "generation_max_length": 64},
}
GRPOConfig(output_dir=root)  # joins the processes
for case in asked:
    settings = CASES[case]
    args = GRPOConfig(**settings_of_case(root, case, steps, prompts) | settings)
    rows = tiny.arithmetic_rows("train", 64)
    if case == "streamed":
        rows = datasets.Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=3, buffer_size=8)
    functions, eval_rows = [digits_reward, capitals_reward], tiny.arithmetic_rows("test", 7)
    if case == "dropped":
        functions[0] = picky_reward
    if case == "pairs":
        functions = None
        make_pairs(rows + eval_rows)
    trainer = TunixTrainer(folder, functions, args, rows, eval_rows, callbacks=[Recorder()], full=case == "whole")
    gradients, completions = [], completions_of(trainer)
    if case == "skipped":  # the loss of the last process alone is not finite, in the third step
        spoil_loss(trainer, 2)
    trainer.train(resume_from_checkpoint=f"{root}/grpo/checkpoint-2" if case == "resumed" else None)
    trainer.save_model()
    answers = trainer.last_answers and trainer.last_answers.completions
    result = {"gradients": gradients, "completions": completions, "weights": trained(trainer), "answers": answers,
              "log": trainer.state.log_history, "processes": together.count(), "extra": trainer.scorer.last_extra}
    everyones = together.gather(result["weights"])
    assert all(torch.equal(everyones[0][name], other[name]) for other in everyones for name in other)
    if together.index() == 0:
        torch.save(result, f"{root}/{case}.pt")

def failing_reward(prompts, completions, trainer_state, **columns):
    if trainer_state.global_step == 2 and together.index() == together.count() - 1:
        raise ValueError("this process only")
    return digits_reward(prompts, completions)

args = GRPOConfig(output_dir=f"{root}/failed/{together.index()}", max_steps=4, save_strategy="steps", save_steps=100,
                  per_device_train_batch_size=2, num_completions_per_prompt=2, generation_max_length=12,
                  max_prompt_length=40, system_message="", report_to="none", disable_tqdm=True)
try:
    TunixTrainer(folder, failing_reward, args, tiny.arithmetic_rows("train", 64)).train()
except ValueError as error:
    torch.save([str(error), *error.__notes__], f"{root}/failed-{together.index()}.pt")
"""
CASES = (
    "grpo",
    "resumed",
    "token_mean",
    "accumulated",
    "shared",
    "streamed",
    "whole",
    "batch",
    "gdpo",
    "dropped",
    "sft",
    "pairs",
    "skipped",
)


SLOW = ("token_mean", "batch", "gdpo", "pairs")


@pytest.fixture(scope="module")
def results(request, model_folder, tmp_path_factory):
    """Run the cases by one process and by two; return, for each number, what every case recorded, and the "folder"."""
    results, asked = {}, asked_for(request, CASES, SLOW)
    for number in (1, 2):
        root = tmp_path_factory.mktemp(f"processes-{number}")
        launch(JOB, number, root, model_folder, root, STEPS, PROMPTS, ",".join(asked))
        results[number] = {case: torch.load(root / f"{case}.pt") for case in asked} | {"folder": root}
    return results


cases = pytest.mark.parametrize("case", marked(CASES, SLOW))


def logged(result, name):
    return [row[name] for row in result["log"] if name in row]


def test_a_step_that_one_process_must_skip_is_skipped_by_all(results):
    for number in (1, 2):
        assert logged(results[number]["skipped"], "skipped_steps") == [1, 1, 1]  # the third, the fourth, the summary


@cases
def test_completions_are_those_of_one_process(results, case):
    one, two = results[1][case], results[2][case]
    assert (one["processes"], two["processes"]) == (1, 2)
    each = {"resumed": STEPS - 2, "accumulated": 2 * STEPS, "shared": STEPS // 2, "gdpo": 2 * STEPS}
    each = (each | {"sft": 0, "pairs": 0, "skipped": 0}).get(case, STEPS)
    assert len(two["completions"]) == len(one["completions"]) == each
    for ids, expected in zip(two["completions"], one["completions"], strict=True):
        assert torch.equal(ids, expected)


@cases
def test_gradients_and_updated_lora_are_those_of_one_process(results, case):
    one, two = results[1][case], results[2][case]
    for gradients, expected in zip(two["gradients"], one["gradients"], strict=True):
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).abs().max() <= 1e-5 * largest, name
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).abs().max() <= 1e-5, name


@cases
def test_metrics_are_those_of_one_process(results, case):
    one, two = results[1][case], results[2][case]
    # Where steps share a rollout, each process has sampled its part of all of them before the next process's rows.
    extra = [{k: sorted(v) if case == "shared" else v for k, v in result["extra"].items()} for result in (one, two)]
    assert extra[0] == extra[1] and bool(extra[0]) == (case not in ("sft", "pairs", "skipped"))
    names = {name for row in one["log"] for name in row}
    assert names == {name for row in two["log"] for name in row} and "loss" in names
    for name in names:
        if "second" not in name and "runtime" not in name:
            assert logged(two, name) == pytest.approx(logged(one, name), abs=1e-5), name


def test_evaluation_answers_every_question_once(results):
    assert results[2]["grpo"]["answers"] == results[1]["grpo"]["answers"]
    assert len(results[2]["grpo"]["answers"]) == 7


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(results):
    for name, weight in results[2]["grpo"]["weights"].items():
        assert torch.equal(results[2]["resumed"]["weights"][name], weight), name


def test_groups_were_dropped(results):
    assert sum(logged(results[2]["dropped"], "rewards/skipped_groups")) > 0


def test_a_reward_that_fails_in_one_process_stops_all_with_a_checkpoint(results):
    folder = results[2]["folder"]
    first, second = (torch.load(folder / f"failed-{process}.pt") for process in (0, 1))
    assert first[0] == "process 1: ValueError: this process only" and second[0] == "this process only"
    assert "Raised while scoring: reward function 'failing_reward' failed for data set, row" in second[1]
    for said in (first, second):
        assert "checkpoint-2 holds everything before step 3" in said[-1]
    assert (folder / "failed" / "0" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_only_the_first_process_writes(results):
    root = results[2]["folder"]
    assert (root / "grpo" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    others = {path.name for path in (root / "not-the-first").rglob("*") if path.is_file()}
    # Each process keeps the state of its own generators, and its own rows of a step that was skipped.
    assert others == {"rng_state_1.pth", "step-0003-process-1.safetensors"}


def test_a_step_needs_prompts_for_every_process_and_records_need_a_single_one(model_folder, tmp_path, monkeypatch):
    from trainers import make_trainer

    from tunix_torch.runtime import together

    monkeypatch.setattr(together, "count", lambda: 2)
    with pytest.raises(ValueError, match="per_device_train_batch_size=40: .* 64 training rows for 2 process"):
        make_trainer(model_folder, tmp_path, per_device_train_batch_size=40)
    with pytest.raises(ValueError, match="save_batches=1"):
        make_trainer(model_folder, tmp_path, save_batches=1)
