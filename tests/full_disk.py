"""Jobs in processes for which a disk is full after a number of writes, or which are killed there.

A process has loaded everything and waits; each job runs in a fork of it, which takes about a second.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("full_disk.c")
ROOT = Path(__file__).parent.parent


@dataclass
class Ended:
    """How a job ended."""

    status: int  # negative: by this signal
    writes: int  # into the folder; -1: it was killed
    text: str  # stdout and stderr


class Forks:
    """Starts jobs. Close it at the end."""

    def __init__(self, scratch: Path) -> None:
        """`scratch`: a folder for the library and for what jobs print."""
        library = scratch / "full_disk.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE, "-ldl"], check=True
        )
        self.scratch = scratch
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, folder: Path, flags: list[str], writes: int = -1, killed: bool = False) -> Ended:
        """Train by these flags.

        Args:
            folder: where writes count.
            writes: how many succeed; -1: all.
            killed: the process is killed by SIGKILL at the next one, which otherwise fails as on a full disk.
        """
        self.process.stdin.write(json.dumps([str(folder), flags, writes, killed]) + "\n")
        self.process.stdin.flush()
        status, count = json.loads(self.process.stdout.readline())
        return Ended(status, count, (self.scratch / "log.txt").read_text())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def is_possible() -> bool:
    """Whether there is a compiler for the library."""
    return shutil.which("gcc") is not None


def _train(scratch: Path, folder: str, flags: list[str], writes: int, killed: bool) -> None:
    """Run a job in this process, and end it as the command would end."""
    from tunix_torch.cli.script import run_script
    from tunix_torch.cli.train import main

    log = os.open(scratch / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    disk = ctypes.CDLL(None)
    disk.full_disk_set(folder.encode(), ctypes.c_long(writes), int(killed))
    status = 0
    try:
        run_script(lambda: main(flags))
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    (scratch / "count").write_text(str(disk.full_disk_count()))
    os._exit(status)


def _serve(scratch: Path) -> None:
    from tunix_torch.cli.train import choose_device

    choose_device([])
    import tunix_torch.config.flags
    import tunix_torch.run.curves
    import tunix_torch.run.job  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        (scratch / "count").unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _train(scratch, *json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        count = (scratch / "count").read_text() if (scratch / "count").exists() else -1
        print(json.dumps([status, int(count)]), flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
