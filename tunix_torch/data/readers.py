"""Readers of rows, as they stand in a file, on Hugging Face, in TFDS or on Kaggle: all at once, or as a stream."""

import contextlib
import csv
import functools
import importlib.util
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from .rows import Row

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}  # endings, and Arrow's names of what they mean


def load_rows(
    path: str,
    config_name: str | None = None,
    split: str = "train",
    setting: str = "data_path",
    source: str | None = None,
) -> list[Row]:
    """Rows of a file (.json: a list, or one object a line; see `FORMATS`) or of a data set.

    Numbers of classes become the classes' names, and float32's 0.1 becomes 0.1.

    Args:
        path: a file; a Hugging Face id or folder; a TFDS name or prepared folder; a Kaggle handle or folder.
        setting: the name that `path` has for the user.
        source: huggingface, tfds, kaggle or file; None: file where `path` is one, else huggingface. A file is read as
            a file whatever the source.

    Raises:
        ValueError: no such file or data set, a hub out of reach, a file that can't be read (with its line), no rows.
    """
    rows = list(_iterate(path, config_name, split, setting, source))
    if not rows:
        raise ValueError(f"{setting}={path!r}: no rows")
    return rows


def stream_rows(
    path: str,
    config_name: str | None = None,
    split: str = "train",
    setting: str = "data_path",
    source: str | None = None,
) -> datasets.IterableDataset:
    """As `load_rows`, but the rows are read when they are iterated over.

    A .json file that holds a list is read as a whole all the same.
    """
    if _source_of(path, source) == "huggingface":
        stream = _open_huggingface(path, config_name, split, setting, streaming=True)
        changing = features_that_change(stream.features or {})
        return stream.map(functools.partial(plain_row, features=changing)) if changing else stream
    settings = {"path": path, "config_name": config_name, "split": split, "setting": setting, "source": source}
    return datasets.IterableDataset.from_generator(_iterate, gen_kwargs=settings)


def _source_of(path: str, source: str | None) -> str:
    is_file = format_of(Path(path)) is not None or (source is None and Path(path).is_file())
    return "file" if is_file else source or "huggingface"


def _iterate(path: str, config_name: str | None, split: str, setting: str, source: str | None) -> Iterator[Row]:
    source = _source_of(path, source)
    if source == "file":
        yield from _read_file(Path(path), setting)
    elif source == "tfds":
        yield from _read_tfds(path, config_name, split, setting)
    elif source == "kaggle":
        yield from _read_kaggle(path, config_name, split, setting)
    else:
        data = _open_huggingface(path, config_name, split, setting, streaming=False)
        changing = features_that_change(data.features)
        yield from (plain_row(dict(row), changing) for row in data)


def features_that_change(features: dict[str, Any]) -> dict[str, Any]:
    """Those of a data set's features whose values `plain_row` changes."""

    def changes(feature: Any) -> bool:
        if isinstance(feature, dict):
            return any(map(changes, feature.values()))
        if isinstance(feature, datasets.List | datasets.LargeList):
            return changes(feature.feature)
        short = isinstance(feature, datasets.Value) and feature.dtype in ("float32", "float16")
        return short or isinstance(feature, datasets.ClassLabel)

    return {name: feature for name, feature in features.items() if changes(feature)}


def plain_row(row: Row, features: dict[str, Any]) -> Row:
    """The row with names in place of numbers of classes, and float32 and float16 numbers as short as they are meant."""

    def plain(value: Any, feature: Any) -> Any:
        if isinstance(feature, datasets.ClassLabel) and isinstance(value, int):
            return feature.int2str(value) if value >= 0 else None
        if isinstance(feature, datasets.Value) and feature.dtype in ("float32", "float16") and value is not None:
            return float(str(np.dtype(feature.dtype).type(value)))
        if isinstance(feature, dict) and isinstance(value, dict):
            return {name: plain(part, feature.get(name)) for name, part in value.items()}
        if isinstance(feature, datasets.List | datasets.LargeList) and isinstance(value, list):
            return [plain(part, feature.feature) for part in value]
        return value

    return row | {name: plain(row[name], feature) for name, feature in features.items() if name in row}


@contextlib.contextmanager
def _loading(what: str, path: str, config_name: str | None, split: str, setting: str) -> Iterator[None]:
    """Tell in a line what could not be loaded, why, and what to do: a library of a hub fails in its own many ways."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        config = f"configuration {config_name!r}, " if config_name else ""
        raise ValueError(
            f"{setting}={path!r}: neither a file nor a {what} data set that could be loaded ({config}split {split!r}): "
            f"{reason}. Without a network, point data_path at a local copy (data_source=file: rows.jsonl)"
        ) from error


def _open_huggingface(
    path: str, config_name: str | None, split: str, setting: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """A data set of the hub, a folder of parquet, csv or json files, or one that `save_to_disk` wrote."""
    with _loading("Hugging Face", path, config_name, split, setting):
        if not any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_dataset(path, config_name, split=split, streaming=streaming)
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise ValueError(f"it has the splits {', '.join(saved)}")
            saved = saved[split]
        return saved.to_iterable_dataset() if streaming else saved


def _require_package(name: str, setting: str, path: str) -> None:
    if importlib.util.find_spec(name) is None:
        package = name.replace("_", "-")
        raise ValueError(
            f"{setting}={path!r}: reading it needs {package}, which is not installed: pip install {package}"
        )


def _read_tfds(path: str, config_name: str | None, split: str, setting: str) -> Iterator[Row]:
    """A TFDS data set by random access, which needs no TensorFlow: a name (see $TFDS_DATA_DIR) or a prepared folder."""
    _require_package("tensorflow_datasets", setting, path)
    import tensorflow_datasets as tfds

    with _loading("TFDS", path, config_name, split, setting):
        if Path(path).is_dir():
            data = tfds.builder_from_directory(_prepared_folder(Path(path), config_name)).as_data_source(split)
        else:
            import tensorflow_datasets.text  # without TensorFlow the package doesn't know these by itself

            data = tfds.data_source(f"{path}/{config_name}" if config_name else path, split=split)
        features = data.dataset_info.features

    def plain(value: Any, feature: Any) -> Any:
        """Bytes become text, NumPy's numbers Python's, numbers of classes the classes' names."""
        feature = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
        if isinstance(value, dict):
            return {name: plain(part, feature[name]) for name, part in value.items()}
        if isinstance(value, list | np.ndarray):
            return [plain(part, feature) for part in value]
        if isinstance(feature, tfds.features.ClassLabel):
            return feature.int2str(int(value)) if value >= 0 else None
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, np.floating):
            return float(str(value))
        return value.item() if isinstance(value, np.generic) else value

    for row in data:
        yield plain(row, features)


def _prepared_folder(folder: Path, config_name: str | None) -> Path:
    """The folder of one version of a TFDS data set, which may lie below the one that was given."""
    found = sorted(file.parent for file in folder.rglob("features.json"))
    if config_name:
        found = [place for place in found if config_name in place.parts]
    if len(found) != 1:
        names = ", ".join(str(place.relative_to(folder)) for place in found) or "none"
        raise ValueError(f"expected one prepared data set (with a features.json) in the folder, found {names}")
    return found[0]


def _read_kaggle(path: str, config_name: str | None, split: str, setting: str) -> Iterator[Row]:
    """The files of one split, from a Kaggle handle ("owner/name") or a local folder laid out like it."""
    folder = Path(path)
    if not folder.is_dir():
        _require_package("kagglehub", setting, path)
        import kagglehub

        with _loading("Kaggle", path, config_name, split, setting):
            folder = Path(kagglehub.dataset_download(path))
    files = [file for file in sorted(folder.rglob("*")) if format_of(file) is not None]
    if config_name:
        files = [file for file in files if _names(file, folder, config_name)]
    chosen = [file for file in files if file.name.lower().removesuffix(format_of(file)) == split.lower()]
    chosen = chosen or [file for file in files if _names(file, folder, split)]
    if not chosen and len(files) == 1 and split == "train":
        chosen = files
    if not chosen or len({file.parent for file in chosen}) > 1:
        names = ", ".join(str(file.relative_to(folder)) for file in chosen or files) or "none"
        what = "files in several folders" if chosen else "no file"
        raise ValueError(
            f"{setting}={path!r}: {what} for split {split!r} (dataset_config {config_name!r}): {names}. "
            "Choose with the split and dataset_config, or give one file: --data_source file"
        )
    for file in chosen:
        yield from _read_file(file, setting)


def _names(file: Path, folder: Path, word: str) -> bool:
    """Whether a file's path below the folder has this word in it: "latest.csv" says nothing of a "test" split."""
    name = file.relative_to(folder).with_suffix("").as_posix().lower()
    return re.search(rf"(?<![a-z0-9]){re.escape(word.lower())}(?![a-z0-9])", name) is not None


def format_of(path: Path) -> str | None:
    """How a file's name ends, in small letters, if it is of a format that is read: ".csv", ".jsonl.gz"."""
    return next((end for end in READERS if path.name.lower().endswith(end)), None)


def _read_file(path: Path, setting: str) -> Iterator[Row]:
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
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}{hint}") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{setting}={str(path)!r}: damaged, or no {end} file, after row {number}: {reason}") from error
    if number == 0:
        raise ValueError(f"{path}: no rows")


def open_text(path: Path, newline: str = "\n") -> io.TextIOWrapper:
    """A text file, compressed or not, whose lines end at newlines only; a byte order mark at its start is left out."""
    stream = pyarrow.input_stream(str(path), COMPRESSED.get(path.suffix.lower()))
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _read_json(path: Path) -> Iterator[Any]:
    whole, whole_error = None, None
    with open_text(path) as file:
        try:
            whole = json.loads(file.read())
        except json.JSONDecodeError as error:
            whole_error = error
    yield from whole if isinstance(whole, list) else _read_json_lines(path, whole_error)


def _read_json_lines(path: Path, whole_error: json.JSONDecodeError | None = None) -> Iterator[Any]:
    with open_text(path) as file:  # other line ends also stand within strings
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if whole_error is not None and number == 1:
                    raise whole_error from None
                error.lineno = number
                raise
            yield row


def _read_csv(path: Path, dialect: str = "excel") -> Iterator[Row]:
    """All values stay the text that they are in the file: 007 is not 7, and 5 is not 5.0."""
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
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _rows_of(file.iter_batches(batch_size=1000), file.schema_arrow)


def _read_arrow(path: Path) -> Iterator[Row]:
    """Either of Arrow's formats: a file, or as `datasets` writes them a stream."""
    with pyarrow.memory_map(str(path)) as source:
        try:
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            reader = batches = pyarrow.ipc.open_stream(source)
        yield from _rows_of(batches, reader.schema)


def _rows_of(batches: Iterator[pyarrow.RecordBatch], schema: pyarrow.Schema) -> Iterator[Row]:
    features = {}
    for field in schema:
        try:
            features |= datasets.Features.from_arrow_schema(pyarrow.schema([field], schema.metadata))
        except ValueError:  # a type that `datasets` doesn't know: neither classes nor numbers
            continue
    changing = features_that_change(features)
    for batch in batches:
        yield from (plain_row(row, changing) for row in batch.to_pylist())


_TEXTS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": functools.partial(_read_csv, dialect="excel-tab"),
}
FORMATS = _TEXTS | {".parquet": _read_parquet, ".arrow": _read_arrow}
READERS = FORMATS | {end + packed: read for end, read in _TEXTS.items() for packed in COMPRESSED}
