"""Reads rows from a file: JSON, JSON lines, CSV, TSV (each also compressed), Parquet or Arrow."""

import csv
import functools
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from ..config.files import NotJSON, parse_json
from .rows import Row
from .values import rows_of_arrow

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # file endings, and the names of the codecs in Arrow


def format_of(path: Path) -> str | None:
    """The ending of a file's name in small letters, such as ".csv" or ".jsonl.gz"; None where no reader knows it."""
    return next((end for end in READERS if path.name.lower().endswith(end)), None)


def read_file(path: Path, setting: str) -> Iterator[Row]:
    """Read the rows of one file, one at a time. A name with an unknown ending is read as JSON lines.

    Args:
        setting: the name that the user's setting of the path has, for error messages.

    Raises:
        ValueError: the file does not exist, is not UTF-8, is damaged, has no rows, or has a row that is no object; the
            message names the row or the line.
    """
    if not path.is_file():
        raise ValueError(f"{setting}={str(path)!r}: no such file")
    end = format_of(path)
    read = READERS[end or ".jsonl"]
    hint = "" if end else f"; files that are read end in {', '.join(FORMATS)}; of texts also {', '.join(COMPRESSED)}"
    number = 0
    try:
        for number, row in enumerate(read(path), start=1):
            if not isinstance(row, dict):
                raise ValueError(f'{path}, row {number}: expected an object such as {{"question": ..., "answer": ...}}')
            yield row
    except UnicodeDecodeError as error:
        raise ValueError(f"{setting}={str(path)!r}: not UTF-8: {error}{hint}") from error
    except NotJSON as error:
        line = f", line {error.line}" if error.line else ""
        raise ValueError(f"{path}{line}: {error}{hint}") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{setting}={str(path)!r}: damaged, or no {end} file, after row {number}: {reason}") from error
    if number == 0:
        raise ValueError(f"{path}: no rows")


def open_text(path: Path, newline: str = "\n") -> io.TextIOWrapper:
    """Open a text file, compressed or not. A byte order mark at its start is skipped.

    Args:
        newline: as for `open`. By default only "\\n" ends a line, because JSON strings may hold other line ends.
    """
    stream = pyarrow.input_stream(str(path), COMPRESSED.get(path.suffix.lower()))
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _read_json(path: Path) -> Iterator[Any]:
    """Read a list of objects, or else one object a line, as many .json files have it."""
    whole, whole_error = None, None
    with open_text(path) as file:
        try:
            whole = parse_json(file.read())
        except NotJSON as error:
            whole_error = error
    yield from whole if isinstance(whole, list) else _read_json_lines(path, whole_error)


def _read_json_lines(path: Path, whole_error: NotJSON | None = None) -> Iterator[Any]:
    """Read one object a line. Where the first line is none, `whole_error` says why the file as a whole is no JSON."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except NotJSON as error:
                if whole_error is not None and number == 1:
                    raise whole_error from None
                raise NotJSON(error.reason, number) from None
            yield row


def _read_csv(path: Path, dialect: str = "excel") -> Iterator[Row]:
    """Read rows of texts. No value is converted: 007 does not become 7, nor 5 become 5.0."""
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, dialect=dialect, strict=True)
        try:
            names = reader.fieldnames or []
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            if twice:
                raise ValueError(f"{path}, line 1: the column {twice[0]!r} is there {names.count(twice[0])} times")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, line {reader.reader.line_num}: expected the fields {', '.join(names)}, one value each"
                    )
                yield row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.reader.line_num}: not valid CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        yield from rows_of_arrow(file.iter_batches(batch_size=1000), file.schema_arrow)


def _read_arrow(path: Path) -> Iterator[Row]:
    """Read either of Arrow's two formats: the file format, or the stream format, which `datasets` writes."""
    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = batches = pyarrow.ipc.open_stream(source)
        yield from rows_of_arrow(batches, reader.schema)


# The formats of text files, which may also be compressed.
_TEXTS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, dialect="excel-tab"),
}
# Every format by the ending of its file name, without and with the endings of compressed texts.
FORMATS = _TEXTS | {".parquet": _read_parquet, ".arrow": _read_arrow}
READERS = FORMATS | {end + packed: read for end, read in _TEXTS.items() for packed in COMPRESSED}
