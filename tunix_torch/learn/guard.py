"""An optimizer step whose loss or gradient is not finite changes nothing: no weight, no moment, no learning rate."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..runtime import device, together

Schedule = torch.optim.lr_scheduler.LRScheduler
State = dict[Tensor, dict[str, Any]]  # what an optimizer keeps for each weight


@dataclass
class Decided:
    """An optimizer step, with what was decided about it."""

    step: int  # its number, from 1
    norm: float  # of the gradient
    loss: float
    batches: list[Any]  # what it learns from
    taken: bool


@dataclass
class _Taken:
    """What is known of an optimizer step between its decision and the time when Python learns how it was decided."""

    step: int
    batches: list[Any]
    numbers: Tensor  # (2,) float32, the gradient's norm and the loss: on the device where graphs are traced
    good: Tensor | bool  # () bool on the device where graphs are traced
    schedule: dict[str, Any] | None = None  # before the step, as is all that follows
    options: list[dict[str, Any]] | None = None  # such as the learning rate, of each group of weights
    weights: list[tuple[Tensor, Tensor]] | None = None  # each weight with a copy; where graphs are traced
    moments: State | None = None  # copies; where graphs are traced


class StepGuard:
    """Watches the steps of an optimizer.

    Where operations run at once, the decision falls before the step: without gradients an optimizer changes nothing.
    Where graphs are traced, Python must not wait for the gradient, so the graph itself chooses between the new values
    and the old ones. Python learns of it when it next waits (`settle`), and then takes back what is not in the graph:
    the schedule, and the counters of the optimizer.

    Args:
        schedule: returns the schedule of the learning rate, or None where there is none.
    """

    def __init__(self, schedule: Callable[[], Schedule | None]) -> None:
        self._schedule = schedule
        self._losses: list[Tensor] = []
        self._batches: list[Any] = []
        self._taken: _Taken | None = None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on, guard the steps of this optimizer."""
        optimizer.register_step_pre_hook(lambda optimizer, *_: self._before(optimizer))
        optimizer.register_step_post_hook(lambda optimizer, *_: self._after(optimizer))

    def learned(self, batch: Any, loss: Tensor) -> None:
        """Note what the next optimizer step learns from, and its loss, (), detached. It may be called several times."""
        self._batches.append(batch)
        self._losses.append(loss)

    def decide(self, norm: Tensor, step: int) -> Tensor:
        """Decide whether the optimizer may take this step, whose gradient has this norm, (). `settle` comes first.

        Returns:
            the norm, in main memory where Python has waited for it.
        """
        assert self._taken is None, "the step before is not settled"
        losses = [loss.to(norm.device, torch.float32) for loss in self._losses]
        numbers = torch.stack([norm.detach().float(), sum(losses, torch.zeros_like(norm, dtype=torch.float32))])
        if device.traces_graphs():
            good: Tensor | bool = numbers.isfinite().all()
        else:
            numbers = numbers.cpu()
            good = not together.anyone(not bool(numbers.isfinite().all()))
        self._taken, self._batches, self._losses = _Taken(step, self._batches, numbers, good), [], []
        return norm if device.traces_graphs() else numbers[0]

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        taken = self._taken
        if taken is None:  # somebody steps the optimizer by hand
            return
        schedule = self._schedule()
        taken.schedule = None if schedule is None else schedule.state_dict()
        taken.options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
        if device.traces_graphs():
            taken.weights = [(weight, weight.detach().clone()) for weight in weights]
            taken.moments = {
                weight: {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}
                for weight, state in optimizer.state.items()
            }
        elif not taken.good:
            for weight in weights:
                weight.grad = None

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer) -> None:
        """Where graphs are traced, keep the new values only if the step is good."""
        taken = self._taken
        if taken is None or taken.weights is None:
            return
        for weight, before in taken.weights:
            weight.copy_(torch.where(taken.good, weight, before))
        for weight, state in optimizer.state.items():
            old = taken.moments.get(weight, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.device == weight.device:
                    before = old[name] if name in old else torch.zeros_like(value)
                    value.copy_(torch.where(taken.good, value, before))

    def forget(self) -> None:
        """Leave the newest step unsettled for good, where graphs are only traced."""
        self._taken = None

    def settle(self, optimizer: torch.optim.Optimizer) -> Decided | None:
        """Learn how the newest step was decided, for which Python may wait for the device. None: it is known already.

        A step that was not taken leaves nothing behind.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return None
        norm, loss = taken.numbers.tolist()
        good = math.isfinite(norm) and math.isfinite(loss) and taken.good is not False
        if not good and taken.schedule is not None:
            self._schedule().load_state_dict(taken.schedule)
        if not good and taken.options is not None:
            for group, options in zip(optimizer.param_groups, taken.options, strict=True):
                group.update(options)
        if not good and taken.moments is not None:
            _take_back(optimizer.state, taken.moments)
        return Decided(taken.step, norm, loss, taken.batches, good)


def _take_back(state: State, before: State) -> None:
    """Give an optimizer the counters that it had before a step. The tensors on a device have their old values."""
    for weight in list(state):
        if weight not in before:  # the step was its first one, and so the next one is
            del state[weight]
            continue
        for name, value in before[weight].items():
            if not isinstance(value, Tensor) or value.device != weight.device:
                state[weight][name] = value
