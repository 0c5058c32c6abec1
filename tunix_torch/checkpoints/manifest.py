"""A list of a folder's files with their sizes and checksums, by which damage is found before anything is loaded.

The list is written last, after all other files have reached the disk. A second file holds the checksum of the list
itself. So a folder without either of them is one that an early version of this library wrote, and a folder with only
one of them is damaged.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config.files import write_whole
from .contents import READ_BY_RUNS

MANIFEST_FILE = "manifest.json"
CHECKSUM_FILE = "manifest.sha256"
BOTH = (MANIFEST_FILE, CHECKSUM_FILE)


def write_manifest(folder: str | Path, names: Iterable[str] | None = None) -> None:
    """List files of a folder in its manifest, when all of them have reached the disk.

    Args:
        names: the files, or those of them that exist; None: all files, in folders below this one too.
    """
    folder = Path(folder)
    if names is None:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in BOTH]
    else:
        files = [folder / name for name in sorted(names) if (folder / name).is_file()]
    for path in files:
        flush(path)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _checksum(path)} for path in files
    }
    text = json.dumps(entries, indent=1) + "\n"
    write_whole(folder / MANIFEST_FILE, text)
    write_whole(folder / CHECKSUM_FILE, hashlib.sha256(text.encode()).hexdigest() + "\n")
    flush(folder)


def mark_unfinished(folder: str | Path) -> None:
    """Let a folder count as damaged from now on, until its manifest is written: its files are about to be replaced."""
    write_whole(Path(folder) / MANIFEST_FILE, "{}\n")
    (Path(folder) / CHECKSUM_FILE).unlink(missing_ok=True)


def damage(folder: str | Path) -> str | None:
    """What is wrong with a folder by its manifest, in a few words; None: nothing, or there is no manifest."""
    folder = Path(folder)
    if not any(os.path.lexists(folder / name) for name in BOTH):  # nor a folder or a link that leads nowhere
        return None
    there = [(folder / name).is_file() for name in BOTH]
    if not all(there):
        return f"{BOTH[there.index(False)]} is missing"
    try:
        text = (folder / MANIFEST_FILE).read_bytes()
        if hashlib.sha256(text).hexdigest() != (folder / CHECKSUM_FILE).read_text(encoding="ascii").strip():
            return f"{MANIFEST_FILE} or {CHECKSUM_FILE} has changed since it was written"
        entries = _entries(text)
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size:,} bytes, and {entry['bytes']:,} were written"
            if _checksum(path) != entry["sha256"]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, RecursionError) as error:
        return f"it can't be read: {error}"
    return None


def not_listed(folder: str | Path) -> str | None:
    """Which file a run would read that its manifest does not list, in a few words; None: there is none, or no manifest.

    Args:
        folder: one whose manifest lists all files, and in which `damage` finds nothing.
    """
    folder = Path(folder)
    if not (folder / MANIFEST_FILE).is_file():
        return None
    entries = _entries((folder / MANIFEST_FILE).read_bytes())
    there = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix in READ_BY_RUNS)
    added = next((name for name in there if name not in entries and name not in BOTH), None)
    return None if added is None else f"{added} is not one of the files that were written"


def _entries(text: bytes) -> dict[str, dict[str, Any]]:
    """The files that a manifest lists.

    Raises:
        ValueError: it is none, or lists a file outside its folder.
    """
    entries = json.loads(text)
    good = isinstance(entries, dict) and all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys() and ".." not in Path(name).parts
        for name, entry in entries.items()
    )
    if not good or any(Path(name).is_absolute() for name in entries):
        raise ValueError(f"{MANIFEST_FILE} is no list of the folder's files")
    return entries


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
