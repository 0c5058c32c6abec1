"""Reads the settings of a JSON or YAML file, for a command's `--config` and wherever a run's own file is read again."""

import json
import os
from pathlib import Path
from typing import Any


def load_config(path: str | Path) -> dict[str, Any]:
    """The settings of a JSON or YAML file.

    Raises:
        ValueError: there is no such file, it can't be read (the message names the line), or it is no mapping of names
            to values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config={str(path)!r}: no such file")
    settings = _read_yaml(path) if path.suffix in (".yaml", ".yml") else _read_json(path)
    if not isinstance(settings, dict):
        raise ValueError(f'{path}: expected names and values, such as {{"learning_rate": 1e-5}}')
    # YAML reads a bare `no` as False, but for Transformers' strategies "no" is a word.
    return {name: "no" if name.endswith("_strategy") and v is False else v for name, v in settings.items()}


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error


def _read_yaml(path: Path) -> object:
    """Read a file by OmegaConf, which takes 1e-5 for a number, while plain YAML 1.1 takes it for a text."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        return OmegaConf.to_container(OmegaConf.load(path))
    except OSError:  # OmegaConf raises it for a file that is a number or a date alone
        return None
    except (YAMLError, OmegaConfBaseException) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error


def write_whole(path: str | Path, text: str) -> None:
    """Write a text so that at every moment the file holds either what it held before or all of the new text."""
    path = Path(path)
    beside = path.with_name(f"{path.name}.new")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
