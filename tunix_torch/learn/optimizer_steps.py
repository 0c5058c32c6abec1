"""The part of the trainer that takes optimizer steps: gradients, their norm, and steps that must not be taken."""

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..config.services import blamed_on
from ..model.policies import Policy
from ..runtime import device, fsdp, together
from .bad_batches import save_bad_batches
from .entropy import EntropyControl
from .finite import bad_gradients, check_finite
from .guard import Decided, StepGuard

logger = logging.getLogger(__name__)


class OptimizerSteps(Trainer):
    """A `transformers.Trainer` in which a step whose loss or gradient is not finite changes nothing.

    Such a step is counted, said, and its batch is written to the run's folder. Weights, moments, the schedule, the
    entropy's control and the state of random numbers stay what they were, and the next step has other prompts.
    """

    policy: Policy
    entropy: EntropyControl
    has_dropout: bool

    def __init__(self, **arguments: Any) -> None:
        self.guard = StepGuard(lambda: self.lr_scheduler)
        self._skipped_since_log = 0  # steps
        self._newest_taken: int | None = None  # the newest step of which a pass was taken
        self._newest_decided = 0
        self._bad_files: list[Path] = []  # of the newest step that was skipped
        self._finite_losses: dict[int, bool] = {}  # of each step since the last log
        self._take_back: list[Callable[[], None]] = []  # undo what the newest step changes besides the optimizer
        self._bad_gradients: list[str] = []  # of the newest step, where operations run at once
        super().__init__(**arguments)
        # A batch from pinned memory is copied to the device without waiting for the work that the device has left.
        if not self.accelerator.dataloader_config.non_blocking:
            self.accelerator.dataloader_config.non_blocking = self.args.dataloader_pin_memory

    def create_accelerator_and_postprocess(self) -> None:
        """See `transformers.Trainer`. Data loaders learn which processes have the same rows."""
        super().create_accelerator_and_postprocess()
        if together.processes() is not None:
            self.accelerator.state.device_mesh = together.processes()

    # ---- errors of other libraries, as errors of a setting ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        with blamed_on("optim", self.args.optim.value):
            optimizer = super().create_optimizer(model)
        if is_new:
            self.guard.watch(optimizer)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        name, kwargs = self.args.lr_scheduler_type.value, self.args.lr_scheduler_kwargs
        with blamed_on("lr_scheduler_type", name, f" (lr_scheduler_kwargs={kwargs!r})"):
            return super().create_scheduler(num_training_steps, optimizer)

    # ---- a step ----

    def backward(self, loss: Tensor) -> None:
        """Compute the gradient of a loss and add it to the gradients of the parameters."""
        self.accelerator.backward(loss)

    def sum_gradients(self) -> None:
        """Sum gradients over processes, once for each optimizer step.

        DDP's own hooks do nothing here, since no forward pass goes through its wrapper.
        """
        if self.accelerator.sync_gradients:
            together.sum_gradients(self.model.parameters())

    def optimizer_step(self) -> None:
        """Clip the gradient, step, and drop the gradient, as `transformers.Trainer` does after a batch."""
        norm = self._clip_grad_norm(self.model) if self.args.max_grad_norm > 0 else None
        self._get_grad_norm(self.model, norm)
        self.optimizer.step()
        device.sync()
        self.model.zero_grad()
        self.step_begins()

    def put_optimizer(self, mode: str) -> None:
        """Schedule-free optimizers hold other weights while they learn ("train") than they give in the end ("eval")."""
        if callable(getattr(self.optimizer, mode, None)):
            getattr(self.optimizer, mode)()

    def step_begins(self) -> None:
        """Keep what a step changes besides the weights, in case it is skipped."""
        if self.has_dropout or self.args.use_adaptive_entropy:  # else nothing is to be taken back of the step before
            self.settle()
        self._take_back = [partial(self.entropy.take_back, self.entropy.kept())]
        if self.has_dropout:  # else nothing draws from these generators
            self._take_back.append(partial(device.set_random_state, device.random_state()))

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip the gradient and return its norm before. One that is not finite is left as it is, to be looked at."""
        if device.traces_graphs():  # where looking at it would make Python wait
            return fsdp.whole(super()._clip_grad_norm(model))
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        norm = nn.utils.get_total_norm([weight.grad for weight in weights])
        if not fsdp.is_part(norm):  # a norm of 0 changes no gradient, and nothing waits for the norm
            nn.utils.clip_grads_with_norm_(weights, self.args.max_grad_norm, norm.where(norm.isfinite(), 0.0))
        elif fsdp.whole(norm).isfinite():
            nn.utils.clip_grads_with_norm_(weights, self.args.max_grad_norm, norm)
        return fsdp.whole(norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        """The norm of the gradient before clipping. By it and the loss it is decided whether the optimizer steps."""
        if grad_norm is None and not device.traces_graphs():
            grad_norm = nn.utils.get_total_norm([w.grad for w in model.parameters() if w.grad is not None])
            grad_norm = fsdp.whole(grad_norm)  # of all processes
        norm = super()._get_grad_norm(model, grad_norm)
        self.settle()
        norm = self.guard.decide(norm, self.state.global_step + 1)
        self._bad_gradients = [] if device.traces_graphs() or norm.isfinite() else bad_gradients(model)
        return norm

    # ---- steps that are skipped ----

    def counted(self, loss: Tensor) -> Tensor:
        """A batch's loss as it goes into the sum that is logged: 0 where it is not finite."""
        return torch.nan_to_num(loss, nan=0.0, posinf=0.0, neginf=0.0)

    def settle(self) -> None:
        """Find out whether the newest optimizer step was taken. Where graphs are traced, Python waits for the device.

        Raises:
            FloatingPointError: it was not, since the weights are not finite, so that no later step could be.
        """
        if device.planner() is not None:  # graphs are traced and not run
            self.guard.forget()
            return
        decided = self.guard.settle(self.optimizer)
        if decided is None:
            return
        lost = not math.isfinite(decided.loss)
        # Of a step that is skipped, a process may have a finite loss of its own rows.
        self._finite_losses[decided.step] = not (lost if decided.taken else together.anyone(lost))
        self._newest_decided = decided.step
        if self._newest_taken is None:  # the run begins
            self._newest_taken = decided.step - 1
        if decided.taken:
            self._newest_taken = decided.step
            return
        self._skipped_since_log += 1
        for take_back in self._take_back:
            take_back()
        self._bad_files = save_bad_batches(decided, self.policy, self.args)
        if together.is_first():
            logger.warning("%s", _describe(decided, self._bad_gradients, self._bad_files))
        check_finite(self.policy.weights(), f"step {decided.step}")

    def skipped_since_log(self) -> dict[str, Any]:
        """What the next log needs to know of steps that were skipped, for a checkpoint."""
        return {
            "count": self._skipped_since_log,
            "finite_losses": list(self._finite_losses.items()),
            "newest_taken": self._newest_taken,
        }

    def skip_since_log(self, kept: dict[str, Any]) -> None:
        """Go on with what `skipped_since_log` returned."""
        self._skipped_since_log, self._finite_losses = kept["count"], dict(kept["finite_losses"])
        self._newest_taken = kept["newest_taken"]

    def check_steps_were_taken(self, step: int) -> None:
        """See that a run which ends with this step has not skipped all of the last ones.

        Raises:
            FloatingPointError: it has skipped two of them or more.
        """
        skipped = 0 if self._newest_taken is None else step - self._newest_taken
        if skipped > 1:
            raise FloatingPointError(
                f"step {step}: the run is at its last step, but the loss or gradient of its last {skipped} steps was"
                " not finite, so it has not ended as it should; begin a new one, with a lower learning_rate"
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """See `transformers.Trainer`. After too many steps in a row that were skipped, save and stop.

        Raises:
            FloatingPointError: `max_skipped_steps` steps in a row were skipped, or the last two of the run or more.
        """
        control, limit, step = self.control, self.args.max_skipped_steps, self.state.global_step
        is_last = step >= self.state.max_steps
        waits = control.should_log or control.should_evaluate or control.should_save or is_last
        if waits or not device.traces_graphs():
            self.settle()
        skipped = 0 if self._newest_taken is None else self._newest_decided - self._newest_taken
        if skipped < limit and not (skipped > 1 and is_last):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        self.settle()
        control.should_evaluate, control.should_save = False, self.args.save_strategy != "no"
        saved = f"checkpoint-{step} holds what was learned before; " if control.should_save else ""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        raise FloatingPointError(
            f"step {step}: the loss or the gradient of {skipped} steps in a row was not finite "
            f"(max_skipped_steps={limit}); {saved}python -m tunix_torch.replay {self._bad_files[0]} says what is wrong "
            "in the last batch"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `transformers.Trainer`. The loss is the mean over steps with a finite one, and `skipped_steps` counts."""
        self.settle()
        if "loss" in logs and not all(self._finite_losses.values()):
            good = sum(self._finite_losses.values())
            logs["loss"] *= len(self._finite_losses) / max(good, 1)
            if not good:
                del logs["loss"]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]
        if "learning_rate" in logs or "train_loss" in logs:
            self._finite_losses.clear()
            last = next((row for row in reversed(self.state.log_history) if "learning_rate" in row), {})
            if skipped := last.get("skipped_steps", 0) + self._skipped_since_log:
                logs["skipped_steps"] = skipped
            if "learning_rate" in logs:
                self._skipped_since_log = 0
        super().log(logs, start_time)


def _describe(skipped: Decided, bad: Sequence[str], files: Sequence[Path]) -> str:
    """What is said about a step that was skipped."""
    where = f" ({len(bad)} gradients, such as that of {bad[0]})" if bad else ""
    return (
        f"Step {skipped.step} is skipped, and nothing has changed: its gradient's norm is {skipped.norm:.3g}{where}, "
        f"and its loss {skipped.loss:.3g}. python -m tunix_torch.replay {files[0]} says which row it is"
    )
