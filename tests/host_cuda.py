"""CUDA tensors without a GPU: PyTorch dispatches them as on CUDA, and the CPU computes their numbers in main memory.

`no_gpu.c` stands for CUDA's runtime, so PyTorch's own dispatcher decides as it would on a GPU, such as which kernel
computes attention. `HostCuda` notes what is dispatched, where Python would wait for the GPU, and what a graph would
hold, and refuses operations on tensors of two devices. It runs in a process that `environment` is for.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

SOURCE, ROOT = Path(__file__).with_name("no_gpu.c"), Path(__file__).parent.parent
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
# Operations whose results, or whose results' shapes, Python waits for.
WAITING = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim"),
    "repeat_interleave",
}


def why_not() -> str | None:
    """Why such a process can't be started here; None: it can."""
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    return None if _headers() else "PyTorch is not built for CUDA here"


def _headers() -> Path | None:
    """The folder of CUDA's headers, which come with the Triton that PyTorch's CUDA packages bring."""
    found = [Path(folder) / "triton/backends/nvidia/include" for folder in sys.path]
    return next((f for f in found if torch.version.cuda and (f / "cuda_runtime_api.h").is_file()), None)


def environment(folder: Path, capability: str = "90") -> dict[str, str]:
    """The environment of a process with such a GPU; the library is compiled into `folder`."""
    library = folder / "no_gpu.so"
    if not library.exists():
        flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", f"-I{_headers()}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["gcc", *flags, "-o", library, SOURCE], check=True)
    path = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))
    here = {"LD_PRELOAD": str(library), "NO_GPU_CAPABILITY": capability, "PYTHONPATH": path, "TUNIX_DEVICE": "cuda"}
    return os.environ | here


def end(result: Any, file: str) -> None:
    """Write the result as JSON, and end the process as it is: PyTorch can't close a GPU that is none."""
    Path(file).write_text(json.dumps(result))
    os._exit(0)


class OnGpu(Tensor):
    """A tensor that says it is on the GPU. Its numbers are in `numbers`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "OnGpu":
        kept = {name: getattr(numbers, name) for name in ("dtype", "layout")}
        made = Tensor._make_wrapper_subclass(
            cls, numbers.size(), numbers.stride(), numbers.storage_offset(), device=GPU, **kept
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return HostCuda.current.run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnGpu({self.numbers})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        copied = OnGpu(self.numbers.clone())
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    # ---- what PyTorch does below its dispatcher ----

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"device": GPU, "dtype": self.dtype} | kwargs)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self.numbers = value.numbers


class _MadeOnGpu(TorchFunctionMode):
    """Lets `torch.tensor(..., device="cuda")` make its tensor on the CPU and upload it, as it does below."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = kwargs.get("device")
        new = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if not new or place is None or torch.device(place).type != "cuda":
            return func(*args, **kwargs)
        return func(*args, **kwargs | {"device": CPU}).to(place)


class HostCuda(TorchDispatchMode):
    """Within this context tensors may be on "cuda"."""

    current: "HostCuda"

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []  # what was waited for, and the line of this library or its caller
        self.operations: Counter[str] = Counter()  # on the GPU, without views
        self.num_emptied = 0  # how often the allocator's cache was emptied
        self.graphs: list[Graph] = []
        self.recording: Graph | None = None
        self._pinned: dict[int, Tensor] = {}  # by address, and kept so that no other tensor gets it

    def __enter__(self) -> "HostCuda":
        HostCuda.current = self
        # `module.to` may keep a parameter and change its data only if both are on the GPU already.
        torch._has_compatible_shallow_copy_type = lambda old, new: isinstance(old, OnGpu) == isinstance(new, OnGpu)
        torch.cuda.CUDAGraph = Graph
        torch.cuda.synchronize = lambda *_: self._wait("synchronize")
        torch.cuda.empty_cache = self._empty
        self._made = _MadeOnGpu()
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    def _empty(self) -> None:
        self.num_emptied += 1

    def _wait(self, what: str) -> None:
        assert self.recording is None, f"{what} waits while a graph is recorded"
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        self.waits.append(f"{what} in {Path(frames[-1].filename).name}, {frames[-1].name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation."""
        name = func._schema.name.partition("::")[2]
        if func is torch.ops.prim.device.default:
            return args[0].device
        if name == "is_pinned":
            return args[0].data_ptr() in self._pinned
        if name in ("_pin_memory", "pin_memory"):  # the second one in inference mode
            copied = args[0].clone()
            self._pinned[copied.data_ptr()] = copied
            return copied
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        from_gpu = any(isinstance(tensor, OnGpu) for tensor in given)
        place = kwargs.get("device")
        to_gpu = from_gpu if place is None else torch.device(place).type == "cuda"
        if not (from_gpu or to_gpu):
            return func(*args, **kwargs)
        self._check(name, args, kwargs, given, from_gpu, to_gpu)
        unwrapped = tree_map_only(Tensor, lambda x: x.numbers if isinstance(x, OnGpu) else x, (args, kwargs))
        result = self._compute(func, name, *unwrapped)
        if not to_gpu:
            return result
        wrapped = tree_map_only(Tensor, OnGpu, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _check(self, name: str, args: Any, kwargs: Any, given: list[Tensor], from_gpu: bool, to_gpu: bool) -> None:
        """Note where Python would wait for the GPU. Refuse what CUDA refuses: tensors of two devices."""
        on_gpu = [isinstance(tensor, OnGpu) for tensor in given]
        if name in ("_to_copy", "copy_") and (to_gpu != from_gpu or not all(on_gpu)):
            source = given[-1]
            non_blocking = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if isinstance(source, OnGpu):
                self._wait("download")
            elif not (non_blocking and source.data_ptr() in self._pinned):
                self._wait("upload")
        elif name in WAITING:
            self._wait(name)
        elif name.startswith("index") and any(
            index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1:2]) if isinstance(index, Tensor)
        ):
            self._wait("index by mask")
        elif from_gpu:
            assert all(on or t.dim() == 0 for on, t in zip(on_gpu, given, strict=True)), f"{name}: cuda:0 and cpu"

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("pin_memory", "non_blocking")}
        if "device" in kwargs:
            kwargs["device"] = CPU
        compute = INSTEAD.get(str(func), func)
        if self.recording is not None:
            self.recording.keep_changed(func, args)
        result = compute(*args, **kwargs)
        if not func.is_view and name != "_unsafe_view":
            self.operations[name] += 1
            if self.recording is not None:
                self.recording.calls.append((name, compute, args, kwargs, result))
        return result


class Graph:
    """In place of `torch.cuda.CUDAGraph`: a recording computes nothing, and a replay runs no Python of the step."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.num_replays = 0
        self._before: list[tuple[Tensor, Tensor]] = []

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert HostCuda.current.recording is None and capture_error_mode == "thread_local"
        assert torch.cuda.current_stream() != torch.cuda.default_stream(), "CUDA records on other streams only"
        HostCuda.current.recording = self

    def capture_end(self) -> None:
        HostCuda.current.recording = None
        HostCuda.current.graphs.append(self)
        for tensor, was in reversed(self._before):
            tensor.copy_(was)
        self._before = []

    def keep_changed(self, func: Any, args: Any) -> None:
        """Keep what an operation will change in place."""
        for arg, declared in zip(args, func._schema.arguments, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                self._before.append((arg, arg.clone()))

    def replay(self) -> None:
        self.num_replays += 1
        for _, compute, args, kwargs, result in self.calls:
            again = compute(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


# ---- operations that only CUDA has ----


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor, float]:
    """Softmax of the scores, their log-sum-exp, and the scale."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q.float() @ k.float().mT) * scale
    scores = scores if bias is None else scores + bias.float()
    return scores.softmax(-1), scores.logsumexp(-1), scale


def _efficient(q: Any, k: Any, v: Any, bias: Any, lse: bool, dropout: float = 0.0, causal: bool = False, *, scale=None):
    assert dropout == 0 and not causal
    weights, log_sums, _ = _weights(q, k, bias, scale)
    mixed = (weights @ v.float()).to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return mixed, log_sums, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _efficient_backward(grad, q, k, v, bias, out, lse, seed, offset, dropout, needed, causal=False, *, scale=None):
    weights, _, scale = _weights(q, k, bias, scale)
    grad, of_weights = grad.float(), grad.float() @ v.float().mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
    of_q, of_k, of_v = of_scores @ k.float(), of_scores.mT @ q.float(), weights.mT @ grad
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype), None


INSTEAD: Mapping[str, Callable[..., Any]] = {
    "aten._scaled_dot_product_efficient_attention.default": _efficient,
    "aten._scaled_dot_product_efficient_attention_backward.default": _efficient_backward,
    "aten.bmm.dtype": lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype),
}
