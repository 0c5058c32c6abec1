"""Watches the numbers of each step for signs that a run has collapsed, and says each of them once, with what to try."""

import logging
import math
import statistics
from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..runtime import together
from .signs import (
    ERRORS,
    LOSS_LOGS,
    MORE_LOSS,
    MOST_CUT_OFF,
    MOST_GROWTH,
    MOST_LOSS,
    RATE,
    SIGNS,
    STEPS_AT_END,
    WINDOW,
    Sign,
    Streak,
)

logger = logging.getLogger(__name__)

# Why all rewards of every group may be equal.
CUT_OFF = "All completions were cut off at generation_max_length, perhaps before their answer"
TOO_EASY_OR_HARD = "The questions are too easy or too hard, the temperature is too low"


class CollapseWatch(TrainerCallback):
    """Takes the numbers of each step, and says each sign of a collapse once a run, by the first process.

    Nothing of this is in checkpoints: a run that is resumed begins to watch anew, and may say a sign again.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self.said: dict[str, tuple[int, int]] = {}  # the name of each sign, with the first and the last step of it
        self._numbers: dict[str, list[float]] = {}  # of the step that is under way
        self._streaks: dict[str, Streak] = {}
        self._rewards: deque[float] = deque(maxlen=WINDOW)
        self._lengths: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # with the share that is cut off
        # The best mean of rewards, its last step, and its standard error.
        self._best: tuple[float, int, float] | None = None
        self._lowest_reward = float("inf")
        self._first_length: float | None = None  # the mean of the first window
        self._first_loss: float | None = None
        self._high_losses: list[int] = []  # the steps of the newest logs whose loss is too high
        self._told_of_equal = False
        self._steps = 0

    # ---- what it takes ----

    def note(self, numbers: dict[str, float]) -> None:
        """Take numbers of the step that is under way. Of several under one name the mean counts."""
        for name, value in numbers.items():
            self._numbers.setdefault(name, []).append(value)

    def note_equal_rewards(self, numbers: dict[str, float], step: int, example: str) -> None:
        """Say at the first rollout without different rewards in any group that it teaches nothing.

        Args:
            numbers: what is logged about the rollout.
            example: one of its completions.
        """
        if numbers.get("frac_reward_zero_std") == 1.0 and not self._told_of_equal:
            self._told_of_equal = True
            if together.is_first():
                logger.warning(
                    "Step %d: within every group all rewards are equal, so there is nothing to learn from this batch. "
                    "%s, or the reward functions do not find what they look for in completions such as %.200r. Later "
                    "ones are counted only, as frac_reward_zero_std",
                    step,
                    CUT_OFF if numbers.get("completions/clipped_ratio") == 1.0 else TOO_EASY_OR_HARD,
                    example,
                )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        numbers = {name: sum(values) / len(values) for name, values in self._numbers.items()}
        self._numbers = {}
        self._steps += 1
        for sign in SIGNS:
            self._look(sign, numbers.get(sign.metric), state.global_step)
        self._look_at_reward(numbers.get("reward"), state.global_step)
        length, cut_off = (numbers.get(f"completions/{name}") for name in ("mean_length", "clipped_ratio"))
        if length is not None and cut_off is not None:
            self._look_at_length(length, cut_off, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and not args.use_grpo:  # the loss of GRPO says nothing of this kind
            loss = logs["loss"]
            self._first_loss = loss if self._first_loss is None else self._first_loss
            high = loss > MOST_LOSS * self._first_loss + MORE_LOSS
            self._high_losses = [*self._high_losses, state.global_step] if high else []
            if len(self._high_losses) >= LOSS_LOGS:
                saw = f"the loss was {loss:.4g}, and {self._first_loss:.4g} at first"
                means = "what the model knew is being overwritten"
                self._say("loss", self._high_losses[0], state.global_step, saw, means, RATE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for sign in SIGNS:
            streak = self._streaks.get(sign.name)
            if streak is not None and streak.steps >= STEPS_AT_END:
                self._say_sign(sign, streak)
        if self.said and together.is_first():
            logger.warning("%s", self.summary())

    # ---- what it sees ----

    def _look(self, sign: Sign, value: float | None, step: int) -> None:
        if value is None or not sign.holds(value):
            self._streaks.pop(sign.name, None)
            return
        streak = self._streaks.setdefault(sign.name, Streak(step, step, value, value))
        streak.last, streak.least, streak.most = step, min(streak.least, value), max(streak.most, value)
        if streak.steps >= sign.steps:
            self._say_sign(sign, streak)

    def _say_sign(self, sign: Sign, streak: Streak) -> None:
        saw = sign.saw.format(least=streak.least, most=streak.most)
        self._say(sign.name, streak.first, streak.last, saw, sign.means, sign.hint)

    def _look_at_reward(self, reward: float | None, step: int) -> None:
        """Look whether the reward has lost half of the way from its lowest to its best mean, and not by chance."""
        if reward is None or not math.isfinite(reward):  # none of the step has one
            return
        self._rewards.append(reward)
        self._lowest_reward = min(self._lowest_reward, reward)
        if len(self._rewards) < WINDOW:
            return
        now = sum(self._rewards) / WINDOW
        if self._best is None or now > self._best[0]:
            self._best = now, step, statistics.stdev(self._rewards) / WINDOW**0.5
        best, when, error = self._best
        if best - now > max(0.5 * (best - self._lowest_reward), ERRORS * error):
            saw = f"the mean reward of {WINDOW} steps was {now:.4g}; up to step {when} it was {best:.4g}"
            means = "the policy has unlearned what it was paid for, or the questions have become harder"
            self._say("reward", step - WINDOW + 1, step, saw, means, f"{RATE}, or a larger kl_penalty_coef")

    def _look_at_length(self, length: float, cut_off: float, step: int) -> None:
        self._lengths.append((length, cut_off))
        if len(self._lengths) < WINDOW:
            return
        now, share = (sum(column) / WINDOW for column in zip(*self._lengths, strict=True))
        self._first_length = now if self._first_length is None else self._first_length
        if now > MOST_GROWTH * self._first_length and share >= MOST_CUT_OFF:
            saw = f"completions had {now:.0f} tokens, {self._first_length:.0f} at first, and {share:.0%} were cut off"
            means = "the policy runs on without an end"
            hint = "overlong_buffer_length, algorithm dr_grpo, or a reward function that pays for short completions"
            self._say("length", step - WINDOW + 1, step, saw, means, hint)

    # ---- what it says ----

    def _say(self, name: str, first: int, last: int, saw: str, means: str, hint: str) -> None:
        """Say a sign, unless it was said before; then only note how long it holds."""
        known = name in self.said
        self.said[name] = (self.said[name][0] if known else first), last
        if not known and together.is_first():
            steps = f"Step {first}" if first == last else f"Steps {first} to {last}"
            of_start = self._is_of_start(name)
            begun = "This run has been so from its first step" if of_start else "This run may have collapsed"
            logger.warning("%s. %s: %s. It means: %s. Try %s", begun, steps, saw, means, hint)

    def _is_of_start(self, name: str) -> bool:
        """Whether a sign has held in every step since the first, before anything was learned: then it is one of the
        settings or of the questions. Of a resumed run that is not known."""
        streak = self._streaks.get(name)
        return name in ("equal rewards", "all cut off") and streak is not None and streak.first == 1

    def summary(self) -> str:
        """All that was said, in one line; "" where nothing was."""
        if not self.said:
            return ""
        said = ", ".join(f"{name} (steps {first} to {last})" for name, (first, last) in self.said.items())
        if all(map(self._is_of_start, self.said)):
            return f"This run has been so from its first step: {said}. See the warnings before"
        hint = "checkpoints of earlier steps are as good as they were; do not use the last one unseen"
        return f"This run shows signs of a collapse: {said}. See the warnings before; {hint}"
