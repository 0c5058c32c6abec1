"""Callbacks that every run has. They make a resumed run follow its own settings, not those in its checkpoint."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..runtime import device

logger = logging.getLogger(__name__)


class EndGraphWithOptimizer(TrainerCallback):
    """Ends XLA's graph after the optimizer's step, so that the graph does not depend on what follows."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        device.sync()


class SyncReference(TrainerCallback):
    """Moves the reference policy after every so many optimizer steps, before a checkpoint of the same step is saved.

    Args:
        sync: moves it.
        interval: optimizer steps.
        each: optimizer steps in a step of the trainer (`num_iterations`), at whose end it moves.
    """

    def __init__(self, sync: Callable[[], None], interval: int, each: int) -> None:
        self.sync, self.interval, self.each = sync, interval, each

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step * self.each // self.interval > (state.global_step - 1) * self.each // self.interval:
            self.sync()


class WarnOfEarlierRun(TrainerCallback):
    """Says so where a run that begins will write over what an earlier one has left in its folder."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kinds = ("checkpoint-*", "adapter_model.safetensors", "model*.safetensors")
        left = sorted(path.name for kind in kinds for path in Path(args.output_dir).glob(kind))
        if left and state.global_step == 0 and state.is_world_process_zero:
            hint = "resume_from_checkpoint=True goes on from its newest checkpoint, and another output_dir keeps it"
            what = f"{', '.join(left[:3])}{', ...' * (len(left) > 3)} of an earlier run, which this one may overwrite"
            logger.warning("output_dir=%r holds %s; %s", str(args.output_dir), what, hint)


class OwnIntervals(TrainerCallback):
    """Lets a resumed run log, evaluate and save as often as its own settings say.

    A checkpoint's state holds the intervals of the earlier run, and `transformers.Trainer` would keep those.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.compute_steps(args, state.max_steps)


class EarlyStoppingCallback(transformers.EarlyStoppingCallback):
    """The callback of Transformers; but a resumed run may change the patience, and the final state has the count.

    The class keeps its name, since checkpoints hold its state under this name.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience = args.early_stopping_patience

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Look at the evaluation of that data set which the metric is of, where there are several."""
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.stateful_callbacks[type(self).__name__] = self.state()
