"""Reads the settings of a JSON or YAML file, for a command's `--config` and wherever a run's own file is read again."""

import json
import os
from pathlib import Path
from typing import Any

MOST_VALUES = 100_000  # in a YAML file, those in lists and mappings included


def load_config(path: str | Path) -> dict[str, Any]:
    """The settings of a JSON or YAML file.

    Raises:
        ValueError: there is no such file, it can't be read (the message names the line), or it is no mapping of names
            to values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config={str(path)!r}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    settings = _parse_yaml(text, path) if path.suffix in (".yaml", ".yml") else _parse_json(text, path)
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f'{path}: expected names and values, such as {{"learning_rate": 1e-5}}')
    # YAML reads a bare `no` as False, but for Transformers' strategies "no" is a word.
    return {name: "no" if name.endswith("_strategy") and v is False else v for name, v in settings.items()}


class NotJSON(ValueError):
    """A text is no JSON, or none that says one thing.

    Attributes:
        reason: why, in a few words.
        line: the line, from 1, where that shows; None: it is not known.
    """

    def __init__(self, reason: str, line: int | None) -> None:
        super().__init__(f"not valid JSON: {reason}")
        self.reason, self.line = reason, line


def parse_json(text: str) -> Any:
    """The value of a JSON text, in which no object has a name twice: Python would silently take the last.

    Raises:
        NotJSON: the text is no such JSON, is nested more deeply than Python reads, or has a whole number of more digits
            than Python reads (4,300).
    """
    try:
        return json.loads(text, object_pairs_hook=_object_of)
    except json.JSONDecodeError as error:
        raise NotJSON(error.msg, error.lineno) from None
    except RecursionError:
        raise NotJSON("nested too deeply", None) from None
    except NotJSON:
        raise
    except ValueError as error:
        raise NotJSON(str(error), None) from None


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise NotJSON(f"the name {twice!r} is there twice", None)
    return names


def _parse_json(text: str, path: Path) -> object:
    try:
        return parse_json(text)
    except NotJSON as error:
        line = f", line {error.line}" if error.line else ""
        raise ValueError(f"{path}{line}: {error}") from error


def _parse_yaml(text: str, path: Path) -> object:
    import yaml

    from .yaml_loader import SettingsLoader

    try:
        loader = SettingsLoader(text)
        node = loader.get_single_node()
        settings = {} if node is None else loader.construct_document(node)  # an empty file sets nothing
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # of numbers and dates it lets Python's errors through
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}{line}: not valid YAML: {reason}") from error
    if not _is_small(settings):
        raise ValueError(f"{path}: its aliases (*name) make more than {MOST_VALUES:,} values; write out what is meant")
    return settings


def _is_small(value: object) -> bool:
    """Whether a value has at most MOST_VALUES values in it. With aliases, thirty lines of YAML may have billions."""
    waiting, count = [value], 0
    while waiting and count <= MOST_VALUES:
        value, count = waiting.pop(), count + 1
        if isinstance(value, dict | list | set):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return count <= MOST_VALUES


def write_whole(path: str | Path, content: str | bytes, flush: bool = True) -> None:
    """Write a text or bytes so that at every moment the file holds either what it held before or all that is new.

    Args:
        flush: wait until it is on the disk, which takes milliseconds. False: that holds unless the machine loses power.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.new")
    try:
        with open(beside, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode())
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
