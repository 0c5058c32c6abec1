"""Memory that runs out is an error of one line: where it was, and what takes less. Other errors are as before."""

import pytest
import torch
from commands import run

from tunix_torch.cli.script import run_script
from tunix_torch.runtime.memory import TAKES_LESS, is_out_of_memory, noting_what_takes_less
from tunix_torch.runtime.profiling import PARTS, span

# As the allocators of a GPU and of a TPU, which are not here, say it.
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")
TPU = RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.5G of 15.75G hbm.\n\nTotal hbm")


def ask_for_too_much():
    torch.empty(2**50)


def test_what_says_that_memory_has_run_out():
    with pytest.raises(RuntimeError) as of_cpu:
        ask_for_too_much()
    cublas = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert all(map(is_out_of_memory, (CUDA, TPU, cublas, of_cpu.value, MemoryError())))
    assert not any(map(is_out_of_memory, (RuntimeError("shapes differ"), ValueError("out of memory"), OSError())))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_step_says_what_takes_less_in_it(part):
    with pytest.raises(RuntimeError) as raised, span(part):
        ask_for_too_much()
    assert getattr(raised.value, "__notes__", []) == [
        f"This was in {part}: {TAKES_LESS[p]}" for p in TAKES_LESS if p == part
    ]
    with pytest.raises(RuntimeError) as raised, span(part):
        torch.zeros(2) + torch.zeros(3)
    assert not hasattr(raised.value, "__notes__"), "only memory"


@pytest.mark.parametrize("error", [CUDA, TPU, MemoryError(), None], ids=["a GPU", "a TPU", "Python", "the CPU"])
def test_a_command_says_it_in_one_line(error, capsys, monkeypatch):
    monkeypatch.delenv("TUNIX_DEBUG", raising=False)

    @noting_what_takes_less("rollout")
    def main():
        if error is not None:
            raise error
        ask_for_too_much()

    with pytest.raises(SystemExit) as ended:
        run_script(main)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("error: out of memory") and said.count("\n") == 1
    assert said.endswith(f"This was in rollout: {TAKES_LESS['rollout']}\n") and "enforce fail" not in said
    monkeypatch.setenv("TUNIX_DEBUG", "1")
    with pytest.raises((RuntimeError, MemoryError)):
        run_script(main)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="size of tensor"):
        run_script(lambda: torch.zeros(2) + torch.zeros(3))


LITTLE_MEMORY = '''
import resource


def little_memory(completions, **columns):
    """After the first rollout, a tenth of a GB is all that may still be taken."""
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + 10**8
    if len(completions) > 2:  # not an evaluation
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    return [float(i % 2) for i in range(len(completions))]
'''


@pytest.mark.thorough
def test_a_job_whose_memory_runs_out_while_it_learns(cache, tmp_path):
    (tmp_path / "rewards_of_mine.py").write_text(LITTLE_MEMORY)
    given = "--use_grpo --reward_funcs rewards_of_mine.little_memory --max_steps 1 --per_device_train_batch_size 64"
    given += " --num_train_rows 64 --num_eval_rows 2 --num_eval_completions 0 --output_dir run --report_to none"
    ended = run("train.py", *given.split(), cwd=tmp_path, cache=cache)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert last.startswith("error: out of memory: ") and last.endswith(TAKES_LESS["learning"]), ended.stderr
