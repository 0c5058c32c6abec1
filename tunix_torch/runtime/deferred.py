"""What torch_tpu tells of its programs before they run, as StableHLO: of deferred operations, of a compiled step."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .compiled import compile_for_torch_tpu
from .device import KIND

if KIND == "tpu":
    import torch_tpu._internal.sync.sync as torch_tpu_sync

_IN_BRACKETS = r'(?:[^()"]|"[^"]*")*'
PLACE = re.compile(rf" loc\({_IN_BRACKETS}(?:\({_IN_BRACKETS}(?:\({_IN_BRACKETS}\){_IN_BRACKETS})*\){_IN_BRACKETS})*\)")


def is_deferred(tensor: torch.Tensor) -> bool:
    """Whether a tensor on the device has a value that has not been computed, nor begun to be. A view has its base's."""
    return not torch_tpu_sync.is_materializing(tensor)


def stablehlo_of(tensors: Sequence[torch.Tensor]) -> str:
    """The program that would compute these deferred tensors, as one, with a result for each, in their order."""
    return torch_tpu_sync.computation_mlir(list(tensors))


def run_and_read(step: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, str]:
    """Compile a step as `compiled.compile_step` does, and run it once on some arguments.

    Returns:
        the step's results, and its program as StableHLO. The program's results are first the arguments that the step
        changes in place, in their order, and then the step's own.
    """
    seen: list[Any] = []
    options = {"debug_callback": seen.append, "serializable": False}  # else a kept program may be taken, without text
    results = compile_for_torch_tpu(step, options)(*args)
    (debug,) = seen
    (text,) = debug.stablehlo_forward_text
    return results, _without_places(text)


def _without_places(text: str) -> str:
    """A program without the lines of Python that its operations come from, whose paths differ between machines."""
    text = PLACE.sub("", re.sub(r"^#loc.*\n", "", text, flags=re.MULTILINE))
    assert " loc(" not in text, "a place in Python that PLACE does not match"
    return text
