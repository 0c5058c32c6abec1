"""Tells a stopwatch where the steps of a `transformers.Trainer` end."""

from typing import Any

from transformers import TrainerCallback

from .stopwatch import Stopwatch


class StepEnds(TrainerCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.end_step()
