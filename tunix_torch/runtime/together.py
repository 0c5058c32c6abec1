"""Collectives over DDP processes and over the hosts of a mesh. In a process that is alone, each does nothing.

There are three ways in which several processes train together:

- DDP processes, one for each GPU, or for each chip through torch_tpu. `accelerate launch` or `torchrun` starts them and
  `GRPOConfig` joins them. Each process has prompts of its own, and all prompts together are the batch that one process
  would have.
- Hosts of a mesh, with one process on each. torch-xla splits the work between them as long as all hosts run the same
  graphs in the same order. So every host has the whole batch, and uploads the part that its own chips need. All hosts
  must decide alike. What a clock or a reward function decides, the first host decides and tells the others. A signal
  counts when any host got it.
- Processes of a mesh, one for each device, which `torchrun` starts. Along `fsdp` they are DDP processes. Those along
  `tp` hold parts of the weights (`tensor_parallel.py`) and have the same prompts, so they decide alike, as hosts do.

Functions that count, gather or sum are about DDP processes, since all hosts of a mesh have the same rows, and so have
all processes along `tp`. The latter two are called *peers* here.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from .choice import tpu_chips


def check_processes(kind: str) -> None:
    """Raises ValueError where `torchrun` has started more processes on this host than it has devices of a kind.

    Processes that share the CPU, and so those on a plugin that stands for a TPU, may be as many as one likes.
    """
    counts = {"tpu": lambda: len(tpu_chips()), "cuda": torch.cuda.device_count}
    devices, called = counts[kind]() if kind in counts else 0, "GPU(s)" if kind == "cuda" else "TPU chip(s)"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if devices and processes > devices:
        hint = f"start one for each: torchrun --nproc_per_node {devices}"
        raise ValueError(f"device={kind!r}: {processes} processes on a host with {devices} {called}; {hint}")


def join_chips() -> None:
    """Join the processes that `torchrun` has started, one for each chip, if this is one of several.

    torch_tpu's own collectives serve tensors on the device, gloo those in main memory.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("cpu:gloo,tpu:tpu_dist")


# Processes of a mesh that lie along tp; see `share_rows`.
_along_tp = 1
_processes: DeviceMesh | None = None
# The names by which Accelerate's data loaders know which processes have rows of their own, and which have the same.
ROWS, PEERS = "dp_shard", "tp"


def share_rows(along_tp: int) -> None:
    """Let so many processes, side by side, have the same prompts. `join_mesh` follows when all processes have met."""
    global _along_tp
    _along_tp = along_tp


def join_mesh(kind: str) -> None:
    """Lay the processes on a mesh of devices of a kind, if `share_rows` has said that some have the same prompts."""
    global _processes, _peer, _num_peers, _peers
    if _along_tp > 1 and _processes is None:
        _processes = init_device_mesh(kind, (count(), _along_tp), mesh_dim_names=(ROWS, PEERS))
        _peer, _num_peers = _processes.get_local_rank(PEERS), _along_tp
        _peers, _ = torch.distributed.new_subgroups(_along_tp, timeout=timedelta(seconds=PATIENCE), backend="gloo")


def processes() -> DeviceMesh | None:
    """The mesh of processes, whose axes are `ROWS` and `PEERS`; None: each process has prompts of its own."""
    return _processes


def _with_own_rows() -> torch.distributed.ProcessGroup | None:
    """The processes with prompts of their own that hold the same parts of the weights; None: all processes."""
    return None if _processes is None else _processes.get_group(ROWS)


def count() -> int:
    """How many processes with prompts of their own take part in this run."""
    return torch.distributed.get_world_size() // _along_tp if torch.distributed.is_initialized() else 1


def num_processes() -> int:
    """How many processes take part in this run, those with the same prompts included."""
    return count() * _along_tp


def index() -> int:
    """The number of this process among those with prompts of their own, from 0."""
    return torch.distributed.get_rank() // _along_tp if torch.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return index() == 0 and _peer == 0


def is_first_peer() -> bool:
    """Whether this process is the one that writes what is about its rows."""
    return _peer == 0


def wait() -> None:
    """Wait until every process and every host has called this."""
    _everyone(None)


def anyone(told: bool) -> bool:
    """Whether any process or host says so. All of them get the same answer."""
    return any(_everyone(told))


def gather(value: Any) -> list[Any]:
    """The value of every process, in the order of their numbers. It must be picklable, with tensors on the CPU."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value, group=_with_own_rows())
    return values


def raise_together(problem: Exception | None) -> None:
    """Raise on every process when one of them has a problem, so that none waits for it. All must call this.

    It is raised as it is where it arose, and elsewhere as a ValueError that names the process.
    """
    said = gather(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for number, message in enumerate(said):
        if message is not None:
            raise ValueError(f"process {number}: {message}")


def gather_rows(tensor: Tensor) -> Tensor:
    """A CPU tensor with the rows of every process: (R, ...) of each -> (sum of R, ...)."""
    return torch.cat(gather(tensor))


def own_share(num_rows: int) -> tuple[int, int]:
    """Where each process has `num_rows` rows: the number of this process's first row, and how many rows there are."""
    return num_rows * index(), num_rows * count()


def own_part(num_rows: int) -> slice:
    """Which of `num_rows` rows, which all processes hold, this process works on. Shares are as equal as they can be."""
    each = -(-num_rows // count())
    return slice(index() * each, (index() + 1) * each)


def own_batches(num_rows: int, size: int) -> list[slice]:
    """This process's part of `num_rows` rows in batches of `size`. All processes have equally many batches, which for
    the last processes may have fewer rows, or none."""
    part = own_part(num_rows)
    ends = range(part.start, part.stop, size)
    return [slice(min(i, num_rows), min(i + size, part.stop, num_rows)) for i in ends]


def sum_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Each number, summed over the processes. The sums are the same on all of them, to the last bit."""
    everyone = gather(numbers)
    return {name: sum(theirs[name] for theirs in everyone) for name in numbers}


def _by_fsdp(gradient: Tensor) -> bool:
    """Whether a gradient is of a weight that FSDP2 splits, over the processes with rows of their own."""
    return isinstance(gradient, DTensor) and gradient.device_mesh.mesh_dim_names != (PEERS,)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes. All gradients travel in one exchange.

    Where weights are split over the processes with rows of their own (`fsdp.py`), FSDP2 has summed their gradients in
    the backward pass. Where they are split along tp, a weight that is whole on each process has got a part of its
    gradient on each, and these are summed first.
    """
    learning = [p for p in parameters if p.grad is not None]
    for p in learning:
        if isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    if count() == 1:
        return
    gradients = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in learning if not _by_fsdp(p.grad)]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat, group=_with_own_rows())
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def keep_frozen_out_of_ddp(model: nn.Module) -> None:
    """Keep DDP from copying frozen weights and buffers from process 0 to the others when it wraps the model.

    DDP copies buffers in the order in which a model registers them. Gemma 3 registers the buffers of its two rotary
    embeddings in the order of a set, which differs between processes: the others would swap the two frequencies.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)


# ---- hosts, and processes along tp ----

PORT = 12355  # on the first host; MASTER_PORT is another one
PATIENCE = 3600.0  # seconds, with a host that says nothing
# They decide how a graph is traced.
PACKAGES = ("torch", "torch_xla", "torch_tpu", "transformers", "peft", "accelerate")

_num_hosts = 1
_peer, _num_peers = 0, 1
# Not the default group: Transformers and Accelerate would take its members for processes with prompts of their own.
_peers: torch.distributed.ProcessGroupGloo | torch.distributed.ProcessGroup | None = None


def join_hosts(host: int, num_hosts: int, address: str) -> None:
    """Join the hosts of a mesh and wait until all are there. On one host nothing happens.

    Args:
        host: the number of this host, from 0.
        address: where the first host is reached.
    """
    global _peer, _num_peers, _peers, _num_hosts
    if num_hosts > 1 and _peers is None:
        port = int(os.environ.get("MASTER_PORT", PORT))
        try:
            store = torch.distributed.TCPStore(address, port, num_hosts, is_master=host == 0)
            _peers = torch.distributed.ProcessGroupGloo(store, host, num_hosts, timedelta(seconds=PATIENCE))
        except RuntimeError as error:
            met = f"mesh_shape: the {num_hosts} hosts can't meet at {address}:{port}"
            raise ValueError(f"{met}: {error}") from error
        _peer, _num_peers, _num_hosts = host, num_hosts, num_hosts


def num_hosts() -> int:
    """How many hosts the mesh lies on."""
    return _num_hosts


def num_peers() -> int:
    """How many processes have this process's rows, itself among them: those along tp, or the hosts of a mesh."""
    return _num_peers


def _everyone(value: Any) -> list[Any]:
    """The value of every process or host. JSON must be able to hold it."""
    return [of_one for of_peers in gather(_of_all_peers(value)) for of_one in of_peers]


def _of_all_peers(value: Any) -> list[Any]:
    """The value of every peer, in the order of their numbers. JSON must be able to hold it.

    Raises:
        ValueError: another one has ended, or has said nothing for `PATIENCE` seconds.
    """
    if _peers is None:
        return [value]
    said = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    try:
        lengths = [int(length) for length in _of_each_peer(torch.tensor([len(said)]))]
        texts = _of_each_peer(nn.functional.pad(said, (0, max(lengths) - len(said))))
    except RuntimeError as error:
        said_by_gloo = f"see what it said ({error})"
        raise ValueError(
            f"another host or process has ended or says nothing, and so this one ends; {said_by_gloo}"
        ) from error
    return [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]


def _of_each_peer(tensor: Tensor) -> list[Tensor]:
    """The CPU tensor of every peer, in the order of their numbers. All must have one shape."""
    tensors = [torch.empty_like(tensor) for _ in range(_num_peers)]
    work = _peers.allgather([tensors], [tensor])
    while not work.is_completed():  # `work.wait` alone would keep Python from noticing Ctrl-C
        time.sleep(0.001)
    work.wait()
    return tensors


def decided_by_first(decide: Callable[[], Any]) -> Any:
    """What `decide()` returns on the first host, which is the only one that calls it. JSON must be able to hold it.

    Of the processes along tp, the first one decides. DDP processes have rows of their own, so each of them decides for
    itself.

    An exception of `decide` is raised on the first host as it is, and on the others as a ValueError.
    """
    if _peers is None:
        return decide()
    value = problem = None
    if _peer == 0:
        try:
            value = decide()
        except Exception as error:  # told to the others first, which would wait for an answer otherwise
            problem = error
    value, message = _of_all_peers((value, None if problem is None else str(problem)))[0]
    if problem is not None:
        raise problem
    if message is not None:
        raise ValueError(f"{_peer_name(0)}: {message}")
    return value


def _peer_name(number: int) -> str:
    return f"host {number}" if _num_hosts > 1 else f"process {index() * _num_peers + number}"


def check_same(facts: Callable[[], dict[str, Any]]) -> None:
    """See that all hosts have the same facts, and all processes along tp. Where there is one, `facts` is not called.

    Raises:
        ValueError: raised on every host when two hosts differ. The message names the fact and the host.
    """
    if _peers is None:
        return
    first, *others = _of_all_peers({name: str(value) for name, value in facts().items()})
    for number, theirs in enumerate(others, 1):
        for name in sorted(first.keys() | theirs.keys()):
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"{name}: {first.get(name)} on {_peer_name(0)}, but {theirs.get(name)} on {_peer_name(number)}; "
                    "all of a mesh need the same settings, code, data and files"
                )


def surroundings() -> dict[str, Any]:
    """Facts for `check_same` that decide how graphs are traced, besides the settings: versions and the code."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        code.update(path.read_bytes())
    there = [name for name in PACKAGES if importlib.util.find_spec(name) is not None]
    facts: dict[str, Any] = {f"version of {name}": importlib.metadata.version(name) for name in there}
    if _num_hosts > 1:
        facts["hash of a word (set PYTHONHASHSEED=0)"] = hash("word")  # decides the order of sets
    return facts | {"code of tunix_torch": code.hexdigest()[:12]}


def digest(tensors: Iterable[Tensor]) -> str:
    """A word for `check_same` that changes with the tensors. Of large tensors only some of the numbers are read."""
    total = hashlib.sha256()
    for tensor in tensors:
        some = tensor.detach().cpu().flatten()[:: 1 + tensor.numel() // 2**16]
        total.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


@contextlib.contextmanager
def folder_to_write(folder: str) -> Iterator[str]:
    """Where code that must run on all hosts writes: into this folder on the first, elsewhere into a temporary one."""
    if _peer == 0:
        yield folder
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield scratch
