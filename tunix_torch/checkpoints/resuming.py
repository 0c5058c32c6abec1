"""Callbacks of every run: a resumed one follows its own settings rather than those in its checkpoint."""

from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..runtime import device


class EndGraphWithOptimizer(TrainerCallback):
    """Cuts XLA's graph after the optimizer's step, so that it is the same one whatever follows. Elsewhere no effect."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        device.sync()


class OwnIntervals(TrainerCallback):
    """Lets a resumed run log, evaluate and save as often as it is told; the state of a checkpoint has the earlier
    run's intervals, which `transformers.Trainer` would keep."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
    """That of Transformers, with the patience that a resumed run is told, and a final state that says that it stopped.

    It keeps the name, under which checkpoints hold its state.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience = args.early_stopping_patience

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.stateful_callbacks[type(self).__name__] = self.state()
