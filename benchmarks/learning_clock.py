"""Counts the seconds that a `transformers.Trainer` trains; saves its adapter now and then, off the clock; says stop."""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .arithmetic_job import Job, adapter_folder


class LearningClock(TrainerCallback):
    """Started by hand when training begins; stands still while the adapter is saved.

    Both peers' adapters are saved alike, in PEFT's layout.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.seconds: list[float] = []  # at the end of each step, since the start
        self._since = 0.0

    def start(self) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seconds.append((self.seconds[-1] if self.seconds else 0.0) + time.perf_counter() - self._since)
        step = len(self.seconds)
        if step in self.job.saved_steps:
            adapter = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
            model.save_pretrained(adapter_folder(self.folder, step), state_dict=adapter)
        control.should_training_stop = step == self.job.num_steps
        self._since = time.perf_counter()
