"""The decode step in the form in which it runs fastest on this machine, kept from one rollout to the next."""

from collections.abc import Callable, Hashable

from torch import nn

from ..model.forward import base_model
from ..runtime import compiled, device, fsdp, tensor_parallel
from ..runtime.recorded import RecordedStep
from .own_tokens import Memory

KEPT_RECORDINGS = 2  # kinds of batches, such as training's and evaluation's, whose KV caches and graphs are kept


class Steps:
    """Decode steps of a model by the kind of batch that they decode: eager, compiled, or recorded as graphs.

    Recorded steps are kept together with the memory that they work in, for the newest kinds of batches only. They are
    recorded anew when a weight has moved to another address. Where weights are split over processes, no step is
    recorded, since what processes send each other is more than launching kernels.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: dict[Hashable, tuple[Callable, Memory | None]] = {}  # the newest last

    def of(self, batch: Hashable, make_step: Callable[[], Callable]) -> tuple[Callable, Memory | None, bool]:
        """Return the step for a kind of batch, the memory that its rows must use, and whether the step is new.

        Args:
            batch: all that decides the shapes of the rows and what the step does.
            make_step: makes the step as a plain function of tensors, see `Rows.decode`.
        """
        known = batch in self._kept
        step, memory = self._kept.pop(batch) if known else self._prepared(make_step())
        self._kept[batch] = step, memory
        if isinstance(step, RecordedStep):
            step.forget_moved()
            while len(self._kept) > KEPT_RECORDINGS:
                oldest, _ = self._kept.pop(next(iter(self._kept)))
                oldest.forget()
        return step, memory, not known

    def _prepared(self, step: Callable) -> tuple[Callable, Memory | None]:
        kind = device.step_kind()
        if kind == "recorded" and not (fsdp.is_split(base_model(self.model)) or tensor_parallel.is_split_along_tp()):
            return RecordedStep(step, self.model), {}
        return (compiled.compile_step(step, self.model) if kind == "compiled" else step), None
