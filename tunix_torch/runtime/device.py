"""Choose the device, once a process, and hide what differs between XLA, CUDA and CPU. The only importer of torch_xla.

The device is that of `TUNIX_DEVICE` (commands set it from `--device`), else a TPU that is really there, else CUDA, else
the CPU. A process keeps its choice for life.
"""

import contextlib
import math
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    import torch_xla._internal.tpu as xla_tpu
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as xla_metrics
    import torch_xla.debug.profiler as xla_profiler
    import torch_xla.distributed.spmd as spmd
    import torch_xla.runtime as xla_runtime
    import torch_xla.utils.buffer_donor_context as buffer_donor_context
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


def tokens_per_pass() -> int | None:
    """Tokens that a learning pass is best made of, where nobody has said how many rows it has. None: as few rows as
    keep every device busy, since on a TPU or a mesh memory is what is short."""
    if KIND == "cuda":
        return 32_768  # not measured: enough to keep a GPU busy, by the sizes of its matrix products
    return None if is_tpu() or has_mesh() else 4096  # a CPU is slower with less, and no faster with more


def upload(tensor: "torch.Tensor", place: "torch.device") -> "torch.Tensor":
    """Copy a tensor from the CPU's memory to a device, without waiting for what that device has still to do."""
    if place.type != "cuda":
        return tensor.to(place)
    return tensor.pin_memory().to(place, non_blocking=True)  # from memory that is not pinned, the copy would wait


if "TUNIX_COMPILE_CACHE" in os.environ:
    keep_compilations(os.environ["TUNIX_COMPILE_CACHE"])

_mesh: "spmd.Mesh | None" = None


def use_mesh(mesh: tuple[Sequence[int], Sequence[str]] | None) -> None:
    """Spread this process's tensors over a mesh of devices from now on: its sizes and the names of its axes.

    Must come before any tensor is on a device, and so before a `GRPOConfig` is made. None, or one device: nothing
    changes. The devices are those of all hosts of a TPU slice, which must run the same program: see `processes.py`.

    Raises:
        ValueError: there are not as many devices, the process is not on XLA, the device is in use already, or a mesh
            of another shape is; or there are several hosts, and no mesh.
    """
    global _mesh
    if mesh is None and _mesh is not None:
        return
    shape, axes = mesh or ((1,), ("fsdp",))
    wanted, asked = math.prod(shape), f"mesh_shape={','.join(map(str, shape))!r}"
    if _mesh is not None and _mesh.mesh_shape != tuple(shape):
        raise ValueError(f"{asked}: this process has a mesh of {_mesh.mesh_shape} already, and keeps it")
    if wanted == 1:
        if is_tpu() and xla_runtime.process_count() > 1:
            raise ValueError(f"mesh_shape: {xla_runtime.process_count()} hosts need a mesh of all their devices")
        return
    if KIND != "xla":
        raise ValueError(f"{asked}: a mesh needs device='xla', and this process is on {KIND!r}")
    if not xla_runtime.is_spmd():
        if torch_xla._XLAC._xla_get_spmd_config_is_locked():
            raise ValueError(f"{asked}: too late, the device is in use; call device.use_mesh before GRPOConfig is made")
        xla_runtime.use_spmd()
    found = xla_runtime.global_runtime_device_count()
    if found != wanted:
        hint = "" if is_tpu() else f"; CPU_NUM_DEVICES={wanted} makes as many on the CPU"
        raise ValueError(f"{asked}: {wanted} devices, and there are {found}{hint}")
    _mesh = spmd.Mesh(np.arange(wanted), tuple(shape), tuple(axes))


def hosts() -> tuple[int, int, str]:
    """Which host of the mesh this one is, how many there are, and the address of the first: Google Cloud's worker 0.

    Raises:
        ValueError: they are not the workers of one slice.
    """
    count = 1 if _mesh is None else xla_runtime.process_count()
    if count == 1:
        return 0, 1, "localhost"
    addresses = xla_tpu.get_worker_ips()
    if len(addresses) != count:
        raise ValueError(f"mesh_shape: {count} hosts, but the slice has {len(addresses)}; a mesh lies on one slice")
    return xla_tpu.worker_id(), count, addresses[0]


def has_mesh() -> bool:
    """Whether this process spreads its tensors over several devices."""
    return _mesh is not None


def axis_size(axis: str | None) -> int:
    """Devices along an axis of the mesh; 1 where there is no such axis or no mesh."""
    return 1 if _mesh is None or axis is None else _mesh.shape().get(axis, 1)


def _on_mesh(axes: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(axis if axis in _mesh.axis_names else None for axis in axes)


def shard(tensor: "torch.Tensor", axes: Sequence[str | None]) -> None:
    """Lay each dimension of a tensor on an axis of the mesh; None, or an axis that the mesh lacks: not split."""
    if _mesh is not None:
        spmd.mark_sharding(tensor, _mesh, _on_mesh(axes))


def shard_activation(tensor: "torch.Tensor", axes: Sequence[str | None]) -> "torch.Tensor":
    """Lay an intermediate result on the mesh, and in the backward pass its gradient alike. Returns it."""
    if _mesh is None:
        return tensor
    return spmd.xla_sharding.mark_sharding_with_gradients(tensor, _mesh, _on_mesh(axes))


def describe() -> str:
    """One line for people: which device, and how many of it."""
    if KIND == "xla":
        count = len(xm.get_xla_supported_devices())
        name = f"TPU through torch-xla, {count} device(s)" if is_tpu() else "XLA on the CPU (no TPU was found)"
        sizes = ", ".join(f"{axis} {size}" for axis, size in _mesh.shape().items()) if _mesh is not None else ""
        return f"{name}, mesh of {sizes}" if sizes else name
    if KIND == "cuda":
        return f"CUDA: {torch.cuda.get_device_name(0)}, {torch.cuda.device_count()} device(s)"
    return f"CPU, {torch.get_num_threads()} threads"


def sync() -> None:
    """Cut the lazily traced XLA graph here and start running it. Does nothing on CUDA and CPU."""
    if _recorder is not None:
        _recorder()
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


def as_written(tensor: "torch.Tensor") -> "torch.Tensor":
    """Have XLA compute a tensor, of which no other view is in use, without merging it into what follows. Returns it."""
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


def compile_step(step: Callable[..., Any], model: "torch.nn.Module") -> Callable[..., Any]:
    """Compile a function of static shapes that runs once a token. On XLA this removes 20 to 30 ms of tracing a call.

    Args:
        step: takes tensors and lists of tensors, and returns tensors. It may change arguments in place, and reads
            nothing else that changes but the weights of `model`; it draws no random numbers. Its first results have
            the shapes of its first arguments: they take their place in the next call.
        model: whose tensors the step reads: parameters, buffers and other attributes of its modules. Their values may
            change between calls; what is no tensor, such as whether an adapter is on, is that of the first call.
    """
    if KIND != "xla":
        return step
    return _CompiledStep(step, model) if _recorder is None else _recorded_once(step)


def tensors_in(args: Sequence[Any]) -> list["torch.Tensor"]:
    """Those of a step's arguments, which are tensors and lists of tensors, in order."""
    return [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]


class _CompiledStep:
    """A step whose graph is traced once for each shape of its arguments, and then run by its hash.

    This is what `torch.compile(backend="openxla")` does, without Dynamo, which traces slowly, and right on a mesh
    too: there, torch-xla 2.9's bridge takes the weights for constants, because it tells a graph's inputs apart by
    tensor ids that its own copies have overwritten. Here an input is known by the handle of its data.
    """

    def __init__(self, step: Callable[..., Any], model: "torch.nn.Module") -> None:
        self.step = step
        self.slots = [
            (tensors, name)
            for module in model.modules()
            for tensors in (module._parameters, module._buffers, vars(module))
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor)
        ]
        self.programs: dict[tuple[torch.Size, ...], _Program] = {}

    def __call__(self, *args: Any) -> tuple["torch.Tensor", ...]:
        tensors = tensors_in(args)
        weights = [tensors_of_module[name] for tensors_of_module, name in self.slots]
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.programs:
            self.programs[shapes] = _Program(self.step, args, tensors, weights)
        return self.programs[shapes].run(tensors, weights)


class _Program:
    """One compiled graph of a step, and where each of its inputs comes from."""

    def __init__(
        self,
        step: Callable[..., Any],
        args: tuple[Any, ...],
        tensors: list["torch.Tensor"],
        weights: list["torch.Tensor"],
    ) -> None:
        torch_xla.sync()
        xm.wait_device_ops()
        handles = torch_xla._XLAC._get_tensors_handle([*tensors, *weights])
        places = dict(zip(handles, range(len(handles)), strict=True))
        distinct = len(tensors) + len({id(weight) for weight in weights})
        assert len(places) == distinct, "two inputs of a compiled step share their data, so they can't be told apart"

        # Traced on copies, which have the same data: what the step changes in place stays untouched here.
        copies = iter([tensor.clone() for tensor in tensors])
        copied_args = [[next(copies) for _ in arg] if isinstance(arg, list) else next(copies) for arg in args]
        results = list(step(*copied_args))
        copied = tensors_in(copied_args)
        changed = torch_xla._XLAC._check_tensor_need_materialization(copied)
        self.num_results, self.changed = len(results), [i for i, new in enumerate(changed) if new]
        outputs = results + [copied[i] for i in self.changed]
        for output, i in zip(outputs, [*range(len(results)), *self.changed], strict=True):
            assert output.shape == tensors[i].shape, (output.shape, tensors[i].shape)
            if _mesh is not None:  # left alone, the partitioner may lay out a result otherwise than the graph takes it
                sharding = torch_xla._XLAC._get_xla_op_sharding(tensors[i])
                torch_xla._XLAC._xla_mark_sharding(output, sharding)

        ids, inputs = torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)
        assert torch_xla._XLAC._get_seed_info_id() not in ids, "a compiled step draws random numbers"
        handles = torch_xla._XLAC._get_tensors_handle(inputs)
        self.inputs = [places.get(handle) for handle in handles]
        self.constants = [tensor if place is None else None for tensor, place in zip(inputs, self.inputs, strict=True)]
        assert all(c is None or c.dim() == 0 for c in self.constants), (
            "a compiled step reads a tensor of unknown origin"
        )
        with buffer_donor_context.alias_with_buffer_donor_config():  # what is changed in place needs its memory once
            for i in self.changed:
                torch_xla._XLAC._set_buffer_donation(tensors[i], True)
            self.hash = torch_xla._XLAC._get_graph_hash(outputs)
            torch_xla._XLAC._xla_warm_up_cache(outputs, [])

    def run(self, tensors: list["torch.Tensor"], weights: list["torch.Tensor"]) -> tuple["torch.Tensor", ...]:
        given = tensors + weights
        inputs = [c if i is None else given[i] for i, c in zip(self.inputs, self.constants, strict=True)]
        outputs = torch_xla._XLAC._run_cached_graph(self.hash, inputs)
        for i, output in zip(self.changed, outputs[self.num_results :], strict=True):
            tensors[i].data = output
        return tuple(outputs[: self.num_results])


def checkpoint_is_reentrant() -> bool:
    """Whether what `checkpoint` runs sends gradients through its arguments and results only, and takes no settings."""
    return KIND == "xla"


def checkpoint(function: Callable[..., Any], *args: Any, **settings: Any) -> Any:
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


def peak_memory_bytes() -> int:
    """Peak memory so far: the device's on CUDA, else the resident set of this process."""
    if KIND == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_summary() -> str:
    """Peak memory of this process so far, for people."""
    return f"peak memory {peak_memory_bytes() / 2**30:.2f} GiB"


# ---- graphs that are looked at, not run: `preflight` plans a job by them ----

_recorder: Callable[[], None] | None = None


def is_recording() -> bool:
    """Whether graphs are looked at and not run."""
    return _recorder is not None


@contextlib.contextmanager
def recording(recorder: Callable[[], None]) -> Iterator[None]:
    """Within this context `sync` calls `recorder` in place of running the graph, and compiled steps are traced once."""
    global _recorder
    assert KIND == "xla" and _recorder is None
    _recorder = recorder
    try:
        yield
    finally:
        _recorder = None


def _recorded_once(step: Callable[..., Any]) -> Callable[..., Any]:
    results: list[Any] = []

    def recorded_step(*args: Any) -> Any:
        if not results:
            sync()  # what is pending before it belongs to another graph
            tensors = tensors_in(args)
            shardings = [sharding_of(tensor) for tensor in tensors]
            outputs = list(step(*args))
            changed = torch_xla._XLAC._check_tensor_need_materialization(tensors)
            if _mesh is not None:  # results lie as what they replace, as in `_Program`
                replaced = list(zip(outputs, shardings, strict=False))
                replaced += [(t, old) for t, old, new in zip(tensors, shardings, changed, strict=True) if new]
                for tensor, sharding in replaced:
                    if sharding is None:
                        spmd.mark_sharding(tensor, _mesh, (None,) * tensor.dim())
                    else:
                        torch_xla._XLAC._xla_mark_sharding(tensor, sharding)
            results.append(tuple(outputs))
            sync()
        return results[0]

    return recorded_step


@dataclass(frozen=True)
class LazyTensor:
    """What torch-xla knows of one tensor."""

    number: int  # of the tensor's present value
    overwrites: int  # the number of the value that it had before it was changed in place; else its own
    pending: bool  # traced, not computed
    bytes_per_device: int  # with its sharding, as if it had been computed


def lazy_tensor(tensor: "torch.Tensor") -> LazyTensor:
    """What torch-xla knows of a tensor on an XLA device."""
    text = torch_xla._XLAC._get_xla_tensor_debug_info(tensor)
    fields = dict(re.findall(r"^(TensorID|AliasID|IR): (.*)$", text, re.MULTILINE))
    tiles = [1] * tensor.dim()
    sharding = re.search(r"devices=\[([\d,]+)\]", torch_xla._XLAC._get_xla_sharding_spec(tensor))
    if sharding is not None:
        tiles = [int(size) for size in sharding[1].split(",")][: tensor.dim()]
    shard = math.prod(-(-size // tile) for size, tile in zip(tensor.shape, tiles, strict=True))
    pending = fields["IR"] != "None" and "xla::device_data" not in fields["IR"]
    return LazyTensor(int(fields["TensorID"]), int(fields["AliasID"]), pending, shard * tensor.dtype.itemsize)


def graph_of(tensors: "Sequence[torch.Tensor]") -> tuple[bytes, list[int]]:
    """The graph that would compute these pending tensors, and the numbers of the values that it reads.

    Returns:
        a serialized HloModuleProto with the shardings, one result a tensor; `LazyTensor.number` of each parameter.
    """
    tensors = list(tensors)
    return (
        torch_xla._XLAC._get_xla_tensors_hlo_proto(tensors),
        torch_xla._XLAC._get_tensors_xla_device_data_node(tensors)[0],
    )


def sharding_of(tensor: "torch.Tensor") -> Any:
    """How a tensor is laid on the mesh, for `zeros_in_place_of`; None: nothing has been said."""
    return torch_xla._XLAC._get_xla_op_sharding(tensor) if torch_xla._XLAC._get_xla_sharding_spec(tensor) else None


def zeros_in_place_of(tensor: "torch.Tensor", sharding: Any) -> "torch.Tensor":
    """Zeros on the device, of the tensor's shape and type, laid on the mesh as `sharding_of` another one."""
    zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape).to(torch_device())
    if sharding is not None:
        torch_xla._XLAC._xla_mark_sharding(zeros, sharding)
    return zeros
