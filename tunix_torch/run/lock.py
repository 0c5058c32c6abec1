"""Lets one job at a time write into a run's folder."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"  # in output_dir: which process writes there


@contextlib.contextmanager
def locked(output_dir: str | Path) -> Iterator[None]:
    """Hold a run's folder for this process. The folder is made if it is not there.

    The lock is the operating system's (POSIX record lock), so it ends with the process, however that ends. The file
    says which host and process have it, for the message; one that was left by a process that is gone is taken over.

    Raises:
        ValueError: another process has it, or it can't be written.
    """
    folder = Path(output_dir)
    path = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _open(path)
    except OSError as error:
        raise ValueError(f"output_dir={str(output_dir)!r}: can't be written: {error.strerror}") from error
    try:
        holder = _holder(descriptor)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while not _is_at(descriptor, path):  # another job has ended in between, and removed it
                os.close(descriptor)
                descriptor = _open(path)
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                hint = "wait for it, stop it, or give another folder"
                raise ValueError(f"output_dir={str(output_dir)!r}: {holder} writes there; {hint}") from None
            logger.warning("%s can't be locked (%s): take care that only one job writes there", folder, error.strerror)
        else:
            if holder:
                logger.warning("%s was in use by %s, which has ended without removing %s", folder, holder, LOCK_FILE)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": platform.node(), "process": os.getpid()}).encode(), 0)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open a lock file, which is made if it is not there."""
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one with this name."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _holder(descriptor: int) -> str:
    """Who wrote a lock file: "process 12 on host"; "" where nobody did."""
    text = os.pread(descriptor, 4096, 0)
    try:
        written = json.loads(text)
        return f"process {written['process']} on {written['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process" if text else ""
