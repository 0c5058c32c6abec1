"""Reads rows from a file, Hugging Face, TFDS or Kaggle: all at once (`load_rows`), or as a stream (`stream_rows`)."""

import contextlib
import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ..config.hub import require_hub_for_data
from .files import format_of, read_file
from .rows import Row
from .values import features_to_convert, plain_row


def load_rows(
    path: str,
    config_name: str | None = None,
    split: str = "train",
    setting: str = "data_path",
    source: str | None = None,
) -> list[Row]:
    """Read all rows of a file or of a data set.

    Numbers of classes become the classes' names, and 0.1 in float32 becomes the float 0.1.

    Args:
        path: a file in one of the `files.FORMATS`; a Hugging Face id or folder; a TFDS name or prepared folder; or a
            Kaggle handle or folder.
        config_name: the configuration of a data set that has several.
        split: the split of a data set.
        setting: the name of the setting that holds `path`, for error messages.
        source: huggingface, tfds, kaggle or file. None means file where `path` is a file, and huggingface elsewhere. A
            name with the ending of a known format is read as a file whatever the source.

    Raises:
        ValueError: there is no such file or data set, a hub is out of reach, a file can't be read (the message names
            the line), or there are no rows.
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
    """Like `load_rows`, but rows are read while the stream is iterated over.

    A .json file that holds a list is still read as a whole.
    """
    if _source_of(path, source) == "huggingface":
        stream = _open_huggingface(path, config_name, split, setting, streaming=True)
        to_convert = features_to_convert(stream.features or {})
        return stream.map(functools.partial(plain_row, features=to_convert)) if to_convert else stream
    settings = {"path": path, "config_name": config_name, "split": split, "setting": setting, "source": source}
    return datasets.IterableDataset.from_generator(_iterate, gen_kwargs=settings)


def _source_of(path: str, source: str | None) -> str:
    is_file = format_of(Path(path)) is not None or (source is None and Path(path).is_file())
    return "file" if is_file else source or "huggingface"


def _iterate(path: str, config_name: str | None, split: str, setting: str, source: str | None) -> Iterator[Row]:
    source = _source_of(path, source)
    if source == "file":
        yield from read_file(Path(path), setting)
    elif source == "tfds":
        yield from _read_tfds(path, config_name, split, setting)
    elif source == "kaggle":
        yield from _read_kaggle(path, config_name, split, setting)
    else:
        data = _open_huggingface(path, config_name, split, setting, streaming=False)
        to_convert = features_to_convert(data.features)
        yield from (plain_row(dict(row), to_convert) for row in data)


@contextlib.contextmanager
def _loading(what: str, path: str, config_name: str | None, split: str, setting: str) -> Iterator[None]:
    """Turn any exception of a hub's library, which may be of any type, into a ValueError of one line.

    The line says what could not be loaded, why, and what to do instead.
    """
    try:
        yield
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        config = f"configuration {config_name!r}, " if config_name else ""
        flag = setting.rpartition(" ")[2]  # it may stand behind the data set's own setting
        raise ValueError(
            f"{setting}={path!r}: neither a file nor a {what} data set that could be loaded ({config}split {split!r}): "
            f"{reason}. Without a network, give a local copy, a file or a folder, such as --{flag} rows.jsonl"
        ) from error


def _open_huggingface(
    path: str, config_name: str | None, split: str, setting: str, streaming: bool
) -> datasets.Dataset | datasets.IterableDataset:
    """Open a data set of the hub, a folder of parquet, csv or json files, or a folder that `save_to_disk` wrote."""
    with _loading("Hugging Face", path, config_name, split, setting):
        if not any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            require_hub_for_data(path, datasets.config.HF_DATASETS_CACHE)
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
    """Read a TFDS data set, by its name in $TFDS_DATA_DIR or from its prepared folder, without TensorFlow."""
    _require_package("tensorflow_datasets", setting, path)
    import tensorflow_datasets as tfds

    with _loading("TFDS", path, config_name, split, setting):
        if Path(path).is_dir():
            data = tfds.builder_from_directory(_prepared_folder(Path(path), config_name)).as_data_source(split)
        else:
            import tensorflow_datasets.text  # without TensorFlow, only this import registers the text data sets

            data = tfds.data_source(f"{path}/{config_name}" if config_name else path, split=split)
        features = data.dataset_info.features

    def plain(value: Any, feature: Any) -> Any:
        """Convert bytes to text, NumPy's numbers to Python's, and numbers of classes to the classes' names."""
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
    """Find the folder of the one version of a TFDS data set in `folder` or below it.

    Raises:
        ValueError: there is no version there, or more than one.
    """
    found = sorted(file.parent for file in folder.rglob("features.json"))
    if config_name:
        found = [place for place in found if config_name in place.parts]
    if len(found) != 1:
        names = ", ".join(str(place.relative_to(folder)) for place in found) or "none"
        raise ValueError(f"expected one prepared data set (with a features.json) in the folder, found {names}")
    return found[0]


def _read_kaggle(path: str, config_name: str | None, split: str, setting: str) -> Iterator[Row]:
    """Read the files of one split of a Kaggle data set: a handle ("owner/name"), or a local copy of its folder."""
    folder = Path(path)
    if not folder.is_dir():
        _require_package("kagglehub", setting, path)
        import kagglehub

        with _loading("Kaggle", path, config_name, split, setting):
            folder = Path(kagglehub.dataset_download(path))
    files = [file for file in sorted(folder.rglob("*")) if format_of(file) is not None]
    if config_name:
        files = [file for file in files if _path_has_word(file, folder, config_name)]
    chosen = [file for file in files if file.name.lower().removesuffix(format_of(file)) == split.lower()]
    chosen = chosen or [file for file in files if _path_has_word(file, folder, split)]
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
        yield from read_file(file, setting)


def _path_has_word(file: Path, folder: Path, word: str) -> bool:
    """Whether a file's path below the folder has this whole word in it; "latest.csv" does not have the word "test"."""
    name = file.relative_to(folder).with_suffix("").as_posix().lower()
    return re.search(rf"(?<![a-z0-9]){re.escape(word.lower())}(?![a-z0-9])", name) is not None
