"""Choose the device, once a process, and hide what differs between XLA, CUDA and CPU. The only importer of torch_xla.

Transformers and Accelerate take the XLA device by themselves as soon as they see torch_xla, so the choice is made
here, when `tunix_torch` is imported: `TUNIX_DEVICE` (the scripts set it from `--device`), else a TPU that is really
there, else CUDA, else the CPU. A process keeps its choice for life.
"""

import glob
import importlib.util
import os
import pathlib
import resource
import sys
from collections.abc import Callable
from typing import Any

KINDS = ("auto", "xla", "cuda", "cpu")

# Google's PCI vendor id, and the device ids of TPU v2 to v7 (torch_xla/_internal/tpu.py lists the same).
_TPU_VENDOR = "0x1ae0"
_TPU_DEVICES = {"0x0027", "0x005e", "0x0063", "0x006f", "0x0056", "0x0062", "0x0076"}


def tpu_is_present() -> bool:
    """True when a TPU chip hangs on this host's PCI bus. Looks at files only; initialises nothing."""
    for vendor in glob.glob("/sys/bus/pci/devices/*/vendor"):
        folder = pathlib.Path(vendor).parent
        if pathlib.Path(vendor).read_text().strip() == _TPU_VENDOR:
            if (folder / "device").read_text().strip() in _TPU_DEVICES:
                return True
    return False


def _keep_transformers_off_xla() -> None:
    """Hide torch_xla from Transformers and Accelerate, also when they were imported before this library."""
    os.environ["USE_TORCH_XLA"] = "0"
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # else importing torch imports torch_xla
    if "transformers.utils.import_utils" in sys.modules:
        import_utils = sys.modules["transformers.utils.import_utils"]
        import_utils.USE_TORCH_XLA = "0"
        import_utils.is_torch_xla_available.cache_clear()
    if "accelerate.utils.imports" in sys.modules:
        imports = sys.modules["accelerate.utils.imports"]
        imports._torch_xla_available = False
        imports.is_torch_xla_available.cache_clear()


def _choose() -> str:
    requested = os.environ.get("TUNIX_DEVICE", "auto")
    if requested not in KINDS:
        raise ValueError(f"TUNIX_DEVICE={requested!r}: choose one of {', '.join(KINDS)}")
    has_xla = importlib.util.find_spec("torch_xla") is not None
    if requested == "xla" and not has_xla:
        raise ValueError("device='xla' needs torch_xla, which is not installed: pip install 'torch-xla[tpu]==2.9.0'")
    if requested == "xla" or (requested == "auto" and has_xla and tpu_is_present()):
        loaded = sys.modules.get("transformers.utils.import_utils")
        if loaded is not None and not loaded.is_torch_xla_available():
            raise ValueError("device='xla': Transformers was imported with USE_TORCH_XLA=0; import tunix_torch first")
        os.environ["USE_TORCH_XLA"] = "1"
        os.environ.setdefault("PJRT_DEVICE", "TPU" if tpu_is_present() else "CPU")
        return "xla"
    _keep_transformers_off_xla()
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but PyTorch sees no CUDA device here: use 'cpu' or 'auto'")
    if requested == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


KIND: str = _choose()

import torch  # noqa: E402  (after the choice: importing torch loads torch_xla's plugin)

if KIND == "xla":
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as xla_metrics
    import torch_xla.utils.checkpoint as xla_checkpoint


def torch_device() -> torch.device:
    """The device that this process computes on."""
    return torch_xla.device() if KIND == "xla" else torch.device(KIND)


def is_tpu() -> bool:
    """True on a real TPU; False on XLA:CPU, which runs the same graphs on the host's processor."""
    return KIND == "xla" and os.environ["PJRT_DEVICE"] == "TPU"


def describe() -> str:
    """One line for people: which device, and how many of it."""
    if KIND == "xla":
        count = len(xm.get_xla_supported_devices())
        return f"TPU through torch-xla, {count} device(s)" if is_tpu() else "XLA on the CPU (no TPU was found)"
    if KIND == "cuda":
        return f"CUDA: {torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} device(s)"
    return f"CPU, {torch.get_num_threads()} threads"


def sync() -> None:
    """Cut the lazily traced XLA graph here and start running it. Does nothing on CUDA and CPU."""
    if KIND == "xla":
        torch_xla.sync()


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function of static shapes that runs once a token. On XLA this removes 20 to 30 ms of tracing a call."""
    return torch.compile(step, backend="openxla", fullgraph=True, dynamic=False) if KIND == "xla" else step


def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """Run `function(*args)` without keeping its intermediate results: the backward pass computes them again."""
    if KIND == "xla":  # with optimisation barriers, or XLA would merge the second computation into the first
        return xla_checkpoint.checkpoint(function, *args, use_reentrant=True)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def num_compilations() -> int:
    """How many graphs XLA has compiled in this process so far; 0 on CUDA and CPU, where nothing is compiled."""
    if KIND != "xla":
        return 0
    return int(xla_metrics.counter_value("UncachedCompile") or 0)


def peak_memory_bytes() -> int:
    """Peak memory so far: the device's on CUDA, else the resident set of this process."""
    if KIND == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_summary() -> str:
    """Peak memory of this process so far, for people."""
    return f"peak memory {peak_memory_bytes() / 2**30:.2f} GiB"
