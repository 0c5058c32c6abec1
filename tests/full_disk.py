"""Jobs for which a disk is full after a number of writes, or which are killed at one; see `full_disk.c`."""

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.forks import Forks

SOURCE = Path(__file__).with_name("full_disk.c")


@dataclass
class Ended:
    """How a job ended."""

    status: int  # negative: by this signal
    writes: int  # into the folder; -1: it was killed
    text: str  # stdout and stderr


class Disk:
    """Runs jobs with a disk that may be full. Close it at the end.

    Args:
        scratch: a folder for the library and for what jobs print.
    """

    def __init__(self, scratch: Path) -> None:
        library = scratch / "full_disk.so"
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", library, SOURCE, "-ldl"], check=True
        )
        self.log, self.count = scratch / "log.txt", scratch / "count"
        path = os.pathsep.join(map(str, (Path(__file__).parent.parent, Path(__file__).parent)))
        self.forks = Forks(os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": path})

    def run(self, folder: Path, flags: list[str], writes: int = -1, killed: bool = False) -> Ended:
        """Train by these flags.

        Args:
            folder: where writes count.
            writes: how many succeed; -1: all.
            killed: the process is killed by SIGKILL at the next one, which otherwise fails as on a full disk.
        """
        self.log.unlink(missing_ok=True)
        self.count.unlink(missing_ok=True)
        args = [str(folder), str(writes), str(int(killed)), str(self.count), *flags]
        status = self.forks.start("full_disk:train", args, self.log).wait()
        return Ended(status, int(self.count.read_text()) if self.count.exists() else -1, self.log.read_text())

    def close(self) -> None:
        """End the process in which jobs begin."""
        self.forks.close()


def is_possible() -> bool:
    """Whether there is a compiler for the library."""
    return shutil.which("gcc") is not None


def train() -> None:
    """Train in a process that has the library, and write down the number of writes."""
    from tunix_torch.cli.train import main

    folder, writes, killed, count, *flags = sys.argv[1:]
    library = ctypes.CDLL(None)
    library.full_disk_set(folder.encode(), ctypes.c_long(int(writes)), int(killed))
    try:
        main(flags)
    finally:
        Path(count).write_text(str(library.full_disk_count()))
