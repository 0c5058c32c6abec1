"""A callback that tells a stopwatch where the training steps of a `transformers.Trainer` begin and end."""

from typing import Any

from transformers import TrainerCallback

from .stopwatch import Stopwatch


class StepEnds(TrainerCallback):
    """Starts the stopwatch when training begins, and ends its step at the end of each training step."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.end_step()
