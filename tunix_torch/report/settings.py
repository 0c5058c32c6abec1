"""The settings of a run that differ from the defaults, and the command that runs the same job again."""

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.data import DataConfig
from ..config.grpo import GRPOConfig
from ..config.model import TINY_NAME, ModelConfig
from ..config.recipes import JOB, TINY
from ..config.saved import NOT_SAVED, default_of
from ..data.visible import visible

# They say where a run writes, and not what it does.
_PLACES = ("output_dir", "run_name")
_GROUPS = {ModelConfig: "model", DataConfig: "data and rewards", GRPOConfig: "training"}


@dataclass(frozen=True)
class Setting:
    """A setting that is not at its default."""

    name: str
    group: str
    value: str
    default: str
    help: str


def shown(value: Any) -> str:
    """A value as a page shows it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return visible(text if text else '""')


def _fields() -> list[tuple[str, dataclasses.Field]]:
    return [(_GROUPS[c], field) for c in _GROUPS for field in dataclasses.fields(c) if field.init]


def changed_from_defaults(settings: dict[str, Any]) -> list[Setting]:
    """The settings of a run that are not at the default of their dataclass, in the order of the dataclasses."""
    found = []
    for group, field in _fields():
        if field.name not in settings or field.name in (*_PLACES, *NOT_SAVED):
            continue
        value, default = settings[field.name], json.loads(json.dumps(default_of(field), default=str))
        if not _is_default(field.name, value, default, settings):
            text = str(field.metadata.get("help", "")).partition(". ")[0].replace("`", "").rstrip(".")
            found.append(Setting(field.name, group, shown(value), shown(default), text))
    return found


def _is_default(name: str, value: Any, default: Any, settings: dict[str, Any]) -> bool:
    """Whether a setting has its default, or follows from another one."""
    if name == "eval_strategy":  # eval_steps says so too
        return value == default or (value == "steps" and settings.get("eval_steps") is not None)
    return value == default or value == [default]  # report_to becomes a list


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The settings that two runs have not in common: name, the value of each. One that is missing has its default."""
    found = []
    for _, field in _fields():
        if field.name in (*_PLACES, *NOT_SAVED):
            continue
        default = json.loads(json.dumps(default_of(field), default=str))
        values = one.get(field.name, default), other.get(field.name, default)
        if values[0] != values[1]:
            found.append((field.name, *map(shown, values)))
    return found


def command_of(settings: dict[str, Any]) -> str:
    """The command that runs a job with these settings: `python train.py` with a flag for each that it needs.

    A setting that is None, where the command would take something else, can't be given as a flag; it is left out. So
    is `report_to`, which changes nothing that is learned.
    """
    below: dict[str, Any] = {"use_grpo": False, **JOB}
    if settings.get("model_name") == TINY_NAME:
        below = {"use_grpo": False, **JOB, **TINY}
    flags = []
    for _, field in _fields():
        name = field.name
        if name not in settings or name in NOT_SAVED or settings[name] is None:
            continue
        value, default = settings[name], below.get(name, json.loads(json.dumps(default_of(field), default=str)))
        if name in (*_PLACES, "report_to") or _is_default(name, value, default, settings):
            continue
        flags += [f"--{name}", *_words(value)]
    return f"python train.py {shlex.join(flags)}".replace("--use_grpo true", "--use_grpo").rstrip()


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(item) for item in value]
    return [value if isinstance(value, str) else json.dumps(value)]


def command_with_file(folder: Path, settings_file: str) -> str:
    """The command that runs the job again by the settings in a run's folder."""
    file = shlex.quote(str(folder / settings_file))
    return f"python train.py --config {file} --output_dir {shlex.quote(f'{folder}-again')}"
