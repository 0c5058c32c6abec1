"""Decides, before PyTorch is imported, whether this process computes on a TPU and through what. Imports nothing heavy.

Transformers and Accelerate take the XLA device by themselves as soon as they see torch_xla, and torch_tpu reads its
settings when PyTorch is imported, so the decision must come first: `tunix_torch` makes it when it is imported, from
`TUNIX_DEVICE`; a command that has a flag `--device` makes it anew before it imports the rest.
"""

import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import sys

KINDS = ("auto", "tpu", "xla", "cuda", "cpu")
SPINS_OF_THREADS = "5000"  # of a thread that waits, before it sleeps
# What a TPU is reached through, by the kind of device: the package, and how it is installed.
PACKAGES = {"tpu": "torch_tpu", "xla": "torch_xla"}
INSTALL = {
    "tpu": "pip install -r requirements-tpu.txt, in an environment of its own",
    "xla": "pip install 'torch-xla[tpu]==2.9.0'",
}

# Google's PCI vendor id, and the device ids of TPUs (torch_xla/_internal/tpu.py and jax/_src/hardware_utils.py).
_TPU_VENDOR = "0x1ae0"
_TPU_DEVICES = {
    "0x0027": "v2 or v3",
    "0x0056": "without a public name",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "v7x",
}
PCI_DEVICES = "/sys/bus/pci/devices"
_ACCELERATE = "ACCELERATE_TORCH_DEVICE"  # which Accelerate takes in place of its own choice
_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"  # "0": importing torch does not import torch_xla


def choose() -> str:
    """Set the environment for the device that `TUNIX_DEVICE` asks for, and say which kind that is.

    Returns:
        what was asked for, and where that is "auto" and there is a TPU, "tpu" if torch_tpu is installed, else "xla" if
        torch_xla is. Otherwise "auto" stays, and PyTorch decides between "cuda" and "cpu".

    Raises:
        ValueError: `TUNIX_DEVICE` is no kind of device, or one that can't be had here.
    """
    _let_threads_sleep()
    requested = os.environ.get("TUNIX_DEVICE", "auto")
    if requested not in KINDS:
        raise ValueError(f"TUNIX_DEVICE={requested!r}: choose one of {', '.join(KINDS)}")
    has_xla = importlib.util.find_spec("torch_xla") is not None
    has_tpu = importlib.util.find_spec("torch_tpu") is not None
    if requested == "tpu" or (requested == "auto" and has_tpu and tpu_is_present()):
        _choose_torch_tpu(has_tpu, has_xla)
        return "tpu"
    if os.environ.get(_ACCELERATE, "").startswith("tpu"):  # from a process that started this one
        del os.environ[_ACCELERATE]
    if requested == "xla" and not has_xla:
        raise ValueError(f"device='xla' needs torch_xla, which is not installed: {INSTALL['xla']}")
    if requested == "xla" or (requested == "auto" and has_xla and tpu_is_present()):
        loaded = sys.modules.get("transformers.utils.import_utils")
        if loaded is not None and not loaded.is_torch_xla_available():
            raise ValueError("device='xla': Transformers was imported with USE_TORCH_XLA=0; import tunix_torch first")
        os.environ["USE_TORCH_XLA"] = "1"
        os.environ.pop(_AUTOLOAD, None)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the partitioner's warnings, one a graph
        os.environ.setdefault("PJRT_DEVICE", "TPU" if tpu_is_present() else "CPU")
        return "xla"
    _keep_transformers_off_xla()
    return requested


def _let_threads_sleep() -> None:
    """Let a thread of PyTorch's that waits for another one sleep soon, unless the user has said how they wait.

    GNU's OpenMP spins 300,000 times first. Where another process has one of the cores, the thread that is waited for
    does not run meanwhile, and every operation takes a time slice of the system. To sleep at once costs on quiet cores:
    there waking takes longer than what was waited for (`python -m benchmarks.busy_cpu`; figures in docs/log.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS_OF_THREADS)


def _choose_torch_tpu(is_installed: bool, has_xla: bool) -> None:
    """Set the environment for torch_tpu, which `device.py` then loads.

    Raises:
        ValueError: it is not installed, or there is neither a TPU nor a plugin that stands for one.
    """
    if not is_installed:
        other = ": this environment has torch_xla, so choose device='xla'; or" if has_xla else ":"
        raise ValueError(f"device='tpu' needs torch_tpu, which is not installed{other} {INSTALL['tpu']}")
    if "TPU_LIBRARY_PATH" not in os.environ and not tpu_is_present():
        raise ValueError("device='tpu': there is no TPU on this host's PCI bus; choose device='cpu' or 'auto'")
    _keep_transformers_off_xla()
    os.environ.setdefault("TORCH_TPU_ALLOW_LEGACY_DEVICE_APIS", "1")  # Transformers calls torch.tpu.is_available
    if tpu_is_present():  # what XLA:CPU has compiled can't always be read back
        cache = os.environ.get("TUNIX_COMPILE_CACHE") or str(cache_folder() / "tpu")
        os.environ.setdefault("TORCH_TPU_TIER3_COMPILATION_CACHE_ROOT", cache)
    os.environ[_ACCELERATE] = f"tpu:{os.environ.get('LOCAL_RANK', '0')}"


def cache_folder() -> pathlib.Path:
    """Where this library keeps what it makes once: $TUNIX_CACHE, else $XDG_CACHE_HOME/tunix_torch, else
    ~/.cache/tunix_torch."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "tunix_torch"
    return pathlib.Path(os.environ.get("TUNIX_CACHE", default))


def _keep_transformers_off_xla() -> None:
    """Hide torch_xla from Transformers and Accelerate, also when they were imported before this library."""
    os.environ["USE_TORCH_XLA"] = "0"
    os.environ[_AUTOLOAD] = "0"
    if "transformers.utils.import_utils" in sys.modules:
        import_utils = sys.modules["transformers.utils.import_utils"]
        import_utils.USE_TORCH_XLA = "0"
        import_utils.is_torch_xla_available.cache_clear()
    if "accelerate.utils.imports" in sys.modules:
        imports = sys.modules["accelerate.utils.imports"]
        imports._torch_xla_available = False
        imports.is_torch_xla_available.cache_clear()


def tpu_chips() -> list[str]:
    """The version of each TPU chip on this host's PCI bus, such as "v5e". Looks at files only; initialises nothing."""
    chips = []
    for vendor in glob.glob(f"{PCI_DEVICES}/*/vendor"):
        product = pathlib.Path(vendor).with_name("device").read_text().strip()
        if pathlib.Path(vendor).read_text().strip() == _TPU_VENDOR and product in _TPU_DEVICES:
            chips.append(_TPU_DEVICES[product])
    return chips


def tpu_is_present() -> bool:
    """True when there is a TPU chip on this host."""
    return bool(tpu_chips())


def tpu_backend() -> str:
    """What a TPU is reached through here: "tpu" where torch_tpu is installed, else "xla", through torch-xla."""
    return "xla" if importlib.util.find_spec("torch_tpu") is None else "tpu"


def check_libtpu() -> str:
    """The version of the installed libtpu, which is one that the installed torch_tpu or torch_xla was built for.

    Raises:
        ValueError: neither is installed, or libtpu is not, or they do not belong together.
    """
    from packaging.specifiers import SpecifierSet  # not at the top, since rewards are imported without any package

    package, hint = PACKAGES[tpu_backend()], INSTALL[tpu_backend()]
    try:
        needed = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(f"{package} is not installed: {hint}") from None
    wanted = next(word.removeprefix("libtpu").split(";")[0].strip() for word in needed if word.startswith("libtpu"))
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or not SpecifierSet(wanted).contains(found):
        raise ValueError(f"libtpu {found}: {package} {importlib.metadata.version(package)} needs {wanted}: {hint}")
    return found
