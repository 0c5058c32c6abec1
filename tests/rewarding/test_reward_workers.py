"""Reward functions in several processes give the values of one process, side by side, and mistakes are named."""

import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tunix_torch import GRPOConfig, TunixTrainer, rewards
from tunix_torch.model import tiny
from tunix_torch.rewarding.scoring import call_rewards
from tunix_torch.rewarding.workers import RewardWorkers

ROOT = Path(__file__).parent.parent.parent
NUM_PROMPTS, GROUP = 3, 2
ROWS = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(NUM_PROMPTS)]
COMPLETIONS = ["0", "1", "2", "2", "4", "5"]


def right(prompts, completions, answer, **columns):
    assert len(prompts) == len(completions) == len(answer)
    return [None if c == "5" else float(c == a) for c, a in zip(completions, answer, strict=True)]


async def right_later(**arguments):
    return right(**arguments)


def wrapped(**arguments):
    return right_later(**arguments)


def meet(completions, folder, **columns):
    """A reward function that waits until it runs in two processes, and returns the id of its own process."""
    Path(folder[0], str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(Path(folder[0]).iterdir())) < 2:
        assert time.monotonic() < deadline, "nobody else was called"
        time.sleep(0.01)
    return [float(os.getpid())] * len(completions)


def stuck(**columns):
    time.sleep(3600)


def too_few(completions, **columns):
    return [0.0] * (len(completions) - 1)


def no_list(**arguments):
    return 1.0


def broken(**arguments):
    raise KeyError("its own")


def deadly(**arguments):
    os._exit(3)


@pytest.fixture(scope="module")
def workers():
    workers = RewardWorkers(2, [right])
    yield workers
    workers.close()


@pytest.mark.parametrize("timeout", [None, 60])
def test_the_values_are_those_of_one_process(workers, timeout):
    functions = [right, right_later, wrapped]
    expected = call_rewards(functions, ROWS, COMPLETIONS)
    assert expected[0] == [1.0, 0.0, 1.0, 1.0, 1.0, None]
    assert call_rewards(functions, ROWS, COMPLETIONS, timeout, workers) == expected
    assert call_rewards(functions, ROWS[:1], COMPLETIONS[:1], timeout, workers) == [[1.0]] * 3  # a worker gets no row


def test_groups_are_shared_out_and_functions_do_not_wait_for_each_other(workers, tmp_path):
    rows = [row | {"folder": str(tmp_path)} for row in ROWS]
    (pids,) = call_rewards([meet], rows, COMPLETIONS, None, workers)
    assert pids[:2] == [pids[0]] * 2 and pids[2:] == [pids[2]] * 4 and len({*pids, os.getpid()}) == 3


def twice_as_many(completions, **columns):
    """Both processes together return more values than there are completions; of one alone there are not too few."""
    return [0.0] * 6


@pytest.mark.parametrize(
    "function, words",
    [
        (too_few, "returned 1 value for 2 completions; expected one for each"),
        (twice_as_many, "returned 6 values for 2 completions"),
        (no_list, "returned 1.0: expected"),
    ],
)
def test_wrong_values_are_refused_with_the_functions_name(workers, function, words):
    with pytest.raises(ValueError, match=f"{function.__name__}' {words}"):
        call_rewards([right, function], ROWS, COMPLETIONS, None, workers)


def test_an_exception_passes_through(workers):
    with pytest.raises(KeyError, match="its own"):
        call_rewards([broken], ROWS, COMPLETIONS, None, workers)


def dies_once(completions, folder, **columns):
    """A reward function whose process is killed at its first call, as by the machine for its memory."""
    try:
        Path(folder[0], "died").touch(exist_ok=False)
    except FileExistsError:
        return [1.0] * len(completions)
    os.kill(os.getpid(), signal.SIGKILL)


def dies(**columns):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.thorough
def test_a_process_that_dies_is_replaced_once(tmp_path, caplog):
    workers = RewardWorkers(2, [dies_once, dies, right])
    try:
        rows = [row | {"folder": str(tmp_path)} for row in ROWS]
        values = call_rewards([dies_once, right], rows, COMPLETIONS, workers=workers)
        assert values == [[1.0] * 6, [1.0, 0.0, 1.0, 1.0, 1.0, None]]
        assert "has ended by itself" in caplog.text
        with pytest.raises(
            ValueError,
            match="reward_processes=2: a process has ended by itself while 'dies' scored the 6 completions of 3 "
            "prompts, and then another.* It did not get beyond the completions of row 1, row 2, row 3",
        ):
            call_rewards([dies], ROWS, COMPLETIONS, workers=workers)
    finally:
        workers.close()


OWNER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from tunix_torch.rewarding.workers import RewardWorkers
import os
if __name__ == "__main__":
    workers = RewardWorkers(2, [os.getcwd])
    print(*(process.pid for process in workers._processes), flush=True)
    time.sleep(60)
"""


@pytest.mark.thorough
def test_processes_that_died_between_two_calls_are_replaced():
    workers = RewardWorkers(2, [right])
    try:
        for process in workers._processes:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(1)  # the pool notices
        assert call_rewards([right], ROWS, COMPLETIONS, workers=workers) == [[1.0, 0.0, 1.0, 1.0, 1.0, None]]
    finally:
        workers.close()


BUSY = OWNER.replace(
    "    time.sleep(60)",
    """
    workers._pool.submit(re.match, "(a+)+$", "a" * 60 + "b")  # for ever, and no thread of Python runs meanwhile
    workers._pool.submit(re.match, "(a+)+$", "a" * 60 + "b")
    time.sleep(1)
    print("busy", flush=True)
    time.sleep(60)""",
).replace("import os\n", "import os, re\n")


@pytest.mark.parametrize("script", [OWNER, BUSY], ids=["idle", "busy"])
def test_processes_end_with_a_trainer_that_was_killed(tmp_path, script):
    (tmp_path / "owner.py").write_text(script)
    owner = subprocess.Popen([sys.executable, tmp_path / "owner.py", str(ROOT)], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert len(pids) == 2
    if script is BUSY:
        assert owner.stdout.readline() == "busy\n"
    owner.kill()
    owner.wait()
    for _ in range(100):
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists() and "Z" not in state_of(pid)]
        if not left:
            break
        time.sleep(0.1)
    assert not left


def state_of(pid):
    """Return the state of a process: "R", "S", ...; "Z" where it has ended, or is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def test_every_reward_function_of_ours_can_be_sent():
    for preset in rewards.PRESETS:
        for function, _ in rewards.get_preset(preset):
            assert pickle.loads(pickle.dumps(function)) is function


def test_a_function_that_no_other_process_can_import_is_refused():
    for function in (lambda **columns: [], functools.partial(right, lock=threading.Lock())):
        with pytest.raises(ValueError, match="reward_processes=2: .*top of a module"):
            RewardWorkers(2, [function])


@pytest.mark.thorough
def test_a_trainer_stops_in_time_and_leaves_no_process(model_folder, tmp_path):
    """A function that takes too long and a process that dies both end the job; workers change no reward."""
    import multiprocessing

    def trained(function, **settings):
        args = GRPOConfig(
            output_dir=str(tmp_path / "run"),
            report_to="none",
            disable_tqdm=True,
            max_steps=2,
            per_device_train_batch_size=2,
            num_completions_per_prompt=2,
            generation_max_length=8,
            save_strategy="no",
            **settings,
        )
        trainer = TunixTrainer(model_folder, function, args, tiny.arithmetic_rows("train", 8))
        trainer.train()
        return [row["reward"] for row in trainer.state.log_history if "reward" in row]

    async def unsendable(completions, **columns):
        return [0.0] * len(completions)

    before = multiprocessing.active_children()
    trained(unsendable, reward_processes=2)  # async functions run in this process
    assert trained(rewards.format_reward, reward_processes=2) == trained(rewards.format_reward)
    with pytest.raises(ValueError, match="reward_timeout=0.2: 'stuck' takes longer"):
        trained(stuck, reward_processes=1, reward_timeout=0.2)  # `stuck` would take an hour
    with pytest.raises(Exception, match="a process has ended by itself"):
        trained(deadly, reward_processes=1)
    assert multiprocessing.active_children() == before


def test_a_session_without_a_file_is_told_so():
    code = (
        "from tunix_torch.rewarding.workers import RewardWorkers\n"
        "def mine(**columns): return []\n"
        "try: RewardWorkers(1, [mine])\n"
        "except ValueError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "interactive session" in result.stdout, result.stderr
