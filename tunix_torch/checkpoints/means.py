"""Sums up the numbers of steps for the next log, and keeps the sums in a checkpoint, so that a resumed run goes on."""

import json
import math
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config.files import write_whole
from ..learn.optimizer_steps import OptimizerSteps
from ..runtime import device, together
from ..runtime.profiling import take_seconds

MEANS_FILE = "since_log.json"


class KeepsMeans(OptimizerSteps):
    """A trainer whose logs are those of a run that has not stopped, after it was resumed too.

    By itself it begins to sum up anew: the first log of a resumed run would be the mean of fewer steps than the others,
    and the `train_loss` of the summary the losses since then, divided by all steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, list[float]] = defaultdict(list)  # since the last log
        self._go_on = GoOnWithMeans(self)
        self.add_callback(self._go_on)

    def add_metrics(self, numbers: dict[str, float]) -> None:
        """Keep numbers of a step for the next log."""
        for name, value in numbers.items():
            self._metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each number that `add_metrics` was given since the last log.

        Of a step that was skipped some numbers are not finite. The means leave them out. `transformers.Trainer` keeps
        every log: so names are kept once, which take more than numbers.
        """
        if "loss" in logs or "train_loss" in logs:  # the summary has what came after the last log of a step
            finite = {name: [v for v in values if math.isfinite(v)] for name, values in self._metrics.items()}
            logs |= {name: sum(values) / len(values) for name, values in finite.items() if values}
            logs |= self.entropy.metrics()
            self._metrics.clear()
        super().log({sys.intern(name): value for name, value in (logs | device.counters()).items()}, start_time)

    def _save_means(self, folder: str) -> None:
        """Write the sums into a checkpoint's folder. All processes take part.

        Nothing is written within a step of several batches, whose first ones are in the sums and not in the weights.
        """
        if self._go_on.within_step and self.args.gradient_accumulation_steps > 1:
            return
        loss = 0.0
        if self.state.global_step > self._globalstep_last_logged:  # else nothing is waited for
            device.sync()
            loss = together.sum_numbers({"loss": self._tr_loss.item()})["loss"] / together.count()
        if self.args.should_save:
            sums = {"total_loss": self._total_loss_scalar, "loss": loss, "last_log": self._globalstep_last_logged}
            sums |= {"metrics": self._metrics, "skipped": self.skipped_since_log()}
            write_whole(Path(folder) / MEANS_FILE, json.dumps(sums) + "\n")

    def go_on_from(self, checkpoint: str | None) -> None:
        """Let training begin with the sums of a checkpoint; None: with none."""
        self._go_on.checkpoint = checkpoint

    def load_means(self, folder: str | Path) -> None:
        """Go on with the sums of a checkpoint. Early versions wrote none: then they begin anew."""
        file = Path(folder) / MEANS_FILE
        if file.is_file():
            sums = json.loads(file.read_text(encoding="utf-8"))
            self._tr_loss = torch.tensor(sums["loss"], device=self.args.device)
            self._total_loss_scalar, self._globalstep_last_logged = sums["total_loss"], sums["last_log"]
            self._metrics = defaultdict(list, sums["metrics"])
            self.skip_since_log(sums["skipped"])

    def log_summary(self, folder: str | Path) -> None:
        """Log the summary of a finished run that was killed before it did, by the sums of its last checkpoint."""
        if any("train_loss" in row for row in self.state.log_history) or not (Path(folder) / MEANS_FILE).is_file():
            return
        self.load_means(folder)
        loss = (self._total_loss_scalar + self._tr_loss.item()) / max(self.state.global_step, 1)
        self.log({"total_flos": self.state.total_flos, "train_loss": loss})


class GoOnWithMeans(TrainerCallback):
    """Lets a resumed run go on with the sums of its checkpoint, when its trainer has set them to 0; and sums up where
    the time of each step goes."""

    def __init__(self, trainer: KeepsMeans) -> None:
        self.trainer = trainer
        self.checkpoint: str | None = None  # that the run is resumed from
        self.within_step = False
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.checkpoint is not None:
            self.trainer.load_means(self.checkpoint)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.within_step, self.started = True, time.perf_counter()
        take_seconds()  # what was before belongs to no step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.within_step = False
        self.trainer.add_metrics({**take_seconds(), "step_seconds": time.perf_counter() - self.started})
