"""Keeps the completions of every logged step and the answers of every evaluation, as Parquet files of the run."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config.grpo import GRPOConfig
from ..data.rows import Row
from ..evals.answers import Answers
from ..runtime import together
from .files import EVALUATIONS, STEPS, CompletionFiles
from .rows import StepRows, columns_of_answers
from .tables import ShowCompletions


class KeepCompletions(TrainerCallback):
    """Writes `output_dir/completions/completions_STEP.parquet` at every log of a step, and `evaluation_STEP.parquet`
    at every evaluation, within `completions_max_mb`. The columns are those of `StepRows.of_step` and
    `columns_of_answers`. Of several processes the first one writes.

    Where a run evaluates several data sets, the answers to the first one are kept.

    A resumed run deletes the files of steps after its checkpoint, so that the folder reads as if it had not stopped.

    Args:
        rows: what was sampled last.
        names: gives the names of the reward functions.
        args: the settings of the run.
        show: shows the completions of steps that are logged; None: nothing is shown.
    """

    def __init__(
        self,
        rows: StepRows,
        names: Callable[[], Sequence[str]],
        args: GRPOConfig,
        show: ShowCompletions | None = None,
    ) -> None:
        self.rows, self.names, self.args, self.show = rows, names, args, show
        self._opened: CompletionFiles | None = None
        self._questions: list[str] | None = None  # those whose answers are kept

    @property
    def _files(self) -> CompletionFiles:
        if self._opened is None:
            self._opened = CompletionFiles(self.args.output_dir, self.args.completions_max_mb * 2**20)
        return self._opened

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The files of an earlier run have been moved by now, or `train` was called again.
        self._questions = self._opened = None
        if together.is_first():
            self._files.forget_after(state.global_step)
        if self.show is not None:
            self.show.begin(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        asked = self.args.completions_max_mb or self.show is not None
        if not asked or not self.args.use_grpo or "loss" not in (logs or {}):
            return
        columns = self.rows.of_step(state.global_step, self.names())
        if together.is_first() and columns["step"]:
            self._files.write(STEPS, state.global_step, columns)
            if self.show is not None:
                self.show(columns)

    def evaluated(self, step: int, rows: Sequence[Row], answers: Answers | None) -> None:
        """Keep the greedy answers of an evaluation; None: nothing was answered."""
        if answers is None or not together.is_first():
            return
        columns = columns_of_answers(step, rows, answers)
        self._questions = self._questions or columns["question"]
        if columns["question"] == self._questions:
            self._files.write(EVALUATIONS, step, columns)
