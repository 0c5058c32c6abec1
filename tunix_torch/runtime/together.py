"""What the processes of one run must agree on. In a process by itself nothing here has an effect.

Those of several GPUs: `accelerate launch` starts them, and `GRPOConfig` joins them (`torch.distributed`). Each has
prompts of its own; together they are the batch of one process with as many prompts.

Those of a mesh over several hosts, one a host: torch-xla splits the work, if all run the same graphs in the same order.
So each has the whole batch, of which it uploads what its own chips need, and takes every decision alike: what a clock,
a reward function or a signal decides, the first host tells the others. See "hosts" below.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def count() -> int:
    """How many processes with prompts of their own take part in this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this one is."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return index() == 0 and _host == 0


def wait() -> None:
    """Wait until all processes and hosts are here."""
    _everyone(None)


def anyone(told: bool) -> bool:
    """Whether any process or host says so; the same on all of them."""
    return any(_everyone(told))


def gather(value: Any) -> list[Any]:
    """The value of every process, in their order: anything that can be pickled; tensors on the host."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def gather_rows(tensor: Tensor) -> Tensor:
    """A tensor on the host with the rows of every process: (R, ...) of each -> (sum of R, ...)."""
    return torch.cat(gather(tensor))


def own_rows(tensor: Tensor) -> Tensor:
    """This process's part of rows that `gather_rows` joined, where all have as many: (count * R, ...) -> (R, ...)."""
    return tensor.tensor_split(count())[index()]


def own_share(num_rows: int) -> tuple[int, int]:
    """Of rows that are numbered through, as many for each process: the number of this one's first row, and of all."""
    return num_rows * index(), num_rows * count()


def own_part(num_rows: int) -> slice:
    """Which of so many rows that all processes have are this one's to work on: as many for each as can be."""
    each = -(-num_rows // count())
    return slice(index() * each, (index() + 1) * each)


def sum_numbers(numbers: dict[str, float]) -> dict[str, float]:
    """Each number, summed over the processes; the same on all of them, to the last bit."""
    everyone = gather(numbers)
    return {name: sum(theirs[name] for theirs in everyone) for name in numbers}


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over the processes, in one exchange."""
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def keep_frozen_out_of_ddp(model: nn.Module) -> None:
    """Let DDP copy only what is trained from process 0 to the others when it wraps the model.

    It copies buffers by their place, and Gemma 3 registers those of its two rotary embeddings in the order of a set,
    which differs between processes: the others would compute with the frequencies swapped.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen + buffers)


# ---- hosts ----

PORT = 12355  # on the first host; MASTER_PORT is another one
PATIENCE = 3600.0  # seconds, with a host that says nothing
PACKAGES = ("torch", "torch_xla", "transformers", "peft", "accelerate")  # they decide how a graph is traced

_host, _num_hosts = 0, 1
# Not the default group: Transformers and Accelerate would take its members for processes with prompts of their own.
_hosts: torch.distributed.ProcessGroupGloo | None = None


def join_hosts(host: int, num_hosts: int, address: str) -> None:
    """Join the hosts of a mesh, the first of which has this address; waits for all. On one host nothing happens."""
    global _host, _num_hosts, _hosts
    if num_hosts > 1 and _hosts is None:
        port, patience = int(os.environ.get("MASTER_PORT", PORT)), timedelta(seconds=PATIENCE)
        store = torch.distributed.TCPStore(address, port, num_hosts, is_master=host == 0, timeout=patience)
        _hosts = torch.distributed.ProcessGroupGloo(store, host, num_hosts, patience)
        _host, _num_hosts = host, num_hosts


def num_hosts() -> int:
    """Over how many hosts the mesh lies."""
    return _num_hosts


def _everyone(value: Any) -> list[Any]:
    """The value of every process or host, in their order: what JSON can hold.

    Raises:
        ValueError: another host has ended, or says nothing for too long.
    """
    if _hosts is None:
        return gather(value)
    said = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    try:
        lengths = [int(length) for length in _of_each_host(torch.tensor([len(said)]))]
        texts = _of_each_host(nn.functional.pad(said, (0, max(lengths) - len(said))))
    except RuntimeError as error:
        raise ValueError(f"another host has ended, and with it this one; see what it said ({error})") from error
    return [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]


def _of_each_host(tensor: Tensor) -> list[Tensor]:
    """A tensor of every host, all of one shape, in their order."""
    tensors = [torch.empty_like(tensor) for _ in range(_num_hosts)]
    _hosts.allgather([tensors], [tensor]).wait()
    return tensors


def decided_by_first(decide: Callable[[], Any]) -> Any:
    """What `decide()` returns on the first host, which alone calls it: what JSON can hold. On one host: `decide()`.

    What it raises there is raised on the first host, and as a ValueError on the others.
    """
    if _hosts is None:
        return decide()
    value = problem = None
    if _host == 0:
        try:
            value = decide()
        except Exception as error:  # the others must not wait for what never comes
            problem = error
    value, message = _everyone((value, None if problem is None else str(problem)))[0]
    if problem is not None:
        raise problem
    if message is not None:
        raise ValueError(f"host 0: {message}")
    return value


def check_same(facts: Callable[[], dict[str, Any]]) -> None:
    """All hosts must have the same facts. On one host `facts` is not called.

    Raises:
        ValueError: on every host, when one has another value; names the fact and the host.
    """
    if _hosts is None:
        return
    first, *others = _everyone({name: str(value) for name, value in facts().items()})
    for host, theirs in enumerate(others, 1):
        for name in sorted(first.keys() | theirs.keys()):
            if first.get(name) != theirs.get(name):
                raise ValueError(
                    f"{name}: {first.get(name)} on host 0, but {theirs.get(name)} on host {host}; "
                    "the hosts of a mesh need the same settings, code, data and files"
                )


def surroundings() -> dict[str, Any]:
    """What decides how graphs are traced, besides the settings: for `check_same`."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        code.update(path.read_bytes())
    facts = {f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}
    facts["hash of a word (set PYTHONHASHSEED=0)"] = hash("word")  # decides the order of sets
    return facts | {"code of tunix_torch": code.hexdigest()[:12]}


def digest(tensors: Iterable[Tensor]) -> str:
    """A word that changes with the tensors; of large ones with some of their numbers. For `check_same`."""
    total = hashlib.sha256()
    for tensor in tensors:
        some = tensor.detach().cpu().flatten()[:: 1 + tensor.numel() // 2**16]
        total.update(some.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


@contextlib.contextmanager
def folder_to_write(folder: str) -> Iterator[str]:
    """This folder on the first host; on others one that is thrown away, for what must run on all and writes."""
    if _host == 0:
        yield folder
    else:
        with tempfile.TemporaryDirectory() as scratch:
            yield scratch
