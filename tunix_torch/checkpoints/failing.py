"""Saves what was learned before rewards failed, and says how the run goes on from there."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..rewarding.values import is_of_rewards
from ..runtime import together
from .whole import WholeCheckpoints

logger = logging.getLogger(__name__)


class SavesBeforeFailing(WholeCheckpoints):
    """A trainer that saves a checkpoint before it stops because rewards failed."""

    how_to_skip = "; on_reward_error='skip_group' would train on without the groups for which a function fails"
    _evaluates: bool  # whether an evaluation within training goes on

    @contextlib.contextmanager
    def saving_when_rewards_fail(self) -> Iterator[None]:
        """When reward functions or the judge raise within this context, save what was learned before.

        They are called between steps, so the weights are those of the last whole step. All processes raise together.
        """
        self._evaluates = False
        try:
            yield
        except Exception as error:
            if is_of_rewards(error) and self.is_in_train:
                error.add_note(self._saved_before_failure())
            raise

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation within training, of which no group can be left out."""
        self._evaluates = True
        metrics = super()._evaluate(*args, **kwargs)
        self._evaluates = False
        return metrics

    def _saved_before_failure(self) -> str:
        """Save a checkpoint of the last step, if there was one. Returns how the run goes on, for a message."""
        step = self.state.global_step
        skip = "" if self.args.drops_failed_groups or self._evaluates else self.how_to_skip
        if step == 0:
            return f"No step was taken before. Mend the function and start again{skip}"
        if self.args.save_strategy == "no":
            return f"save_strategy='no': nothing is saved of the {step} steps before{skip}"
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not together.anyone(folder.exists()):  # else the step has saved it already
            try:
                self._save_checkpoint(self.model, None)
            except OSError as problem:  # such as a full disk, which must not hide why scoring failed
                return f"No checkpoint could be written of step {step}: {problem}"
        how = "Mend the function, and resume: --resume_from_checkpoint latest, or train(resume_from_checkpoint=True)"
        if together.is_first():
            where = f"in the evaluation after step {step}" if self._evaluates else f"in step {step + 1}"
            logger.warning("Scoring failed %s; %s holds everything before. %s", where, folder, how)
        return f"{folder} holds everything before step {step + 1}. {how}{skip}"
