"""A word that changes with the weights that a run does not save, by which a resumed run sees that its base is another.

It is the same wherever the weights lie, however they are split over a mesh, and whether they were loaded in float32 or
in bfloat16: they are compared as they are in bfloat16.
"""

import hashlib
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

BLOCK = 1024  # of a large tensor, blocks of so many consecutive numbers are read
MOST_BLOCKS = 64
_OF_ADAPTERS = re.compile(r"\.(lora_\w+|modules_to_save)\.")  # what PEFT calls the tensors of adapters
_OF_PEFT = re.compile(r"^base_model\.model\.|(?<=\.)(base_layer|original_module)\.")  # what it adds to other names


def fingerprint_of(model: nn.Module, but_for: Iterable[Tensor]) -> str | None:
    """The number of a model's tensors and a hash of their names, shapes and numbers; None: there are no such tensors.

    The names are those of the base model, and an adapter's tensors are left out, whatever adapters there are: these are
    compared by their own settings.

    Of a tensor with more than 65,536 numbers only that many are read, in blocks that are spread over all of it, so
    that the largest models take a second.

    Args:
        but_for: tensors that are left out, since checkpoints hold them.
    """
    left_out = set(map(id, but_for))
    tensors = {
        _OF_PEFT.sub("", name): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in left_out and not _OF_ADAPTERS.search(name)
    }
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} ".encode())
        numbers = _some_of(tensor.detach()).to(torch.bfloat16).cpu().contiguous()
        total.update(numbers.view(torch.uint8).numpy().tobytes())
    return f"{len(tensors)} tensors, {total.hexdigest()[:12]}" if tensors else None


def _some_of(tensor: Tensor) -> Tensor:
    """All numbers of a tensor, or blocks of them that are spread over all of it: (n,) or (blocks, BLOCK)."""
    flat = tensor.reshape(-1)
    if len(flat) <= BLOCK * MOST_BLOCKS:
        return flat
    blocks = flat[: len(flat) // BLOCK * BLOCK].view(-1, BLOCK)
    # an odd distance, so that blocks fall on all columns of a matrix whose width is a power of two
    return blocks[:: -(-len(blocks) // MOST_BLOCKS) | 1]
