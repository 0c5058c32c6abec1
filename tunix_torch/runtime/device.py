"""The device that this process computes on. What differs between TPU, XLA, CUDA and CPU is a fact or a verb here.

`TUNIX_DEVICE` chooses the device (commands set it from `--device`). Without it, a TPU that is really there is taken,
else CUDA, else the CPU. A process keeps its device for life. "tpu" is a TPU through torch_tpu, "xla" one through
torch-xla; both also run on a CPU, by which they are tested.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import io
import logging
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from .choice import INSTALL, choose, tpu_is_present


def _kind() -> str:
    requested = choose()
    if requested in ("tpu", "xla", "cpu"):
        return requested
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but PyTorch sees no CUDA device here: use 'cpu' or 'auto'")
    return "cuda" if torch.cuda.is_available() else "cpu"


KIND: str = _kind()

import torch  # noqa: E402  (after the choice: importing torch loads torch_xla's plugin)

if KIND == "xla":
    if os.environ["PJRT_DEVICE"] == "TPU" and not tpu_is_present():  # in a container the bus may be hidden
        logging.getLogger(__name__).warning(
            "PJRT_DEVICE='TPU', but no TPU is on the PCI bus that this process sees: libtpu looks for one, and where "
            "there is none it asks a TPU VM's metadata server for minutes. Without a TPU, unset PJRT_DEVICE."
        )
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as xla_metrics
    import torch_xla.debug.profiler as xla_profiler
    import torch_xla.runtime as xla_runtime
    import torch_xla.utils.checkpoint as xla_checkpoint


def _load_torch_tpu() -> None:
    """Register torch_tpu's device, and start its runtime.

    Operations are deferred and run as graphs, as torch-xla runs them: launched one by one, each is compiled for itself.

    Raises:
        ValueError: the runtime does not start, or PyTorch was imported first, with settings of torch_tpu under which
            Transformers can't use it.
    """
    warnings.filterwarnings("ignore", "<TorchTpu/ApiStage")  # that what is called here may change
    if "TPU_LIBRARY_PATH" in os.environ:  # torch_tpu would end the process over one that is no plugin
        try:
            _ = ctypes.CDLL(os.environ["TPU_LIBRARY_PATH"]).GetPjrtApi
        except (OSError, AttributeError) as error:
            hint = "unset TPU_LIBRARY_PATH, or let it name the libtpu.so of this environment"
            raise ValueError(f"device='tpu': torch_tpu does not start ({error}); {hint}") from error
    try:
        (entry_point,) = importlib.metadata.entry_points(group="torch.backends", name="torch_tpu")
        with contextlib.redirect_stderr(io.StringIO()):  # four lines about what it registers
            entry_point.load()()
        torch.tpu.eager_mode = torch.tpu.EagerMode.DEFER_AND_FUSE
        torch.zeros((), device="tpu").cpu()
        torch.tpu.is_available()  # as Transformers calls it
    except Exception as error:  # of whatever kind: a plugin that is no plugin, a chip that another process has
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        if "is internal to TorchTPU" in why:
            hint = "import tunix_torch before torch, or set TORCH_TPU_ALLOW_LEGACY_DEVICE_APIS=1"
            raise ValueError(f"device='tpu': torch_tpu was loaded without what Transformers needs: {hint}") from error
        raise ValueError(f"device='tpu': torch_tpu does not start ({why}); {INSTALL['tpu']}") from error


if KIND == "tpu":
    _load_torch_tpu()
    import torch_tpu._internal.sync.sync as torch_tpu_sync


def keep_compilations(folder: str) -> None:
    """Keep graphs that are compiled for a TPU in a folder, so that the next process need not compile them again.

    Must be called before the first graph. XLA:CPU can write such files but not read them, so it keeps nothing.
    torch_tpu always keeps them, see `choice.choose`.
    """
    if KIND == "xla" and is_tpu():
        xla_runtime.initialize_cache(folder)


@functools.cache
def start() -> None:
    """Start torch-xla's runtime, once. A mesh is made before, as the runtime must know of it: see `mesh.use_mesh`.

    Elsewhere there is nothing left to start.

    Raises:
        ValueError: it does not start.
    """
    if KIND != "xla":
        return
    try:
        xla_runtime.process_count()
    except Exception as error:  # of whatever kind: there is no such plugin, no TPU, or another process has it
        why = str(error).strip().partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
        hint = "PJRT_DEVICE=CPU computes on the CPU"  # a TPU that is there may be in use
        if not tpu_is_present():
            hint = f"PJRT_DEVICE is {os.environ['PJRT_DEVICE']!r}: unset it, or set it to CPU"
        raise ValueError(f"device='xla': torch-xla does not start ({why}); {hint}") from error


def torch_device() -> torch.device:
    """The device that this process computes on. Raises ValueError where its runtime does not start."""
    if KIND != "xla":
        return torch.device(KIND)
    start()
    return torch_xla.device()


def is_tpu() -> bool:
    """True on a real TPU and in a process that plans a job for one. XLA:CPU runs the same graphs, but is none."""
    if KIND == "tpu":
        return _HAS_CHIP or _planned_for_tpu
    return KIND == "xla" and (_planned_for_tpu or os.environ["PJRT_DEVICE"] == "TPU")


_planned_for_tpu = False
_HAS_CHIP = KIND == "tpu" and tpu_is_present()  # asked once: a step that is compiled can't look at files


def plan_for_tpu() -> None:
    """Choose all settings as on a TPU from now on. A process that only traces graphs calls this."""
    global _planned_for_tpu
    assert traces_graphs(), KIND
    _planned_for_tpu = True


def is_accelerator() -> bool:
    """True on a real TPU and on CUDA. False where the CPU computes, be it through XLA or not."""
    return KIND == "cuda" or is_tpu()


if "TUNIX_COMPILE_CACHE" in os.environ:
    keep_compilations(os.environ["TUNIX_COMPILE_CACHE"])


# ---- facts ----


def static_shapes() -> bool:
    """Whether batches and learning passes keep the widths of the configuration, since each new shape is compiled."""
    return KIND in ("tpu", "xla")


def traces_graphs() -> bool:
    """Whether operations are traced into graphs for a compiler, so that reading a value makes Python wait."""
    return KIND in ("tpu", "xla")


def computes_views_again() -> bool:
    """Whether each graph that reads a view computes it from the whole tensor, so that graphs of two views differ."""
    return KIND == "tpu"


def graph_dialect() -> str:
    """What graphs are read as before they are compiled: "stablehlo", as text, through torch_tpu, else "hlo"."""
    return "stablehlo" if KIND == "tpu" else "hlo"


def has_onednn() -> bool:
    """Whether oneDNN computes here, whose operations the faster layers of Gemma are made of."""
    return KIND == "cpu" and torch.backends.mkldnn.is_available()


def step_kind() -> str:
    """How a decode step runs: "eager", "compiled" once for each shape, or "recorded" as a graph for each shape."""
    return {"cpu": "eager", "tpu": "compiled", "xla": "compiled", "cuda": "recorded"}[KIND]


def multiplies_exactly(dtype: torch.dtype) -> bool:
    """Whether all products of matrices of this type have float32's precision. On CUDA, TF32 may be allowed for them.

    Through torch-xla a TPU rounds what `einsum` multiplies, whatever was asked for: torch-xla gives it no precision.
    """
    if dtype != torch.float32:
        return False
    if KIND == "xla":
        return not is_tpu()
    return torch.get_float32_matmul_precision() == "highest"


# ---- verbs ----


def multiply_exactly() -> None:
    """Give products of float32 matrices float32's precision from now on. A TPU by itself rounds them to bfloat16.

    This must come before the first graph. Products of bfloat16 matrices stay as they are.
    """
    if KIND == "xla":
        torch_xla._XLAC._xla_set_mat_mul_precision("highest")  # the public function warns whoever calls it
    elif KIND == "tpu":
        torch.set_float32_matmul_precision("highest")


def upload(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU's memory to a device, without waiting for the work that the device has left."""
    if place.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(place)
    return tensor.pin_memory().to(place, non_blocking=True)  # a copy from memory that is not pinned waits


def sync() -> None:
    """End the graph that was traced so far, and start running it. On CUDA and the CPU nothing happens."""
    if _planner is not None:
        _planner.graph_ends()
    elif KIND == "xla":
        torch_xla.sync()
    elif KIND == "tpu":
        torch_tpu_sync.synchronize()  # no public function starts the work without waiting for it


def wait() -> None:
    """Wait until the device has finished all work that was started."""
    if KIND == "xla":
        xm.wait_device_ops()
    elif KIND == "tpu":
        torch.accelerator.synchronize()
    elif KIND == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Within this context a device that traces graphs may draw numbers without changing those that it draws later."""
    state = _device_random_state() if traces_graphs() else None
    yield
    if traces_graphs():
        _set_device_random_state(state)


def random_state() -> tuple[torch.Tensor, Any]:
    """The states of PyTorch's random numbers on the CPU and on the device, for `set_random_state`."""
    return torch.get_rng_state(), _device_random_state()


def set_random_state(state: tuple[torch.Tensor, Any]) -> None:
    """Draw the numbers again that came after a state of `random_state`."""
    torch.set_rng_state(state[0])
    _set_device_random_state(state[1])


def _device_random_state() -> Any:
    if KIND == "xla":
        return xm.get_rng_state()
    return None if KIND == "cpu" else getattr(torch, KIND).get_rng_state()


def _set_device_random_state(state: Any) -> None:
    if KIND == "xla":
        xm.set_rng_state(state)
    elif KIND != "cpu":
        getattr(torch, KIND).set_rng_state(state)


def optimization_barrier(tensor: torch.Tensor) -> torch.Tensor:
    """Keep XLA from merging the computation of a tensor into what follows. Returns the tensor.

    No other view of the tensor may be in use. Elsewhere nothing happens.
    """
    return optimization_barriers([tensor])[0]


def optimization_barriers(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Keep XLA from computing anything that follows from any of these tensors before it has all of them.

    Returns the tensors, of which no other view may be in use. Elsewhere nothing happens.
    """
    if KIND == "xla":
        xm.optimization_barrier_(tensors)
    elif KIND == "tpu":
        return list(torch.tpu.ops.optimization_barrier(tensors))
    return tensors


def start_trace(folder: "os.PathLike[str]") -> None:
    """Profile what an XLA device does until `stop_trace`. PyTorch's own profiler sees the other devices."""
    if KIND == "xla":
        xla_profiler.start_trace(folder)


def stop_trace() -> None:
    """Write the profile to `folder/plugins/profile`, for TensorBoard."""
    if KIND == "xla":
        xla_profiler.stop_trace()


def recomputes_reentrantly() -> bool:
    """Whether `recomputed` takes no settings and sends gradients only through the function's arguments and results."""
    return KIND == "xla"


def recomputed(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Run `function(*args)` without keeping its intermediate results. The backward pass computes them again.

    Args:
        settings: those of `torch.utils.checkpoint.checkpoint`. On XLA there must be none.
    """
    if KIND == "xla":  # with optimization barriers, since XLA would merge the second computation into the first
        assert not settings, settings
        return xla_checkpoint.checkpoint(function, *args, use_reentrant=True)
    return torch.utils.checkpoint.checkpoint(function, *args, **{"use_reentrant": False} | settings)


def num_compilations() -> int:
    """How many graphs XLA has compiled in this process so far. On CUDA and the CPU it is 0."""
    if KIND == "tpu":
        return torch.tpu._get_cache_misses()
    if KIND != "xla":
        return 0
    return int(xla_metrics.counter_value("UncachedCompile") or 0)


def counters() -> dict[str, int]:
    """Numbers for a run's log: `compilations`, which must not grow after the warm-up, where there are any."""
    return {"compilations": num_compilations()} if traces_graphs() else {}


def scalar(value: float) -> torch.Tensor:
    """A number as a float32 tensor, (), on the device. The graphs that read it do not depend on its value.

    It is built with shape (1,) and indexed: torch-xla folds a 0-d zero into a constant and would recompile.
    """
    return upload(torch.tensor([value]), torch_device())[0]


def peak_memory_bytes() -> int:
    """The most memory that this process has used so far: on CUDA and through torch_tpu that of the device, else its
    resident set."""
    if KIND == "cuda":
        return torch.cuda.max_memory_allocated()
    if KIND == "tpu" and is_tpu():
        return torch.accelerator.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes() -> int | None:
    """The memory of the device, or on a CPU of this machine or container; None: it is not known, as on a TPU."""
    if is_tpu() or _planner is not None:
        return None
    if KIND == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # there is no such limit, or it is the word "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def free_memory_bytes() -> int:
    """How much memory is free now: on CUDA that of this process's device, else that of the machine."""
    if KIND == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # which PyTorch keeps for itself
        return torch.cuda.mem_get_info()[0] + unused
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def memory_summary() -> str:
    """The peak memory of this process so far, as words."""
    return f"peak memory {peak_memory_bytes() / 2**30:.2f} GiB"


# ---- planning: `preflight` looks at graphs and does not run them ----


class Planner(Protocol):
    """Takes the place of the device in a process that plans a job."""

    def graph_ends(self) -> None:
        """Called where `sync` would run the pending graph."""

    def plan_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Called where a step would be compiled; returns what is called in its place."""


_planner: Planner | None = None


def planner() -> Planner | None:
    """The planner that takes over graphs; None where graphs are run."""
    return _planner


@contextlib.contextmanager
def planned_by(planner: Planner) -> Iterator[None]:
    """Within this context graphs and compiled steps are handed to a planner and not run."""
    global _planner
    assert traces_graphs() and _planner is None
    _planner = planner
    try:
        yield
    finally:
        _planner = None
