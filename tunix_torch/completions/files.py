"""Parquet files of completions in a run's folder, which together take no more than a limit."""

import logging
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet

from ..config.files import write_whole
from . import FOLDER
from .rows import Columns
from .thinning import thinned

logger = logging.getLogger(__name__)

STEPS, EVALUATIONS = "completions", "evaluation"  # what the files' names begin with
TYPES = {
    "step": pyarrow.int64(),
    "prompt_index": pyarrow.int64(),
    "question_index": pyarrow.int64(),
    "length": pyarrow.int64(),
    "right": pyarrow.bool_(),
    "clipped": pyarrow.bool_(),
    "reward": pyarrow.float64(),
    "advantage": pyarrow.float64(),
}  # `rewards/NAME` are float64, and all other columns are texts


class CompletionFiles:
    """The files `completions_STEP.parquet` and `evaluation_STEP.parquet` of a run.

    Evaluations may take half of the limit, and steps what evaluations leave over. Within that, `thinned` says which of
    each kind stay. The first and the newest evaluation stay even where they alone take more than the limit.

    Args:
        output_dir: the folder of the run. Nothing is created before there is something to write.
        limit: bytes that all files may take together; 0: none is written.
    """

    def __init__(self, output_dir: str | Path, limit: int) -> None:
        self.folder, self.limit = Path(output_dir) / FOLDER, limit
        self._sizes = {kind: _sizes(self.folder, kind) for kind in (STEPS, EVALUATIONS)}  # bytes, by step

    def forget_after(self, step: int) -> None:
        """Delete the files of later steps, which a run that goes on from this step will come to again, and those that a
        killed process or a machine that lost power has left without an end."""
        for kind, sizes in self._sizes.items():
            self._keep_only(kind, [known for known in sizes if known <= step and _has_end(self._path(kind, known))])
            for unfinished in self.folder.glob(f"{kind}_*.parquet.new"):
                unfinished.unlink()

    def write(self, kind: str, step: int, columns: Columns) -> None:
        """Write the file of a step, which no file is later than, and delete those that must make room for it.

        Args:
            kind: STEPS or EVALUATIONS.

        Raises:
            OSError: there is no room on the disk. What was there before stays, but for files that made room.
        """
        if not self.limit or not columns["step"]:
            return
        content, sizes = _as_parquet(columns), self._sizes[kind]
        sizes[step] = len(content)
        others = sum(sum(theirs.values()) for other, theirs in self._sizes.items() if other != kind)
        kept = thinned(sizes, self.limit // 2 if kind == EVALUATIONS else self.limit - others)
        if kind == STEPS and sum(sizes[known] for known in kept) > self.limit - others:
            kept = [step] if sizes[step] <= self.limit - others else []
        self._keep_only(kind, kept)
        if step in sizes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(kind, step), content, flush=False)
        if kind == EVALUATIONS:  # what they take, steps may not
            self._make_room()

    def _make_room(self) -> None:
        """Delete files of steps until all files are within the limit."""
        sizes, room = self._sizes[STEPS], self.limit - sum(self._sizes[EVALUATIONS].values())
        if sizes and sum(sizes.values()) > room:
            kept = thinned(sizes, room)
            self._keep_only(STEPS, kept if sum(sizes[step] for step in kept) <= room else [])

    def _keep_only(self, kind: str, steps: list[int]) -> None:
        for step in self._sizes[kind].keys() - set(steps):
            self._path(kind, step).unlink(missing_ok=True)
            del self._sizes[kind][step]

    def _path(self, kind: str, step: int) -> Path:
        return self.folder / f"{kind}_{step:05d}.parquet"


def _sizes(folder: Path, kind: str) -> dict[int, int]:
    """The bytes of each file of a kind, by its step."""
    named = [(re.fullmatch(rf"{kind}_(\d+)\.parquet", path.name), path) for path in folder.glob(f"{kind}_*.parquet")]
    return {int(match[1]): path.stat().st_size for match, path in named if match}


def _has_end(path: Path) -> bool:
    return path.read_bytes()[-4:] == b"PAR1"


def _as_parquet(columns: Columns) -> bytes:
    """A table as the content of a Parquet file. Halves of surrogate pairs, which no file can hold, are spelled."""
    arrays = {}
    for name, values in columns.items():
        kind = TYPES.get(name, pyarrow.float64() if name.startswith("rewards/") else pyarrow.string())
        if kind == pyarrow.string():
            values = [None if v is None else v.encode("utf-8", "backslashreplace").decode() for v in values]
        arrays[name] = pyarrow.array(values, kind)
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(arrays), sink, compression="zstd", write_statistics=False)
    return sink.getvalue().to_pybytes()
