"""A callback that times the training of a `transformers.Trainer`, saves its adapters and stops it at the last step."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .arithmetic_job import Job, adapter_folder


class LearningClock(TrainerCallback):
    """Counts seconds from the call of `start` on, without those in which an adapter is saved.

    It saves the adapter after each of the job's `saved_steps`, in PEFT's format, for both peers alike.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.seconds: list[float] = []  # since the start, at the end of each step
        self._since = 0.0

    def start(self) -> None:
        """Start the clock; called right before training begins."""
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seconds.append((self.seconds[-1] if self.seconds else 0.0) + time.perf_counter() - self._since)
        step = len(self.seconds)
        if step in self.job.saved_steps:
            adapter = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
            model.save_pretrained(adapter_folder(self.folder, step), state_dict=adapter)
        control.should_training_stop = step == self.job.num_steps
        self._since = time.perf_counter()
