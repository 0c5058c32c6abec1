"""Starts jobs in forks of a process that has imported everything, so that a start takes a tenth of a second.

    forks = Forks(os.environ)
    job = forks.start("benchmarks.small_job:main", ["--max_steps", "2"], log)
    job.poll(), job.kill(), job.wait()       # as of a subprocess.Popen

What the function computes, it computes as if it were a command's: nothing has been computed in the first process, and
no device was used. So this is for the CPU; a device of XLA or CUDA is not for forks.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Job:
    """A job that runs in a fork."""

    def __init__(self, forks: "Forks", pid: int) -> None:
        self.forks, self.pid, self.returncode = forks, pid, None

    def poll(self, seconds: float = 0) -> int | None:
        """The exit status, negative after a signal; None: it runs still, after at most so many seconds."""
        if self.returncode is None and select.select([self.forks.process.stdout], [], [], seconds)[0]:
            self.returncode = self.forks.read()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end. Returns the exit status, negative after a signal."""
        while self.poll(60) is None:
            pass
        return self.returncode

    def kill(self) -> None:
        """Kill it by SIGKILL. It stays there as a dead process until `wait`, so the id is its own."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The process that forks, one job at a time. Close it at the end.

    Args:
        environment: of the process; jobs may change it.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=dict(environment),
            bufsize=0,
        )
        assert self.read() == "ready"

    def read(self) -> object:
        """What the process says next."""
        return json.loads(self.process.stdout.readline())

    def start(self, function: str, args: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Job:
        """Call a function, `module:name`, with these words as the command line. What it prints is added to a file."""
        request = [function, list(args), str(log), dict(environment or {})]
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        return Job(self, self.read())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def _run(function: str, args: list[str], log: str, environment: dict[str, str]) -> None:
    """Run a job in this process, and end it as a command would end."""
    from tunix_torch.cli.script import run_script

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.argv[1:] = args
    module, _, name = function.partition(":")
    status = 0
    try:
        run_script(getattr(importlib.import_module(module), name))
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve() -> None:
    from tunix_torch.cli.script import choose_device

    choose_device([])
    import matplotlib.pyplot  # noqa: F401

    import tunix_torch.config.flags
    import tunix_torch.run.job  # noqa: F401

    says = os.fdopen(os.dup(1), "w")  # jobs print elsewhere

    def say(what: object) -> None:
        says.write(json.dumps(what) + "\n")
        says.flush()

    say("ready")
    while line := sys.stdin.buffer.readline():
        child = os.fork()
        if child == 0:
            _run(*json.loads(line))
        say(child)
        status = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        say(-status.si_status if status.si_code in (os.CLD_KILLED, os.CLD_DUMPED) else status.si_status)
        os.waitpid(child, 0)


if __name__ == "__main__":
    _serve()
