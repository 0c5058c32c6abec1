"""What every command and script shares: the early choice of a device, one-line errors and exit codes."""

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..config.files import load_config
from ..config.settings import nearest, require
from ..data.visible import visible
from ..runtime.choice import KINDS


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

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """See `argparse`; but of an unknown argument only the name is shown, since its value may be a secret."""
        result, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise ValueError(f"unknown argument {flag!r}{nearest(flag, list(self._option_string_actions))}")
        return result

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
    named = given.get("--device")
    if named is None and "--config" in given and Path(given["--config"]).is_file():
        named = load_config(given["--config"]).get("device")
    if named is not None:
        require(named in KINDS, "device", named, f"choose one of {', '.join(KINDS)}")
        os.environ["TUNIX_DEVICE"] = named
    from ..runtime import device  # noqa: F401


def values_of(names: Sequence[str], argv: Sequence[str]) -> dict[str, str]:
    """The values of some flags, read before the parser can be imported."""
    given = {}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in names:
            given[name] = value if equals else next(iter(argv[i + 1 : i + 2]), "")
    return given


def fail(message: str, code: int = 2) -> NoReturn:
    """End the script: one line of its own, and by default the exit code of a user's mistake.

    Process k of a host waits k seconds before. When one process fails, `torchrun` ends the others, so that a mistake
    which all of them meet is said once, and one which a single process meets is said all the same.
    """
    for bar in _bars():  # a progress bar would share the line, and be drawn again after it
        bar.close()
    if (turn := int(os.environ.get("LOCAL_RANK", "0"))) > 0:
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(turn)
    print(f"error: {visible(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


def _bars() -> list[Any]:
    """The progress bars that are on the terminal. Where tqdm has not been imported there are none."""
    return list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())) if "tqdm" in sys.modules else []


class _ToTerminal(logging.StreamHandler):
    """Shows a warning as its text alone, on a line of its own, without what would change the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        text = visible(self.format(record))
        if _bars():
            sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def check_output_file(name: str, file: Path | None) -> None:
    """Raises ValueError when the file that a flag names can't be written, before hours of work; None: not asked for."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"{name}={str(file)!r}: expected a file in a folder that exists")


def need_extra(package: str, extra: str, what: str) -> None:
    """Raises ValueError when a package that only an extra of this one brings is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{what} needs {package}, which is not installed: pip install 'tunix-torch[{extra}]'")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`. A user's mistake becomes one line and exit code 2; a number that is not finite, a file
    that can't be read or written, memory that runs out, or rewards that fail, one line and exit code 1; Ctrl-C exit
    code 130, and a second Ctrl-C at once. Of a mistake in a reward function its own lines are shown before.

    TUNIX_DEBUG=1 shows the traceback. Modules may be imported from the folder where the user is.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(_ToTerminal())
    wait_for_ctrl_c()
    try:
        main()
        sys.stdout.flush()
    except Exception as error:
        if os.environ.get("TUNIX_DEBUG") == "1":
            raise
        said, code = _what_to_say(error)
        if said is None:
            raise
        fail(said, code)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def _what_to_say(error: Exception) -> tuple[str | None, int]:
    """The line that an error becomes, and the exit code. None: it is a fault of ours, which shows its traceback."""
    from ..rewarding.values import is_of_rewards  # not needed where nothing fails
    from ..runtime.memory import in_one_line, is_out_of_memory

    if is_out_of_memory(error):
        return _with_notes(in_one_line(error), error), 1
    of_rewards = is_of_rewards(error)  # what failed may be there again when the job is started again
    if isinstance(error, BrokenPipeError) and not of_rewards:  # whoever read the output has ended, as `head` does
        for file in (sys.stdout, sys.stderr):  # or Python would try once more as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
        sys.exit(128 + signal.SIGPIPE)
    if isinstance(error, ValueError | FloatingPointError | OSError):
        said = re.sub(r"^\[Errno \d+\] ", "", str(error))
        return _with_notes(said, error), 2 if isinstance(error, ValueError) and not of_rewards else 1
    own = _frames_of_others(error) if of_rewards else []
    print("".join(traceback.format_list(own)), end="", file=sys.stderr)
    return _with_notes(f"{type(error).__name__}: {error}", error) if own else None, 1


def _frames_of_others(error: Exception) -> list[traceback.FrameSummary]:
    """The calls from somebody's own function on, in which an error was raised; none of the library's own."""
    frames, library = traceback.extract_tb(error.__traceback__), str(Path(__file__).parents[1])
    number = next((i for i in range(len(frames), 0, -1) if frames[i - 1].filename.startswith(library)), 0)
    return frames[number:]


def wait_for_ctrl_c() -> None:
    """Let the next Ctrl-C raise KeyboardInterrupt, and the one after it leave at once."""
    with contextlib.suppress(ValueError):  # only the main thread may
        signal.signal(signal.SIGINT, _interrupted)


def _with_notes(said: str, error: Exception) -> str:
    """What an error says, with the notes that were added to it, such as where a run goes on."""
    return ". ".join(part.rstrip(".") for part in (said, *getattr(error, "__notes__", ())))


def _interrupted(number: int, frame: object) -> NoReturn:
    """Raise KeyboardInterrupt at the first Ctrl-C. At a second one leave at once, whatever is being closed."""
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    raise KeyboardInterrupt


def quiet_transformers() -> None:
    """Of Transformers, show errors only, and no progress bars of loading."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
