"""On XLA a step without some of its groups runs the graphs of a step with all of them.

Run by `TUNIX_DEVICE=xla pytest -m xla tests/rewarding/test_failures_xla.py`.
"""

import pytest
from trainers import digits_reward, make_trainer

STEPS = 5


class FailsLate:
    """Rewards digits; from the third step on it fails for the first and the last group of a batch."""

    __name__ = "fails_late"

    def __call__(self, prompts, completions, trainer_state, **columns):
        if trainer_state.global_step >= 2:
            distinct = list(dict.fromkeys(prompts))
            if len(distinct) > 1:
                self.lost = {distinct[0], distinct[-1]}
            if self.lost.intersection(distinct):
                raise ValueError("not these")
        return digits_reward(prompts, completions)


@pytest.mark.xla
@pytest.mark.thorough
def test_a_dropped_group_compiles_nothing(model_folder, tmp_path):
    settings = {"max_steps": STEPS, "logging_steps": 1, "on_reward_error": "skip_group", "max_reward_errors": 1.0}
    trainer = make_trainer(model_folder, tmp_path, FailsLate(), **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["rewards/skipped_groups"] for row in rows] == [0.0, 0.0, 2.0, 2.0, 2.0]
    assert [row["compilations"] for row in rows[1:]] == [rows[1]["compilations"]] * (STEPS - 1)
