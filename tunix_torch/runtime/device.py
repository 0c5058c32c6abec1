"""The device that this process computes on, and what differs between XLA, CUDA and CPU as facts and verbs.

The device is that of `TUNIX_DEVICE` (commands set it from `--device`), else a TPU that is really there, else CUDA, else
the CPU. A process keeps its choice for life.
"""

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from .choice import choose


def _kind() -> str:
    requested = choose()
    if requested in ("xla", "cpu"):
        return requested
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but PyTorch sees no CUDA device here: use 'cpu' or 'auto'")
    return "cuda" if torch.cuda.is_available() else "cpu"


KIND: str = _kind()

import torch  # noqa: E402  (after the choice: importing torch loads torch_xla's plugin)

if KIND == "xla":
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as xla_metrics
    import torch_xla.debug.profiler as xla_profiler
    import torch_xla.runtime as xla_runtime
    import torch_xla.utils.checkpoint as xla_checkpoint


def keep_compilations(folder: str) -> None:
    """Keep compiled graphs in a folder, so that the next process need not compile them. On a TPU; before any graph.

    XLA:CPU can write such files but not read them, so there nothing is kept.
    """
    if is_tpu():
        xla_runtime.initialize_cache(folder)


def torch_device() -> torch.device:
    """The device that this process computes on."""
    return torch_xla.device() if KIND == "xla" else torch.device(KIND)


def is_tpu() -> bool:
    """True on a real TPU, and where a job is planned for one; False on XLA:CPU, which runs the same graphs."""
    return KIND == "xla" and (_planned_for_tpu or os.environ["PJRT_DEVICE"] == "TPU")


_planned_for_tpu = False


def plan_for_tpu() -> None:
    """From now on settings are chosen as on a TPU, for a process that traces graphs without running them."""
    global _planned_for_tpu
    assert KIND == "xla", KIND
    _planned_for_tpu = True


def is_accelerator() -> bool:
    """True on a real TPU and on CUDA; False where the host's processor computes, through XLA or not."""
    return KIND == "cuda" or is_tpu()


if "TUNIX_COMPILE_CACHE" in os.environ:
    keep_compilations(os.environ["TUNIX_COMPILE_CACHE"])


# ---- facts ----


def static_shapes() -> bool:
    """Whether batches and learning passes keep the widths of the configuration, as each new shape would be compiled."""
    return KIND == "xla"


def step_kind() -> str:
    """How a decode step runs: "eager", "compiled" once for each shape, or "recorded" as a graph for each shape."""
    return {"cpu": "eager", "xla": "compiled", "cuda": "recorded"}[KIND]


# ---- verbs ----


def upload(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU's memory to a device, without waiting for what that device has still to do."""
    if place.type != "cuda":
        return tensor.to(place)
    return tensor.pin_memory().to(place, non_blocking=True)  # from memory that is not pinned, the copy would wait


def sync() -> None:
    """Cut the lazily traced XLA graph here and start running it. Does nothing on CUDA and CPU."""
    if _planner is not None:
        _planner.graph_ends()
    elif KIND == "xla":
        torch_xla.sync()


def wait() -> None:
    """Wait until the device has done all that was started."""
    if KIND == "xla":
        xm.wait_device_ops()
    elif KIND == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def random_numbers_kept() -> Iterator[None]:
    """What an XLA device draws within this context changes nothing of what it draws after. Elsewhere: no effect."""
    state = xm.get_rng_state() if KIND == "xla" else None
    yield
    if KIND == "xla":
        xm.set_rng_state(state)


def optimization_barrier(tensor: torch.Tensor) -> torch.Tensor:
    """Keep XLA from merging the computation of a tensor into what follows. Returns the tensor.

    No other view of the tensor may be in use. Elsewhere nothing happens.
    """
    if KIND == "xla":
        xm.optimization_barrier_([tensor])
    return tensor


def start_trace(folder: "os.PathLike[str]") -> None:
    """Record what an XLA device does, until `stop_trace`. Elsewhere PyTorch's own profiler sees it."""
    if KIND == "xla":
        xla_profiler.start_trace(folder)


def stop_trace() -> None:
    """Write what was recorded to `folder/plugins/profile`, for TensorBoard."""
    if KIND == "xla":
        xla_profiler.stop_trace()


def recomputes_reentrantly() -> bool:
    """Whether `recomputed` sends gradients through the function's arguments and results only, and takes no settings."""
    return KIND == "xla"


def recomputed(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
    """Run `function(*args)` without keeping its intermediate results: the backward pass computes them again.

    `settings` are those of `torch.utils.checkpoint.checkpoint`; none on XLA.
    """
    if KIND == "xla":  # with optimisation barriers, or XLA would merge the second computation into the first
        assert not settings, settings
        return xla_checkpoint.checkpoint(function, *args, use_reentrant=True)
    return torch.utils.checkpoint.checkpoint(function, *args, **{"use_reentrant": False} | settings)


def num_compilations() -> int:
    """How many graphs XLA has compiled in this process so far; 0 on CUDA and CPU, where nothing is compiled."""
    if KIND != "xla":
        return 0
    return int(xla_metrics.counter_value("UncachedCompile") or 0)


def counters() -> dict[str, int]:
    """What a device counts that a run should log: on XLA `compilations`, which must not grow after the warm-up."""
    return {"compilations": num_compilations()} if KIND == "xla" else {}


def scalar(value: float) -> torch.Tensor:
    """A number as a float32 tensor, (), on the device, whose value changes no graph.

    It is made with shape (1,) and indexed, since torch-xla folds a tensor without dimensions that is 0 into a constant,
    and would compile the graph again for it.
    """
    return torch.tensor([value], device=torch_device())[0]


def peak_memory_bytes() -> int:
    """Peak memory so far: the device's on CUDA, else the resident set of this process."""
    if KIND == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_summary() -> str:
    """Peak memory of this process so far, for people."""
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
    """The planner that has taken over; None where graphs are run."""
    return _planner


@contextlib.contextmanager
def planned_by(planner: Planner) -> Iterator[None]:
    """Within this context graphs and compiled steps are handed to a planner and not run."""
    global _planner
    assert KIND == "xla" and _planner is None
    _planner = planner
    try:
        yield
    finally:
        _planner = None
