"""What the scripts share: the early choice of a device, one-line errors, config files, a device report.

What the library knows about a run's folder is here under its own names too: `utils.load_metrics` and so on.
"""

import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Importing the library chooses the device, so these are looked up when they are first used.
IN_LIBRARY = {
    "memory_summary": "device",
    **dict.fromkeys(
        (
            "check_output_dir",
            "find_system_message",
            "get_latest_checkpoint",
            "load_metrics",
            "newest_run",
            "plot_training_curves",
            "resolve_checkpoint",
            "save_config",
            "set_aside_previous_run",
            "settings_of",
        ),
        "run_folder",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in IN_LIBRARY:
        raise AttributeError(f"module 'utils' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tunix_torch.{IN_LIBRARY[name]}"), name)


def choose_device(argv: Sequence[str] | None = None) -> None:
    """Set TUNIX_DEVICE from `--device`, or from the config file, and let the library choose, before Transformers loads.

    Other mistakes in the arguments are left to the parser, which sees them again and can say more.

    Raises:
        ValueError: a device that does not exist, or is not here.
    """
    argv = sys.argv[1:] if argv is None else argv
    given = {}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in ("--device", "--config"):
            given[name] = value if equals else next(iter(argv[i + 1 : i + 2]), "")
    if "--device" in given:
        os.environ["TUNIX_DEVICE"] = given["--device"]
    elif "--config" in given and Path(given["--config"]).is_file():
        device = load_config(given["--config"]).get("device")
        if device is not None:
            os.environ["TUNIX_DEVICE"] = str(device)
    import tunix_torch  # noqa: F401


def fail(message: str) -> NoReturn:
    """End the script over a user's mistake: one line, exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: a user's mistake becomes one line and exit code 2, Ctrl-C exit code 130.

    TUNIX_DEBUG=1 shows the traceback. Modules may be imported from the folder where the user is.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        main()
    except ValueError as error:
        if os.environ.get("TUNIX_DEBUG") == "1":
            raise
        fail(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


# ---- config files ----


def load_config(path: str | Path) -> dict[str, Any]:
    """The settings of a JSON or YAML file.

    Raises:
        ValueError: no such file, it can't be read (with the line), or it is no mapping of names to values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config={str(path)!r}: no such file")
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        import yaml

        class Loader(yaml.SafeLoader):
            """YAML 1.1 takes 1e-5 for a text; people mean a number."""

        number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
        Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
        try:
            settings = yaml.load(text, Loader=Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise ValueError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    else:
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    if isinstance(settings, dict):  # YAML reads a bare `no` as False
        settings = {n: "no" if n.endswith("_strategy") and v is False else v for n, v in settings.items()}
    else:
        raise ValueError(f'{path}: expected names and values, such as {{"learning_rate": 1e-5}}')
    return settings


# ---- device ----


def verify_tpu_setup() -> dict[str, Any]:
    """What this process computes on, after a small matrix product there whose result is checked."""
    import torch

    from tunix_torch import device

    ones = torch.ones(8, 8, device=device.torch_device())
    total = float((ones @ ones).sum().cpu())
    assert total == 512.0, f"the device multiplied wrongly: {total}"
    return {"kind": device.KIND, "tpu": device.is_tpu(), "description": device.describe(), "torch": torch.__version__}
