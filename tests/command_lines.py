"""Parses a command line by the real parser of the command that it calls, without running it.

Commands are parsed in the current folder, in which the files that they read must be.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from shown_commands import ROOT, called_by_make

from tunix_torch.cli.command import COMMANDS
from tunix_torch.cli.script import values_of
from tunix_torch.config.flags import parse_job
from tunix_torch.preflight.chips import parse_topology
from tunix_torch.runtime import mesh, together

DEVICES = ("auto", "cpu", "cuda", "tpu", "xla")
# Programs of others: what a page shows of them is theirs. Of an environment's folder the last word of the path counts.
OTHERS = set(
    "awk curl echo find gcc gcloud git grep kill llama-server mkdir mkdocs pgrep pip-audit rm ruff sed sleep tee "
    "tensorboard touch transformers uv vllm".split()
)
SCRIPTS_OF_OTHERS = {"convert_hf_to_gguf.py"}
MODULES_OF_OTHERS = {"torch.tpu.distributed", "venv"}
OURS = {"benchmarks", "crosscheck", "preflight", "tunix_torch"}
# Ours that take words and no flags, and so have no parser.
ONLY_WORDS = {"docs.draw_learning_curve", "docs/draw_troubles.py", "docs/write_files.py", "example_usage.py"}
ONLY_WORDS |= {"benchmarks.first_gpu", "benchmarks.small_job", "rewards_example.py", "tunix_torch.compat.generate"}


class WrongCommandError(Exception):
    """A command that a reader can't run as it stands."""


def check(words: Sequence[str]) -> None:
    """Check that a command's program is there, that it has these flags, and that the files of ours that it names exist.

    Raises:
        WrongCommandError: with what is wrong.
    """
    program, *given = words
    # Three dots stand for what a reader adds; after a flag they are its value.
    given = [word for before, word in zip(words, given, strict=False) if word != "..." or before.startswith("--")]
    name = program.rpartition("/")[2]
    try:
        if re.fullmatch(r"python[\d.]*", name):
            _check_python(given)
        elif name == "make":
            for called in called_by_make(given) if given else []:
                check(called)
        elif name == "tunix-torch":
            _check_tunix_torch(given)
        elif name == "torchrun":
            _check_python(["-m", "torch.distributed.run", *given])
        elif name == "accelerate":
            _check_launched("accelerate.commands.launch", "launch_command_parser", given[1:])
        elif name == "pip":
            _check_pip(given)
        elif name.endswith(".sh"):
            _check_shell_script(program, given)
        elif name not in OTHERS:
            raise ValueError(f"unknown program {program!r}: mend it, or add it to OTHERS in tests/command_lines.py")
        _check_files(given)
    except (ValueError, SyntaxError) as error:
        raise WrongCommandError(str(error)) from error


def _check_files(words: Sequence[str]) -> None:
    for word in words:
        ours = re.match(r"(?:benchmarks|conf|configs|docs|notebooks|tests)/[\w/.-]+$", word)
        if ours and not (ROOT / word).exists():
            raise ValueError(f"{word}: no such file")


def _check_python(words: Sequence[str]) -> None:
    if not words:
        return
    first, *given = words
    if first == "-c":
        ast.parse(given[0])
    elif first == "-":
        ast.parse(given[-1])  # what is read from the standard input
    elif first == "-m":
        _check_module(given[0], given[1:])
    elif first not in SCRIPTS_OF_OTHERS:
        if not (ROOT / first).is_file():
            raise ValueError(f"{first}: no such file")
        _check_module(first, given)


def _check_module(name: str, given: Sequence[str]) -> None:
    """Check a module, or a script by its path, and what is given to it."""
    if name == "torch.distributed.run":
        _check_launched(name, "get_args_parser", given)
    elif name == "pytest":
        _check_pytest(given)
    elif name == "tunix_torch.cli":
        _check_tunix_torch(given)
    elif name == "run_training.py":
        _check_hydra(given)
    elif name in ONLY_WORDS:
        flags = [word for word in given if word.startswith("-")]
        if flags:
            raise ValueError(f"{name} takes no flags, and {flags[0]} is given")
    elif name not in MODULES_OF_OTHERS:
        _parse(importlib.import_module(module_of(name)), given)


def module_of(name: str) -> str:
    """The name by which a script, or what `python -m` is given, is imported."""
    if name.endswith(".py"):
        return name.removesuffix(".py").replace("/", ".")
    spec = importlib.util.find_spec(name) if name.partition(".")[0] in OURS else None
    if spec is None:
        raise ValueError(f"no module {name} here: mend it, or add it to MODULES_OF_OTHERS in tests/command_lines.py")
    return f"{name}.__main__" if spec.submodule_search_locations else name


def _check_tunix_torch(given: Sequence[str]) -> None:
    if not given or given[0] in ("NAME", "COMMAND"):
        return
    if given[0] not in COMMANDS:
        raise ValueError(f"tunix-torch {given[0]}: choose one of {', '.join(COMMANDS)}")
    _parse(importlib.import_module(f"tunix_torch.cli.{given[0]}"), given[1:])


def _parse(module: object, given: Sequence[str]) -> None:
    """Give the flags to the parser behind a module's `main`. Without flags there is nothing to parse."""
    name = module.main.__module__
    home = sys.modules[name]
    if not given:
        return
    if name == "tunix_torch.cli.train":
        _of_train(given)
    elif name in ("tunix_torch.cli.plan", "tunix_torch.cli.beside_tunix"):
        ours, rest = _parsed(lambda: home.parse_args(given, name))
        parse_topology(ours.topology)
        _of_train(rest)
    elif name.startswith("tunix_torch.cli."):
        _parsed(lambda: home.parse_args(given, name))
    elif hasattr(home, "parse_args"):
        _parsed(lambda: home.parse_args(given))
    elif "ArgumentParser(" in inspect.getsource(home):
        _parsed_by_main(home.main, [name, *given])
    else:
        raise ValueError(f"{name} has no parser: mend it, or add it to ONLY_WORDS in tests/command_lines.py")


class _ParsedError(BaseException):
    """Leaves a `main` when its parser has read the arguments."""


def _parsed(parse: Callable[[], Any]) -> Any:
    """What a call of a parser returns; None where it printed its help.

    Raises:
        ValueError: with what the parser says.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            return parse()
        except SystemExit as end:
            if end.code != 0:
                raise ValueError(said.getvalue().strip().splitlines()[-1]) from end
    return None


def _parsed_by_main(main: Callable[[], object], words: Sequence[str]) -> None:
    """Let a `main` parse the words, with the program first, and leave it there."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser, *args, **named):
        real(parser, *args, **named)
        raise _ParsedError

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(sys, "argv", list(words)),
        contextlib.suppress(_ParsedError),
    ):
        _parsed(main)


def _of_train(given: Sequence[str]) -> None:
    """Parse the settings of `train.py` as it does, on a machine that has the device and the mesh that they name."""
    device = values_of(("--device",), given).get("--device", "auto")
    if device not in DEVICES:
        raise ValueError(f"device={device!r}: choose one of {', '.join(DEVICES)}")
    here = [word for before, word in zip(["", *given], given, strict=False) if "--device" not in (before, word)]
    here = [word for word in here if not word.startswith("--device=")]
    with mock.patch.object(mesh, "use_mesh"):
        _parsed(lambda: parse_job(here))


def _check_hydra(given: Sequence[str]) -> None:
    """Compose the sections as run_training.py does, and make the job's settings of them, for each job of a sweep."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import open_dict

    from tunix_torch.cli.hydra_app import config_from, explain

    overrides = [word for word in given if "=" in word]
    flags, jobs = [word for word in given if "=" not in word], [overrides]
    if flags not in ([], ["--multirun"], ["--cfg", "job"]):
        raise ValueError(f"run_training.py {' '.join(flags)}: expected no flags, --multirun or --cfg job")
    if flags == ["--multirun"]:
        values = [
            [f"{name}={value}" for value in all_of.split(",")]
            for name, _, all_of in (w.partition("=") for w in overrides)
        ]
        jobs = list(map(list, itertools.product(*values)))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in jobs:
            try:
                config = compose("config", overrides=job)
            except HydraException as error:
                raise explain(error) from error
            with open_dict(config), mock.patch.object(mesh, "use_mesh"):
                config_from(config, "outputs").flat()


def _check_launched(module: str, parser: str, given: Sequence[str]) -> None:
    """Check what starts several processes of a script, and the script with its flags."""
    if not [word for word in given if not word.startswith("-")]:
        return  # only the launcher is named
    args = _parsed(lambda: getattr(importlib.import_module(module), parser)().parse_args(given))
    with mock.patch.object(together, "count", return_value=2):  # as the script finds it in each process
        _check_python([args.training_script, *args.training_script_args])


def _check_pytest(given: Sequence[str]) -> None:
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    known = {marker.partition(":")[0] for marker in markers}
    for before, word in zip(["", *given], given, strict=False):
        if before == "-m":
            unknown = set(re.findall(r"\w+", word)) - known - {"and", "or", "not"}
            if unknown:
                raise ValueError(f"pytest -m {word!r}: no marker {', '.join(sorted(unknown))}")
        elif word.startswith("tests") and not (ROOT / word.partition("::")[0]).exists():
            raise ValueError(f"{word}: no such file")


def _check_pip(given: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in given:
        for name in re.findall(r"^(?:\.|tunix-torch)\[(.+)\]$", word):
            unknown = set(name.split(",")) - set(extras)
            if unknown:
                raise ValueError(f"pip install {word}: no extra {', '.join(sorted(unknown))}")


def _check_shell_script(program: str, given: Sequence[str]) -> None:
    path = ROOT / program
    if not path.is_file() or not path.stat().st_mode & 0o100:
        raise ValueError(f"{program}: no such script, or it may not be executed")
    if path.name == "run_tpu_training.sh":
        _of_train([word for word in given if word not in ("--dry-run", "--help", "-h")])
        return
    unknown = [word for word in given if word.startswith("-") and word not in path.read_text()]
    if unknown:
        raise ValueError(f"{program} has no {unknown[0]}")
