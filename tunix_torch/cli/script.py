"""What every command and script shares: the early choice of a device, one-line errors and exit codes."""

import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ..config.files import load_config


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line without the usage text, and whose `--help` keeps the lines of its text.

    Args:
        command: what the user has called, such as "tunix-torch ask" or "python inference.py".
        description: what `--help` says of it; in its examples COMMAND stands for the command.
    """

    def __init__(self, command: str, description: str) -> None:
        form = argparse.RawDescriptionHelpFormatter
        described = description.replace("COMMAND", command)
        super().__init__(prog=command, description=described, formatter_class=form, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def called_as(command: str | None) -> str:
    """What the user has called; None: a script, by the name of its file."""
    return command or shlex.join(["python", sys.argv[0]])


def choose_device(argv: Sequence[str] | None = None) -> None:
    """Set TUNIX_DEVICE from `--device`, or from the config file, and let the library choose, before Transformers loads.

    Other mistakes in the arguments are left to the parser, which sees them again and can say more.

    Raises:
        ValueError: a device that does not exist, or is not here.
    """
    given = values_of(("--device", "--config"), sys.argv[1:] if argv is None else argv)
    if "--device" in given:
        os.environ["TUNIX_DEVICE"] = given["--device"]
    elif "--config" in given and Path(given["--config"]).is_file():
        named = load_config(given["--config"]).get("device")
        if named is not None:
            os.environ["TUNIX_DEVICE"] = str(named)
    from ..runtime import device  # noqa: F401


def values_of(names: Sequence[str], argv: Sequence[str]) -> dict[str, str]:
    """The values of some flags, read before the parser can be imported."""
    given = {}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in names:
            given[name] = value if equals else next(iter(argv[i + 1 : i + 2]), "")
    return given


def fail(message: str) -> NoReturn:
    """End the script over a user's mistake: one line of its own, exit code 2."""
    if "tqdm" in sys.modules:  # a progress bar would share the line, and be drawn again after it
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def one_line(message: str) -> str:
    """A message as one line of letters that a terminal shows. Line ends and codes from a user's data are not printed
    as they are."""
    letters = " ".join(message.split())
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in letters)


def check_output_file(name: str, file: Path | None) -> None:
    """Raises ValueError when the file that a flag names can't be written, before hours of work; None: not asked for."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"{name}={str(file)!r}: expected a file in a folder that exists")


def need_extra(package: str, extra: str, what: str) -> None:
    """Raises ValueError when a package that only an extra of this one brings is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed: pip install 'tunix-torch[{extra}]'")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. A user's mistake becomes one line and exit code 2; a number that is not finite, or a file
    that can't be read or written, one line and exit code 1; Ctrl-C exit code 130, and a second Ctrl-C at once.

    TUNIX_DEBUG=1 shows the traceback. Modules may be imported from the folder where the user is.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGINT, _interrupted)
    try:
        main()
        sys.stdout.flush()
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("TUNIX_DEBUG") == "1":
            raise
        if isinstance(error, ValueError):
            fail(str(error))
        if isinstance(error, BrokenPipeError):  # whoever read the output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more as it ends
            sys.exit(128 + signal.SIGPIPE)
        print(f"\nerror: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def _interrupted(number: int, frame: object) -> NoReturn:
    """Raise KeyboardInterrupt at the first Ctrl-C. At a second one leave at once, whatever is being closed."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    raise KeyboardInterrupt


def quiet_transformers() -> None:
    """Of Transformers, show errors only, and no progress bars of loading."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
