"""What the scripts share: the early choice of a device, one-line errors, config files, a device report.

What the library knows about a run's folder is here under its own names too: `utils.load_metrics` and so on.
"""

import importlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Importing the library chooses the device, so these are looked up when they are first used.
IN_LIBRARY = {
    "memory_summary": "runtime.device",
    "load_metrics": "run.curves",
    "plot_training_curves": "run.curves",
    "save_config": "config.saved",
    "settings_of": "config.saved",
    **dict.fromkeys(
        (
            "check_output_dir",
            "find_system_message",
            "get_latest_checkpoint",
            "newest_run",
            "resolve_checkpoint",
            "set_aside_previous_run",
        ),
        "run.folder",
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
    given = _values_of(("--device", "--config"), sys.argv[1:] if argv is None else argv)
    if "--device" in given:
        os.environ["TUNIX_DEVICE"] = given["--device"]
    elif "--config" in given and Path(given["--config"]).is_file():
        named = load_config(given["--config"]).get("device")
        if named is not None:
            os.environ["TUNIX_DEVICE"] = str(named)
    from tunix_torch.runtime import device  # noqa: F401


def _values_of(names: Sequence[str], argv: Sequence[str]) -> dict[str, str]:
    """The values of some flags, before a parser can be had."""
    given = {}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name in names:
            given[name] = value if equals else next(iter(argv[i + 1 : i + 2]), "")
    return given


def fail(message: str) -> NoReturn:
    """End the script over a user's mistake: one line, exit code 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def check_output_file(name: str, file: Path | None) -> None:
    """Raises ValueError when the file that a flag names can't be written, before hours of work; None: not asked for."""
    if file and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"{name}={str(file)!r}: expected a file in a folder that exists")


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`: a user's mistake becomes one line and exit code 2, a number that is not finite one line
    and exit code 1, Ctrl-C exit code 130.

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
    except FloatingPointError as error:  # training came upon a number that is not finite
        if os.environ.get("TUNIX_DEBUG") == "1":
            raise
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(1)
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

    from tunix_torch.runtime import device, mesh

    ones = torch.ones(8, 8, device=device.torch_device())
    total = float((ones @ ones).sum().cpu())
    assert total == 512.0, f"the device multiplied wrongly: {total}"
    return {"kind": device.KIND, "tpu": device.is_tpu(), "description": mesh.describe(), "torch": torch.__version__}


# ---- before a job on a TPU ----

# Chips of one host -> the slice that they are.
# The slices that one host can be, as `preflight.chips.parse_topology` takes them: by chip and number of chips.
TOPOLOGIES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4"},
    "v5p": {1: "1x1x1", 4: "2x2x1"},
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one is in the cache when a model is
LEAST_FREE = 2**30  # bytes that a run's folder needs: checkpoints of a LoRA, metrics


def check_tpu_host(argv: Sequence[str]) -> str | None:
    """What a job with these flags needs of this host: a TPU, the libtpu that fits, the model, room on the disk.

    Says on standard error what it finds. Computes nothing, and leaves the TPU to the job.

    Returns:
        the slice that this host is, such as "v5e:2x4"; None without a TPU, or where it can't be planned.

    Raises:
        ValueError: something is missing, and the job would fail over it.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    from tunix_torch.model import tiny
    from tunix_torch.runtime import choice

    given = _values_of(("--model_name", "--model_size", "--output_dir", "--config"), argv)
    settings = load_config(given["--config"]) if given.get("--config") else {}
    settings |= {name.removeprefix("--"): value for name, value in given.items()}

    def say(what: str, found: str) -> None:
        print(f"{what:<8} {found}", file=sys.stderr)

    chips, topology = choice.tpu_chips(), None
    if chips:
        shape = TOPOLOGIES.get(chips[0], {}).get(len(chips))
        topology = f"{chips[0]}:{shape}" if shape else None
        say("TPU", f"{len(chips)} chip(s), {chips[0]}")
        say("libtpu", f"{choice.check_libtpu()}, as torch_xla needs it")
    else:
        say("TPU", "No TPU was found on this machine: running the same graphs through XLA on the CPU.")

    size, output_dir = settings.get("model_size"), Path(settings.get("output_dir") or "./outputs")
    name = f"google/gemma-3-{size}-it" if size else settings.get("model_name") or tiny.NAME
    needed = {output_dir: LEAST_FREE}
    if name == tiny.NAME or Path(name).exists():
        say("model", f"{name} is here")
    elif any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHTS):
        say("model", f"{name} is in the cache, {constants.HF_HUB_CACHE}")
    else:
        say("model", f"{name} is not in the cache and will be downloaded to {constants.HF_HUB_CACHE}")
        billions = re.search(r"(\d+(?:\.\d+)?)([mb])\b", name.lower())
        if billions:  # two bytes a parameter
            needed[Path(constants.HF_HUB_CACHE)] = int(float(billions[1]) * {"m": 2e6, "b": 2e9}[billions[2]])
    for folder, least in needed.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < least:
            raise ValueError(f"{folder}: {free / 2**30:.1f} GiB free, and {least / 2**30:.1f} GiB are needed")
        say("disk", f"{free / 2**30:.0f} GiB free for {folder}")
    return topology
