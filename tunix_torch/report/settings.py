"""The settings of a run that differ from the defaults, and the command that runs the same job again."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.recipes import JOB, defaults_in_force
from ..config.saved import GROUPS, changed_from_defaults, differing_settings
from ..data.visible import visible

# They say where a run writes, and not what it does.
_PLACES = ("output_dir", "run_name")
# The report says above its settings by which method the run learned.
_SAID_ABOVE = ("use_grpo",)


@dataclass(frozen=True)
class Setting:
    """A setting that is not at its default."""

    name: str
    value: str
    default: str
    help: str


def shown(value: Any) -> str:
    """A value as a page shows it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return visible(text if text else '""')


def not_at_default(settings: dict[str, Any]) -> list[Setting]:
    """The settings of a run that are not at the default of such a job, in the order of the dataclasses.

    The tiny model's job has defaults of its own, as `train.py --help` shows them.
    """
    found = []
    for name, (value, default) in changed_from_defaults(settings, defaults_in_force(settings)).items():
        if name not in (*_PLACES, *_SAID_ABOVE):
            field = next(c.__dataclass_fields__[name] for c in GROUPS if name in c.__dataclass_fields__)
            help = str(field.metadata.get("help", "")).partition(". ")[0].replace("`", "").rstrip(".")
            found.append(Setting(name, shown(value), shown(default), help))
    return found


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The settings that two runs have not in common: name, the value of each. One that is missing has its default."""
    found = differing_settings(one, other).items()
    return [(name, *map(shown, values)) for name, values in found if name not in _PLACES]


def command_of(settings: dict[str, Any]) -> str:
    """The command that runs a job with these settings: `python train.py` with a flag for each that it needs.

    A setting that is None, where the command would take something else, can't be given as a flag; it is left out. So
    is `report_to`, which changes nothing that is learned.
    """
    taken = {"use_grpo": False, **JOB, **defaults_in_force(settings)}
    flags = []
    for name, (value, _) in changed_from_defaults(settings, taken).items():
        if value is not None and name not in (*_PLACES, "report_to"):
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
