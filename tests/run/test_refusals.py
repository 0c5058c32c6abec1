"""What a user's machine, files or settings make impossible is said in one line, and nothing is lost."""

import dataclasses
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from commands import refused
from runs import SMALL, run
from trainers import make_trainer

from tunix_torch import DataConfig, GRPOConfig, ModelConfig
from tunix_torch.checkpoints.files import checkpoints_of, newest_checkpoint
from tunix_torch.checkpoints.whole import UNFINISHED
from tunix_torch.cli import train
from tunix_torch.config.flags import parse_job
from tunix_torch.model import tiny
from tunix_torch.run.callbacks import STOPPING
from tunix_torch.trainer import TunixTrainer

FLAGS = (
    "--use_grpo --max_steps 1 --batch_size 2 --max_completion_length 8 --max_prompt_length 48 --system_message= "
    "--report_to none --eval_strategy no --eval_on_start false --num_eval_rows 4 --num_train_rows 64"
).split()

# ---- settings ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--output_dir="], ["output_dir=''", "expected a folder"]),
        (["--output_dir", "/proc/x"], ["output_dir='/proc/x'", "can't be written"]),
        (["--accelerator_config", "missing.json"], ["accelerator_config='missing.json'", "no such file"]),
        (["--accelerator_config", '{"split_batche": true}'], ["accelerator_config=", "did you mean 'split_batches'"]),
        (["--accelerator_config", '{"'], ["accelerator_config=", "not valid JSON"]),
        (["--adam_epsilon", "0"], ["adam_epsilon=0.0", "above 0"]),
        (["--num_train_epochs", "-2"], ["num_train_epochs=-2.0", "above 0"]),
        (["--max_steps", "-3"], ["max_steps=-3", "at least 1"]),
        (["--reward_weights", "inf", "1"], ["reward_weights=[inf, 1.0]", "must be finite"]),
        (["--lr_scheduler_kwargs", '{"a": [{"b": NaN}]}'], ["lr_scheduler_kwargs=", "must be finite"]),
        (["--chat_template_kwargs", '{"a": Infinity}'], ["chat_template_kwargs=", "must be finite"]),
        (["--generation_kwargs", '{"temperature": NaN}'], ["temperature=nan", "must be finite"]),
        (["--optim_args", "beta3=0.9,alpha=-inf"], ["optim_args=", "must be finite"]),
        (["--lora_dropout", "nan"], ["lora_dropout=nan", "must be finite"]),
        (["--lora_rank", "100000000"], ["lora_rank=100000000", "GiB", "in all"]),
        (["--max_completion_length", "100000000000"], ["generation_max_length=100000000000", "GiB", "in all"]),
        (["--max_completion_length", "1025"], ["generation_max_length=1025", "the model has 1024 positions"]),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(flags, words, call, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--model_name", model_folder, "--output_dir", "out", *flags]
    refused(call(train, *flags), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.xla
def test_where_shapes_are_fixed_a_width_of_prompts_must_fit(model_folder, tmp_path):
    """Elsewhere a batch is as wide as its longest prompt."""
    with pytest.raises(ValueError, match="^max_prompt_length=100000000000: .* GiB.* in all"):
        make_trainer(model_folder, tmp_path, max_prompt_length=10**11)


@pytest.mark.parametrize("ending, text", [("json", '{"%s": NaN}'), ("json", '{"%s": -Infinity}'), ("yaml", "%s: .nan")])
def test_every_number_of_every_config_is_finite_also_from_a_file(ending, text, tmp_path, subtests):
    """All fields that hold a float are found, those of Transformers too."""
    names = [
        field.name
        for config in (ModelConfig, DataConfig, GRPOConfig)
        for field in dataclasses.fields(config)
        if field.init and float in (hint := get_type_hints(config)[field.name], *get_args(hint))
    ]
    known = {"learning_rate", "lora_alpha", "train_fraction", "epsilon", "epsilon_high", "adam_epsilon", "warmup_steps"}
    assert known <= set(names)
    for name in names:
        with subtests.test(name=name):
            (tmp_path / f"c.{ending}").write_text(text % name)
            with pytest.raises(ValueError, match=f"{name}=-?(nan|inf): must be finite"):
                parse_job(["--config", str(tmp_path / f"c.{ending}")])


# ---- data ----


@pytest.mark.parametrize("content", [b"", os.urandom(300), b"PAR1" + os.urandom(300) + b"PAR1"])
def test_damaged_parquet_is_named(content, call, tmp_path):
    (tmp_path / "rows.parquet").write_bytes(content)
    result = call(train, *FLAGS, "--data_path", tmp_path / "rows.parquet", "--output_dir", tmp_path / "out")
    refused(result, "rows.parquet", "damaged")


def test_columns_may_have_the_names_of_the_librarys_own(call, model_folder, tmp_path):
    """Regression: a column `prompt_ids` was a traceback."""
    row = '{"question": "1 + 1?", "answer": "2", "prompt_ids": [1], "completion_mask": "x", "other": "\\ud800"}\n'
    (tmp_path / "rows.jsonl").write_text(row * 8)
    flags = ["--model_name", model_folder, "--data_path", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "out"]
    result = call(train, *FLAGS, *flags)
    assert result.returncode == 0, result.stderr


# ---- the cache ----


@pytest.mark.parametrize("place", ["a file", "/proc/x"])
def test_a_cache_that_can_not_be_written_is_named(place, call, tmp_path):
    (tmp_path / "a file").write_text("")
    cache = str(tmp_path / place)  # an absolute path stays what it is
    result = call(train, *FLAGS, "--output_dir", tmp_path / "out", TUNIX_CACHE=cache)
    refused(result, repr(cache), "can't be written", "TUNIX_CACHE")


DAMAGES = {
    "garbage": lambda path: path.write_bytes(b"\xe2?" * 50),
    "empty": lambda path: path.write_bytes(b""),
    "flip": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "delete": Path.unlink,
}


def test_a_cache_that_is_damaged_is_to_be_deleted(model_folder, tmp_path, monkeypatch, subtests):
    monkeypatch.setenv("TUNIX_CACHE", str(tmp_path))
    folder = Path(shutil.copytree(model_folder, tmp_path / tiny.folder_name()))
    tiny.list_files(folder)
    assert tiny.ensure_tiny_model() == folder
    names = [path.name for path in folder.iterdir()]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} < set(names)
    for name in names:
        for kind, do in DAMAGES.items():
            if (name, kind) == (tiny.FILES, "delete"):  # so it is in a cache of an early version
                continue
            with subtests.test(name=name, kind=kind):
                kept = (folder / name).read_bytes()
                do(folder / name)
                with pytest.raises(ValueError, match=f"(?s)^model_name='tiny': .*{folder}.*delete it, and it is made"):
                    tiny.ensure_tiny_model()
                (folder / name).write_bytes(kept)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_cache_of_an_early_version_is_not_taken_for_a_hub_that_wants_a_login(
    name, call, model_folder, tmp_path
):
    """It has no checksums, so what loading says is all that is known."""
    folder = Path(shutil.copytree(model_folder, tmp_path / tiny.folder_name()))
    (folder / name).write_bytes(b"\xe2?" * 50)
    result = call(train, *FLAGS, "--output_dir", tmp_path / "out", TUNIX_CACHE=str(tmp_path))
    refused(result, str(folder), "delete it")
    assert "log" not in result.stderr, result.stderr


def test_what_a_dead_process_left_in_the_cache_is_removed_and_what_a_living_one_writes_is_not(
    model_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("TUNIX_CACHE", str(tmp_path))
    (tmp_path / tiny.folder_name()).symlink_to(model_folder)
    code = (
        "import os, signal\nfrom tunix_torch.model import tiny\n"
        "with tiny._unfinished_folder():\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (dead,) = tmp_path.glob("unfinished-*")
    with tiny._unfinished_folder() as living:
        tiny.ensure_tiny_model()
        assert not dead.exists() and list(tmp_path.glob("unfinished-*")) == [living]
    assert not living.exists()


# ---- the end of a run ----


@pytest.fixture
def signals(tmp_path, monkeypatch):
    """A module with a reward function that sends this process a signal in the second step."""
    (tmp_path / "signals_of_runs.py").write_text(
        "import os, time\nnumber, calls, pauses = None, 0, [0]\n\n"
        "def reward(completions, **columns):\n"
        "    global calls\n    calls += 1\n"
        "    for pause in pauses if calls == 2 else []:\n"
        "        time.sleep(pause)\n        os.kill(os.getpid(), number)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import signals_of_runs

    monkeypatch.setattr(signals_of_runs, "calls", 0)
    yield signals_of_runs
    sys.modules.pop("signals_of_runs")


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_every_signal_that_asks_to_end_saves_first_and_resuming_says_from_where(
    number, signals, call, model_folder, tmp_path, monkeypatch
):
    assert {"SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGINT"} == {one.name for one in STOPPING}
    monkeypatch.setattr(signals, "number", number, raising=False)
    flags = [*FLAGS, "--model_name", model_folder, "--output_dir", tmp_path / "out", "--max_steps", "4"]
    flags += ["--reward_funcs", "signals_of_runs.reward", "--judge", "correctness", "--resume_from_checkpoint", "auto"]
    result = call(train, *flags)
    assert result.returncode == 128 + number, result.stderr
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert (
        f"{name}: after this step and its evaluation the run saves" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert f"Stopped by {name} after step 2; the same command with --resume_from_checkpoint" in result.stderr
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert newest_checkpoint(tmp_path / "out") == checkpoint
    assert signal.getsignal(number) != signal.SIG_IGN
    result = call(train, *flags)
    assert result.returncode == 0 and f"Continuing from {checkpoint}" in result.stdout, result.stderr


def judged_by_signals(model_folder, output_dir, *flags):
    flags = [*FLAGS, "--model_name", model_folder, "--output_dir", output_dir, "--max_steps", "4", *flags]
    return [*flags, "--reward_funcs", "correctness", "signals_of_runs.reward"]


def test_ctrl_c_in_an_evaluation_keeps_its_step(signals, call, model_folder, tmp_path, monkeypatch):
    """The second call of the reward is of the evaluation after the first step."""
    monkeypatch.setattr(signals, "number", signal.SIGINT, raising=False)
    flags = ["--eval_strategy", "steps", "--eval_steps", "1"]
    result = call(train, *judged_by_signals(model_folder, tmp_path / "out", *flags))
    assert result.returncode == 130 and "Stopped by Ctrl-C after step 1;" in result.stderr, result.stderr
    assert newest_checkpoint(tmp_path / "out").name == "checkpoint-1"


def test_a_second_ctrl_c_stops_within_the_step(signals, call, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "number", signal.SIGINT, raising=False)
    monkeypatch.setattr(signals, "pauses", [0, 0.6])
    result = call(train, *judged_by_signals(model_folder, tmp_path / "out"))
    assert result.returncode == 130 and "Stopped at step 1;" in result.stderr, result.stderr


def test_the_same_ctrl_c_that_comes_twice_is_one(signals, call, model_folder, tmp_path, monkeypatch):
    """`timeout -s INT` sends it to the process, and to its group at once."""
    monkeypatch.setattr(signals, "number", signal.SIGINT, raising=False)
    monkeypatch.setattr(signals, "pauses", [0, 0.01])
    result = call(train, *judged_by_signals(model_folder, tmp_path / "out"))
    assert result.returncode == 130 and "Stopped by Ctrl-C after step 2;" in result.stderr, result.stderr


def test_a_run_that_fails_gives_the_signals_back(model_folder, tmp_path, monkeypatch):
    """Else the next Ctrl-C in a notebook would wait for a step that never comes."""
    handlers = [signal.getsignal(number) for number in STOPPING]
    monkeypatch.setattr(TunixTrainer, "training_step", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model_folder, tmp_path / "out", eval_strategy="no", eval_steps=None)
    assert [signal.getsignal(number) for number in STOPPING] == handlers


def test_a_run_says_what_is_wrong_with_it_at_a_checkpoint_and_at_its_end(call, model_folder, tmp_path, monkeypatch):
    text = "def reward(completions, **columns):\n    return [0.5] * len(completions)\n"
    (tmp_path / "constant_of_runs.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = [*FLAGS, "--model_name", model_folder, "--output_dir", tmp_path / "out", "--max_steps", "8"]
    flags += ["--save_steps", "6", "--reward_funcs", "constant_of_runs.reward", "--judge", "correctness"]
    result = call(train, *flags)
    so_far, end = (line for line in result.stdout.splitlines() if line.startswith("Diagnosis"))
    how = f"python -m tunix_torch.diagnose {tmp_path / 'out'} says why, and what to try"
    assert so_far.startswith("Diagnosis so far: ") and end.startswith("Diagnosis: ")
    assert "nothing to learn from" in so_far and "nothing to learn from" in end
    assert so_far.endswith(how) and end.endswith(how)


def test_a_report_that_fails_on_a_resumed_run_does_not_end_it(model_folder, tmp_path, capsys):
    run(model_folder, tmp_path / "out", eval_strategy="no", eval_steps=None)
    assert (tmp_path / "out" / "report.html").is_file()
    (next((tmp_path / "out" / "completions").glob("*.parquet"))).write_bytes(b"no parquet")
    run(
        model_folder,
        tmp_path / "out",
        max_steps=5,
        resume_from_checkpoint="latest",
        eval_strategy="no",
        eval_steps=None,
    )
    assert "Ask it: " in capsys.readouterr().out.splitlines()[-1]


# ---- disks ----


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_disk_that_is_really_full_keeps_the_last_checkpoint_and_says_how_much_is_missing(
    model_folder, finished_run, tmp_path
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only the superuser may mount a file system")
    try:
        with pytest.raises(OSError, match=rf"no space left in {disk}/out: .*; about \d+.\d MB are missing. .*whole"):
            run(model_folder, disk / "out")
        assert [folder.name for folder in checkpoints_of(disk / "out")] == ["checkpoint-2"]
        assert not (disk / "out" / UNFINISHED).exists()
        subprocess.run(["mount", "-o", "remount,size=60m", str(disk)], check=True)
        run(model_folder, disk / "out", resume_from_checkpoint="auto")
        assert adapter(disk / "out") == adapter(finished_run) and not (disk / "out" / "previous").exists()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_that_can_not_be_written_is_said_with_its_folder(model_folder, finished_run, tmp_path):
    """The operating system refuses files above a size, of which the optimizer's is the first."""
    sizes = {path.name: path.stat().st_size for path in (finished_run / "checkpoint-2").iterdir()}
    limit = (sizes["adapter_model.safetensors"] + sizes["optimizer.pt"]) // 2
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=rf"a checkpoint can't be written in {tmp_path}/out: .*whole"):
            run(model_folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / UNFINISHED).exists() and not checkpoints_of(tmp_path / "out")
    run(model_folder, tmp_path / "out", resume_from_checkpoint="auto")
    assert adapter(tmp_path / "out") == adapter(finished_run)


def test_settings_of_the_tests_are_possible(tmp_path):
    """A refusal above must be about what it names."""
    GRPOConfig(output_dir=str(tmp_path), **SMALL)
