"""Reads a job's settings from the flags of `train.py`, which other commands take too, and from the file they name."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from ..runtime import mesh
from .aliases import ALIASES
from .data import DataConfig, default_rewards
from .files import load_config
from .grpo import GRPOConfig
from .help import help_asked, print_groups, print_help, without_help
from .model import TINY_NAME, ModelConfig
from .recipes import JOB, TINY
from .settings import canonical_names, nearest, said_as, with_aliases

CONFIGS = (ModelConfig, DataConfig, GRPOConfig)
NAMES = sorted({field.name for config in CONFIGS for field in dataclasses.fields(config) if field.init})
# If a setting is given, the values that a recipe or a file has for these others are dropped.
OUTWEIGHS = {
    "max_length": ("max_prompt_length",),
    "num_train_epochs": ("max_steps",),
    "model_size": ("model_name",),
    "model_name": ("model_size",),
    "reward_preset": ("reward_funcs", "reward_weights"),
    "reward_funcs": ("reward_preset", "reward_weights"),
}


class JobParser(HfArgumentParser):
    """A parser whose errors are one line without the usage text, which lists some two hundred flags."""

    names_in_file: Sequence[str] = ()  # the names of the settings in the config file, as they stand there

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_job(
    argv: Sequence[str], prog: str | None = None, description: str | None = None
) -> tuple[ModelConfig, DataConfig, GRPOConfig]:
    """Read settings from, in rising order of precedence, defaults, the tiny model's recipe, the config file, flags.

    Args:
        prog, description: what `--help` calls the command, and says of it.

    Raises:
        ValueError: a name is unknown (the message has the nearest one), or a value is not possible.
        SystemExit: with code 0, after help was asked for and printed. It shows the defaults that are in force with the
            file and the other flags.
    """
    asked, given = help_asked(argv), [word.partition("=")[0].removeprefix("--") for word in argv]
    argv = _replace_aliases(without_help(argv))
    parser = _job_parser(argv, prog, description)
    if asked is not None:
        print_help(parser, CONFIGS, _meant_by_none(parser, argv), everything=asked == "help-all")
        sys.exit(0)
    model = parser.parse_known_args(argv)[0]
    # The mesh must be chosen before GRPOConfig is made, since that begins to use the device.
    mesh.use_mesh(ModelConfig(mesh_shape=model.mesh_shape, mesh_axes=model.mesh_axes).mesh)
    with said_as(with_aliases([*parser.names_in_file, *given])):
        model_config, data_config, args, _, unknown = parser.parse_args_into_dataclasses(
            list(argv), return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        flag = unknown[0].partition("=")[0]  # without the value, which may be a secret
        name = flag.removeprefix("--")
        known = [f"--{setting}" for setting in (*NAMES, *ALIASES)]
        raise ValueError(f"unknown argument {flag!r}{nearest(flag, known) if name else ''}")
    return model_config, data_config, args


def print_settings(argv: Sequence[str]) -> None:
    """Print all settings by group, with the defaults that are in force with these flags and the file that they name.

    Raises:
        ValueError: see `parse_job`.
    """
    argv = _replace_aliases(without_help(argv))
    parser = _job_parser(argv)
    print_groups(parser, CONFIGS, _meant_by_none(parser, argv))


def _meant_by_none(parser: JobParser, argv: Sequence[str]) -> dict[str, Any]:
    """Of settings that have no value by default, what a job takes then, by the setting's name."""
    given = parser.parse_known_args(argv)[0]
    rewards = default_rewards(given.dataset)
    meant: dict[str, Any] = {"judge": rewards[0]}
    if given.reward_preset is not None:
        meant["reward_funcs"] = f"those of {given.reward_preset}"
    elif given.teacher is None:
        meant["reward_funcs"] = rewards
    return meant


def _job_parser(argv: Sequence[str], prog: str | None = None, description: str | None = None) -> JobParser:
    """The parser of all settings, with the defaults that are in force with these flags and the file that they name."""
    parser = JobParser(CONFIGS, prog=prog, description=description, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="a JSON or YAML file with settings; flags win over it")
    file = parser.parse_known_args(argv)[0].config
    settings = load_config(file) if file else {}
    parser.names_in_file, settings = list(settings), canonical_names(settings, NAMES)
    _set_defaults(parser, argv, settings)
    return parser


def _set_defaults(parser: JobParser, argv: Sequence[str], settings: dict[str, Any]) -> None:
    """Make the parser's defaults those of the file, and below them the recipe's where the model is the tiny one."""
    given = {word.partition("=")[0].removeprefix("--") for word in argv if word.startswith("--")}
    dropped = _rivals_of(given) - given
    if "eval_strategy" in given and parser.parse_known_args(argv)[0].eval_strategy == "no":
        if "eval_steps" in given:
            raise ValueError("eval_strategy='no': eval_steps says how often to evaluate; give one of the two")
        dropped.add("eval_steps")
    settings = {name: value for name, value in settings.items() if name not in dropped}
    lowest = {"use_grpo": False} | JOB
    parser.set_defaults(**_as_defaults(lowest | settings))
    model = parser.parse_known_args(argv)[0]
    if model.model_name == TINY_NAME and model.model_size is None:
        dropped |= _rivals_of(given | {name for name, value in settings.items() if value is not None})
        recipe = {name: value for name, value in TINY.items() if name not in dropped}
        parser.set_defaults(**_as_defaults(lowest | recipe | settings))


def _rivals_of(names: set[str]) -> set[str]:
    return {rival for name in names & set(OUTWEIGHS) for rival in OUTWEIGHS[name]}


def _replace_aliases(argv: Sequence[str]) -> list[str]:
    """Replace aliases such as `--beta` by our names for the settings. One setting under two names is a mistake."""
    result, seen = [], {}
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            ours = ALIASES.get(name[2:], name[2:])
            if seen.setdefault(ours, name) != name:
                raise ValueError(f"{name} and {seen[ours]} are the same setting: give one of them")
            word = f"--{ours}{equals}{value}"
        result.append(word)
    return result


def _as_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn the values of a file into parser defaults: into text, which the parser converts and checks like a flag's."""
    plain = (list, dict, type(None), bool)
    return {name: value if isinstance(value, plain) else str(value) for name, value in settings.items()}
