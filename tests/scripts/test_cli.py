"""Every script, end to end, writes and prints what it promises, and refuses wrong input in one line.

Tests of how a process starts or ends run one of their own. The others run in this one, since starting takes seconds.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ROOT, refused, run
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tunix_torch.cli import answering, ask, train
from tunix_torch.config.flags import parse_job
from tunix_torch.config.saved import settings_of

SMALL = (
    "--max_steps 2 --batch_size 2 --max_completion_length 12 --max_prompt_length 48 --num_eval_rows 4 "
    "--per_device_eval_batch_size 4 --num_train_rows 16 --system_message="
).split()


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    result = run(
        "train.py",
        "--use_grpo",
        "--model_name",
        model_folder,
        "--output_dir",
        output,
        *SMALL,
        "--system_message",
        "",
        "--save_steps",
        "1",
    )
    assert result.returncode == 0, result.stderr
    return output, result


def test_train_writes_everything_that_is_promised(trained):
    output, result = trained
    promised = {
        "config.json",
        "metrics.jsonl",
        "training_curves.png",
        "report.html",
        "starts.jsonl",
        "runs",
        "checkpoint-1",
        "checkpoint-2",
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "trainer_state.json",
    }
    assert promised <= {path.name for path in output.iterdir()}
    in_checkpoint = {path.name for path in (output / "checkpoint-2").iterdir()}
    assert {
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    } <= in_checkpoint
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row["step"] for row in rows if "eval_accuracy" in row]
    assert evaluated == [0, 2]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2]
    assert "before" in result.stdout and "accuracy (greedy)" in result.stdout
    assert "16 training rows, 4 evaluation rows, asked first\n" in result.stdout
    assert f"What came of it, as a page: {output / 'report.html'}\n" in result.stdout
    assert result.stdout.endswith(f'Ask it: python inference.py --model_path {output} --question "..."\n')
    assert list((output / "runs").glob("**/events*"))


def test_saved_adapter_loads_with_peft(trained, model_folder):
    output, _ = trained
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    loaded = PeftModel.from_pretrained(base, str(output))
    assert torch.isfinite(loaded(input_ids=torch.arange(10)[None]).logits).all()


def test_the_config_that_a_run_wrote_repeats_the_run(trained, call, tmp_path):
    output, _ = trained
    result = call(train, "--config", output / "config.json", "--output_dir", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    first, second = ((folder / "adapter_model.safetensors").read_bytes() for folder in (output, tmp_path / "again"))
    assert first == second


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--use_grpo --max_length 128", {"max_prompt_length": 80, "max_steps": 280}),
        ("--config config_example.json --max_length 128", {"max_prompt_length": 80}),
        ("--use_grpo --num_epochs 2", {"max_steps": -1, "num_train_epochs": 2}),
        ("--config config_example.json --num_epochs 2", {"max_steps": -1}),
        ("--use_grpo --num_epochs 2 --max_steps 5", {"max_steps": 5}),
        ("--model_name x --eval_steps 7", {"eval_strategy": "steps", "eval_steps": 7}),
        ("--model_name x", {"eval_strategy": "no", "max_prompt_length": 256, "use_grpo": False}),
        ("--config config_example.json --algorithm dr_grpo", {"aggregation": "sequence-mean-token-scale"}),
        ("--config config_example.json --epsilon 0.3", {"clip_high": 0.3}),
        ("--use_grpo --eval_strategy no", {"eval_strategy": "no", "eval_steps": None}),
        ("--config config_example.json --eval_strategy no", {"eval_strategy": "no"}),
        ("--use_grpo --early_stopping_patience 2", {"metric_for_best_model": "accuracy", "eval_steps": 70}),
    ],
)
def test_what_is_said_last_and_nearest_counts(flags, expected, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = parse_job(flags.split())[2]
    assert {name: getattr(args, name) for name in expected} == expected


def test_resuming_from_elsewhere_spares_the_run_that_is_there(call, model_folder, tmp_path):
    flags = ["--use_grpo", "--model_name", model_folder, *SMALL, "--save_steps", "1"]
    for name in ("a", "b"):
        assert call(train, *flags, "--output_dir", tmp_path / name).returncode == 0
    kept = (tmp_path / "b" / "metrics.jsonl").read_text()
    resume = ["--resume_from_checkpoint", tmp_path / "a" / "checkpoint-1"]
    assert call(train, *flags, "--output_dir", tmp_path / "b", *resume).returncode == 0
    (previous,) = (tmp_path / "b" / "previous").iterdir()
    assert (previous / "metrics.jsonl").read_text() == kept and (previous / "checkpoint-2").is_dir()


def test_an_earlier_run_is_set_aside_and_can_be_resumed(call, model_folder, tmp_path):
    flags = ["--use_grpo", "--model_name", model_folder, "--output_dir", tmp_path, *SMALL, "--save_steps", "1"]
    assert call(train, *flags).returncode == 0
    kept = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert call(train, *flags, "--resume_from_checkpoint", "latest", "--max_steps", "3").returncode == 0
    assert (tmp_path / "checkpoint-3").is_dir() and not (tmp_path / "previous").exists()
    assert call(train, *flags).returncode == 0
    (previous,) = (tmp_path / "previous").iterdir()
    assert (previous / "checkpoint-3").is_dir()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == kept


def test_a_run_is_resumed_as_it_began_and_only_its_length_may_change(call, model_folder, tmp_path):
    flags = ["--use_grpo", "--model_name", model_folder, "--output_dir", tmp_path, *SMALL, "--save_steps", "1"]
    assert call(train, *flags, "--max_steps", "1").returncode == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for flag, value in (("--lora_alpha", "4"), ("--learning_rate", "1"), ("--seed", "7"), ("--judge", "format")):
        again = call(train, *flags, "--resume_from_checkpoint", "latest", flag, value)
        refused(again, flag.removeprefix("--") + "=", "would be resumed", "model_name=")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert call(train, *flags, "--resume_from_checkpoint", "latest", "--save_steps", "2").returncode == 0


def test_what_evaluations_decide_needs_rows_to_evaluate_on(call, model_folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 8)
    flags = ["--use_grpo", "--model_name", model_folder, *SMALL, "--data_path", tmp_path / "rows.jsonl"]
    for flag, value in (("--early_stopping_patience", 1), ("--load_best_model_at_end", "true")):
        more = [flag, value, "--eval_steps", "1", "--save_steps", "1", "--save_strategy", "steps"]
        result = call(train, *flags, "--output_dir", tmp_path / "out", *more)
        refused(result, flag.removeprefix("--"), "no evaluation rows", "train_fraction")
    assert not (tmp_path / "out").exists()


def test_supervised_fine_tuning_is_the_default_and_takes_files(call, model_folder, tmp_path):
    rows = [{"question": f"{n} + 1?", "answer": f"so\n#### {n + 1}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "settings.yaml").write_text(
        f"model_name: {model_folder}\nlearning_rate: 1e-3\nmax_completion_length: 64\n"
    )
    result = call(
        train,
        "--config",
        tmp_path / "settings.yaml",
        "--data_path",
        tmp_path / "rows.jsonl",
        "--val_data_path",
        tmp_path / "rows.jsonl",
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        "2",
        "--system_message",
        "",
        "--learning_rate",
        "0.002",
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["learning_rate"] == 0.002 and config["use_grpo"] is False and config["generation_max_length"] == 64
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all("eval_loss" in row for row in rows if "eval_accuracy" in row)


def test_supervised_fine_tuning_needs_no_answers(call, model_folder, tmp_path):
    row = {
        "prompt": [{"role": "user", "content": "Say hello."}],
        "completion": [{"role": "assistant", "content": "Hi."}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "1?", "completion": "1."}))
    data = ["--data_path", tmp_path / "rows.jsonl", "--val_data_path", tmp_path / "rows.jsonl"]
    flags = ["--model_name", model_folder, *SMALL, *data, "--eval_steps", "1"]
    result = call(train, *flags, "--output_dir", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in logged if "eval_loss" in row]
    assert len(losses) == 3 and not any("eval_accuracy" in row for row in logged)
    assert f"held-out loss  {losses[0]:.4f}  {losses[-1]:.4f}" in result.stdout
    refused(
        call(train, *flags, "--use_grpo", "--output_dir", tmp_path / "grpo"),
        *("rows.jsonl, row 1: no answer", "'correctness_reward' takes 'answer'"),
    )
    assert not (tmp_path / "grpo").exists()


def test_settings_of_gemma2_grpo_and_rewards_of_agent_tunix_on_a_part_of_a_file(
    call, model_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # the user's module lies in the working directory
    (tmp_path / "module_of_a_user.py").write_text(
        "def my_judge(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    rows = [{"ask": f"{n} + {n}?", "solved": f"{2 * n}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = call(
        train,
        *("--use_grpo", "--model_name", model_folder, "--output_dir", tmp_path / "out", "--system_message="),
        *"--num_generations 4 --num_iterations 2 --beta 0.04 --epsilon 0.2 --max_steps 2 --learning_rate 2e-6".split(),
        *"--lora_rank 4 --batch_size 2 --max_completion_length 12 --max_prompt_length 32 --eval_steps 1".split(),
        *("--data_path", tmp_path / "rows.jsonl", "--question_column", "ask", "--answer_column", "solved"),
        *"--train_fraction 0.5 --num_train_samples 8 --num_test_samples 6 --reward_preset agent_tunix".split(),
        *("--judge", "module_of_a_user.my_judge", "--reward_timeout", "60"),
    )
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["reward_weights"] == [1.0] * 4 and config["lora_rank"] == 4 and config["num_iterations"] == 2
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval_accuracy"] for row in logged if "eval_accuracy" in row] == [1.0, 1.0, 1.0]
    names = {name for row in logged for name in row if name.startswith("rewards/")}
    assert {"rewards/check_answer/mean", "rewards/match_format_approximately/mean"} <= names


def test_config_example_holds_every_setting_with_its_default_and_runs(call, tmp_path):
    defaults = settings_of(*parse_job(["--use_grpo"]))
    assert json.loads((ROOT / "config_example.json").read_text()) == defaults
    result = call(train, "--config", ROOT / "config_example.json", "--output_dir", tmp_path / "out", *SMALL)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data_path", "missing.jsonl"], ["missing.jsonl", "no such file"]),
        (["--config", "missing.json"], ["missing.json", "no such file"]),
        (["--use_grpo", "--num_completions_per_prompt", "1"], ["num_completions_per_prompt=1", "at least 2"]),
        (["--use_grpo", "--max_prompt_length", "3"], ["max_prompt_length=3", "longest"]),
        (["--reward_funcs", "corectness"], ["corectness", "did you mean 'correctness'"]),
        (["--learning_rat", "1"], ["--learning_rat", "did you mean '--learning_rate'"]),
        (["--learning_rate", "fast"], ["learning_rate", "fast"]),
        (["--beta", "0.1", "--kl_coef", "0.2"], ["--kl_coef", "--beta", "same setting"]),
        (["--model_name", "./nowhere"], ["./nowhere", "no such folder"]),
        (["--reward_preset", "agent-tunix"], ["agent-tunix", "did you mean 'agent_tunix'"]),
        (["--reward_preset", "notebook", "--reward_weights", "1"], ["reward_weights=[1.0]", "3 reward functions"]),
        (["--reward_preset", "notebook", "--reward_funcs", "format"], ["reward_preset='notebook'", "either"]),
        (["--reward_funcs", "no_module.reward"], ["no_module.reward", "no module 'no_module'"]),
        (["--judge", "corectness"], ["corectness", "did you mean 'correctness'"]),
        (["--train_fraction", "0.5"], ["train_fraction=0.5", "held-out questions of their own"]),
        (["--dataset", "gsm9k"], ["dataset='gsm9k'", "gsm8k"]),
        (["--model_size", "2b"], ["model_size='2b'", "270m, 1b"]),
        (["--mesh_shape", "2,2"], ["mesh_shape='2,2'", "torchrun --nproc_per_node 4"]),
        (["--use_grpo", "--max_prompt_length", "24", "--overlong_prompts", "raise"], ["max_prompt_length=24", "row 1"]),
        (["--eval_strategy", "no", "--eval_steps", "1"], ["eval_strategy='no'", "eval_steps"]),
        (["--eval_strategy", "no", "--early_stopping_patience", "1"], ["early_stopping_patience=1", "eval_strategy"]),
        (["--question_column", "ask"], ["question_column='ask'", "data_path"]),
        (["--mesh_axes", "rows"], ["mesh_axes='rows'"]),
        (["--reward_funcs", "format", "format"], ["format_reward is there twice"]),
        (["--resume_from_checkpoint", "latest"], ["resume_from_checkpoint", "no whole checkpoint"]),
        (["--max_length", "4"], ["max_length=4"]),
        (["--num_tpu_cores", "8"], ["num_tpu_cores=8"]),
        (["--gradient_accumulation_steps", "0"], ["gradient_accumulation_steps=0", "at least 1"]),
        (["--reward_weights", "nan", "1"], ["reward_weights=[nan, 1.0]", "must be finite"]),
        (["--learning_rate", "inf"], ["learning_rate=inf", "must be finite"]),
        (["--train_fraction", "nan"], ["train_fraction=nan", "must be finite"]),
        (["--lora_alpha", "inf"], ["lora_alpha=inf", "must be finite"]),
        (["--max_steps", "0"], ["max_steps=0", "at least 1"]),
        (["--save_steps", "0"], ["save_steps=0", "save_strategy='no'"]),
        (["--metric_for_best_model", "eval_recall"], ["metric_for_best_model='eval_recall'", "accuracy, mean_length"]),
        (["--lr_scheduler_type", "greedy", "--eval_strategy", "no"], ["lr_scheduler_type='greedy'", "eval_strategy"]),
        (["--report_to", "mlflow"], ["report_to='mlflow'", "pip install mlflow"]),
    ],
)
def test_train_refuses_wrong_input_with_one_line(flags, words, call, tmp_path):
    refused(call(train, "--output_dir", tmp_path / "out", *flags), *words)
    assert not (tmp_path / "out").exists(), "nothing may be written"


def test_a_device_that_does_not_exist_is_refused_with_one_line(cache, tmp_path):
    result = run("train.py", "--output_dir", tmp_path / "out", "--device", "quantum", cache=cache)
    refused(result, "quantum", "auto, tpu, xla, cuda, cpu")
    assert not (tmp_path / "out").exists(), "nothing may be written"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model_name", "nobody/no-such-model"], ["nobody/no-such-model", "local folder"]),
        (["--dataset", "gsm8k"], ["dataset='gsm8k': data_path='openai/gsm8k'", "--data_path rows.jsonl"]),
    ],
)
def test_what_is_not_here_is_refused_with_one_line_without_a_network(flags, words, call, tmp_path, monkeypatch):
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    refused(call(train, "--output_dir", tmp_path / "out", *flags), *words)
    assert not (tmp_path / "out").exists(), "nothing may be written"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("rows.jsonl", '{"question": "1", "answer": "1"}\n{"question"', ["line 2", "not valid JSON"]),
        ("rows.jsonl", '{"question": "1"}', ["rows.jsonl, row 1", "no completion", "no answer"]),
        ("rows.jsonl", '{"words": "1"}', ["rows.jsonl, row 1", "no question", "it has words"]),
        ("rows.jsonl", '{"question": "\\ud800", "answer": "1"}', ["rows.jsonl, row 1", "surrogates"]),
        ("settings.json", '{"epsillon": 0.1}', ["epsillon", "did you mean 'epsilon'"]),
        ("settings.json", '{"epsilon": 0.1,\n}', ["line 2", "not valid JSON"]),
        ("settings.yaml", "epsilon: [1", ["not valid YAML"]),
        ("settings.json", '{"max_steps": 1.5}', ["max_steps", "1.5"]),
        ("settings.json", '{"max_steps": null}', ["max_steps=None", "expected int"]),
    ],
)
def test_train_refuses_broken_files_with_one_line(name, text, words, call, tmp_path):
    (tmp_path / name).write_text(text)
    flag = "--data_path" if name.startswith("rows") else "--config"
    refused(call(train, "--output_dir", tmp_path / "out", flag, tmp_path / name), *words)


def test_train_refuses_a_model_folder_without_weights(call, tmp_path, model_folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((Path(model_folder) / "config.json").read_text())
    refused(call(train, "--model_name", tmp_path / "empty", "--output_dir", tmp_path / "out"), "no weights")


def test_ctrl_c_finishes_the_step_and_says_how_to_go_on(model_folder, tmp_path):
    """As a terminal sends it: to the processes that load data, too."""
    flags = ["--use_grpo", "--model_name", model_folder, *SMALL, "--max_steps", "10000", "--save_steps", "1"]
    flags += ["--dataloader_num_workers", "1"]
    environment = {**os.environ, "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--output_dir", str(tmp_path)]
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
    )
    try:
        for _ in range(600):
            if (tmp_path / "checkpoint-2").exists():
                break
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert stderr.count("Ctrl-C again stops at once") == 1, stderr
    step = re.search(r"Stopped by Ctrl-C after step (\d+); the same command with --resume_from_checkpoint", stderr)[1]
    assert (tmp_path / f"checkpoint-{step}").is_dir()


def test_inference_numbers_the_steps_and_writes_a_file(trained, call, tmp_path):
    output, _ = trained
    (tmp_path / "questions.txt").write_text("What is 1 + 1?\n\nWhat is 2 + 2?\n")
    flags = ["--questions_file", tmp_path / "questions.txt", "--num_samples", "2", "--max_new_tokens", "8"]
    result = run("inference.py", "--model_path", output, *flags, "--show_prompt", "--output_file", tmp_path / "a.jsonl")
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["question"] for row in rows] == ["What is 1 + 1?", "What is 2 + 2?"]
    assert all(len(row["completions"]) == 2 for row in rows)
    assert "<start_of_turn>user" in result.stdout and "Answer:" in result.stdout
    again = call(ask, "--model_path", output, *flags, "--output_file", tmp_path / "a.jsonl")
    refused(again, "nothing is overwritten")


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("q.csv", "\ufeffanswer,question\r\n2,1 + 1?\r\n", ["1 + 1?"]),
        ("Q.JSONL", '\ufeff{"prompt": "1 + 1?"}\n', ["1 + 1?"]),
        ("q.txt", "\ufeffa\u2028b\x85c?\r\n\r\n  2 + 2?\n", ["a\u2028b\x85c?", "  2 + 2?"]),
        ("questions", "1 + 1?", ["1 + 1?"]),
        ("q.json", json.dumps([{"question": "?", "choices": ["x", "y"], "answer": 0}]), ["?\nA. x\nB. y"]),
        ("q.jsonl", json.dumps({"prompt": [{"role": "user", "content": "?"}]}), [[{"role": "user", "content": "?"}]]),
    ],
)
def test_inference_asks_the_question_column_or_a_line(name, text, expected, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    args = ask.parse_args(["--questions_file", str(tmp_path / name)], "ask")
    assert answering.load_questions(args) == expected


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("q.csv", b"a,b\n1,2\n", ["q.csv, row 1", "no question", "it has a, b"]),
        ("q.txt", b"\xff\xfe1", ["q.txt", "not UTF-8", ".csv"]),
        ("q.txt", b"\n \n", ["q.txt", "no questions"]),
        ("q.parquet", b"PAR1", ["q.parquet", "damaged"]),
        ("q.jsonl", b'{"question": "\\ud800"}', ["q.jsonl, row 1", "surrogates"]),
        ("q.jsonl", b'{"question": " "}', ["q.jsonl, row 1", "blank"]),
    ],
)
def test_inference_refuses_a_file_without_questions_with_one_line(name, text, words, call, tmp_path):
    (tmp_path / name).write_bytes(text)
    refused(call(ask, "--questions_file", tmp_path / name), *words)


def test_inference_renders_messages(call, model_folder, tmp_path):
    turns = (("user", "1?"), ("assistant", "2"), ("user", "So?"))
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": messages}))
    flags = ["--model_path", model_folder, "--questions_file", tmp_path / "q.jsonl", "--max_new_tokens", "2"]
    result = call(ask, *flags, "--show_prompt", "--system_message", "Think.")
    assert "Question: So?" in result.stdout and "user\nThink.\n\n1?<end_of_turn>" in result.stdout, result.stderr
    refused(call(ask, *flags, "--prompt_template", "alpaca"), "prompt_template='alpaca'", "is for texts")


def test_inference_takes_the_newest_run_else_the_tiny_model(trained, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question = ["--question", "What is 1 + 1?", "--max_new_tokens", "4", "--no_do_sample"]
    assert "Model: tiny" in call(ask, *question).stdout
    (tmp_path / "outputs").mkdir()
    os.symlink(trained[0] / "checkpoint-2", tmp_path / "outputs" / "checkpoint-2")  # of a run that has not ended
    assert "Model: outputs/checkpoint-2" in call(ask, *question).stdout
    os.symlink(trained[0], tmp_path / "outputs" / "mine")
    assert "Model: outputs/mine" in call(ask, *question).stdout


@pytest.mark.parametrize("template", ["default", "alpaca", "chatml", "llama2"])
def test_inference_knows_the_prompt_templates(template, call, model_folder):
    flags = ["--question", "1 + 1?", "--prompt_template", template, "--system_message", "Think.", "--show_prompt"]
    result = call(ask, "--model_path", model_folder, *flags, "--max_new_tokens", "2")
    marker = {"default": "<start_of_turn>", "alpaca": "###", "chatml": "<|im_start|>", "llama2": "[INST]"}[template]
    assert marker in result.stdout and "Think." in result.stdout, result.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["--question"]),
        (["--question", "1", "--temperature", "0"], ["temperature=0"]),
        (["--question", "1", "--model_path", "./nowhere"], ["./nowhere"]),
        (["--questions_file", "missing.txt"], ["missing.txt", "no such file"]),
        (["--question", "1", "--top_p", "high"], ["top_p", "high"]),
        (["--question", "1", "--prompt_template", "gpt"], ["prompt_template", "gpt"]),
        (["--question", "half \udcff"], ["--question", "surrogates"]),
        (["--question", " "], ["--question", "blank"]),
    ],
)
def test_inference_refuses_wrong_input_with_one_line(flags, words, call):
    refused(call(ask, *flags), *words)


def test_reasoning_becomes_numbered_steps():
    reasoning_steps = ask.reasoning_steps
    assert reasoning_steps("<reasoning>40+30=70\n7+8=15</reasoning><answer>85</answer>") == ["40+30=70", "7+8=15"]
    assert reasoning_steps("<reasoning>First this. Then that.</reasoning>") == ["First this.", "Then that."]
    assert reasoning_steps("<reasoning>Step 1: a\n2. b</reasoning>") == ["a", "b"]
    assert reasoning_steps("1.5 is more than 1") == ["1.5 is more than 1"]


def test_examples_run(call, cache, tmp_path):
    import example_usage

    results = [run("example_usage.py", "3", cache=cache, cwd=tmp_path)]
    results += [call(example_usage, number) for number in "124"]
    for result in results:
        assert result.returncode == 0 and "step    5/5" in result.stdout + result.stderr, result.stderr
    refused(call(example_usage, "5"), "1|2|3|4")


@pytest.mark.thorough
def test_run_tpu_training_reads_its_variables_and_says_that_there_is_no_tpu(model_folder, tmp_path):
    environment = {
        "MODEL_NAME": model_folder,
        "OUTPUT_DIR": str(tmp_path / "out"),
        "BATCH_SIZE": "2",
        "NUM_EPOCHS": "1",
    }
    environment |= {"LEARNING_RATE": "0.003", "MAX_LENGTH": "60", "NUM_TPU_CORES": "1", "GENERATION_MAX_LENGTH": "12"}
    environment |= {"PYTHON": sys.executable, "NUM_COMPLETIONS_PER_PROMPT": "2"}
    result = run(
        "run_tpu_training.sh",
        "--max_steps",
        "1",
        "--num_eval_rows",
        "2",
        "--system_message",
        "",
        "--eval_on_start",
        "false",
        timeout=300,
        **environment,
    )
    assert result.returncode == 0, result.stderr
    assert "No TPU was found" in result.stderr and "XLA on the CPU" in result.stdout
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["device"], config["max_prompt_length"], config["num_completions_per_prompt"]) == ("xla", 48, 2)
    assert config["learning_rate"] == 0.003
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["compilations"] > 0 for row in rows)
