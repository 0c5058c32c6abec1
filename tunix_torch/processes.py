"""What the processes of one run, one a GPU, must agree on: gradients, and numbers over the rows of all of them.

`accelerate launch` starts the processes, and `GRPOConfig` joins them (`torch.distributed`). Each has prompts of its
own; together they are the batch of one process with as many prompts. In a process by itself nothing here has an effect.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def count() -> int:
    """How many processes take part in this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this one is; 0 writes."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


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
