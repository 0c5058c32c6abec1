"""The part of the trainer that logs: a step's numbers, what was sampled in it, and evaluations."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..completions.keeping import KeepCompletions
from ..completions.rows import StepRows
from ..completions.tables import ShowCompletions
from ..config.grpo import GRPOConfig
from ..data.rows import Row
from ..evals.answers import Answers
from ..learn.collapse import CollapseWatch
from ..model.loading import eos_token_ids
from ..rewarding.scored import ScoredRollout
from .publishing import PushesToHub


class LogsSteps(PushesToHub):
    """A trainer that keeps what a run logs besides its numbers, and watches these for signs of a collapse."""

    def watching(self, args: GRPOConfig, processing_class: PreTrainedTokenizerBase) -> list[TrainerCallback]:
        """Make the callbacks that watch a run and keep its completions. `transformers.Trainer` is not there yet."""
        self.collapse = CollapseWatch()
        self.step_rows = StepRows(args, eos_token_ids(self.policy.model, processing_class))
        show = ShowCompletions(args, self._tensorboard_text) if args.log_completions else None
        self.completions = KeepCompletions(self.step_rows, lambda: self.facts.reward_funcs, args, show)
        return [self.collapse, self.completions]

    def add_metrics(self, numbers: dict[str, float]) -> None:
        self.collapse.note(numbers)
        super().add_metrics(numbers)

    def note_rollout(self, scored: ScoredRollout, metrics: dict[str, float]) -> None:
        """Note what was sampled and rewarded for the next step, and the numbers that are logged about it."""
        self.add_metrics(metrics)
        self.collapse.note_equal_rewards(metrics, self.state.global_step + 1, scored.texts[0])
        self.step_rows.sampled(scored, self.state.global_step)

    def evaluated(self, metrics: dict[str, float], rows: Sequence[Row], answers: Answers | None) -> dict[str, float]:
        """Log what an evaluation gave, keep its answers, and let callbacks see it. Returns the metrics."""
        if answers is not None:
            answers.step = self.state.global_step
        self.completions.evaluated(self.state.global_step, rows, answers)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _tensorboard_text(self) -> Callable[[str, str, int], None] | None:
        """The function that adds a text of a step to TensorBoard; None: the run does not report there."""
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, TensorBoardCallback)]
        return callbacks[0].tb_writer.add_text if callbacks and callbacks[0].tb_writer is not None else None
