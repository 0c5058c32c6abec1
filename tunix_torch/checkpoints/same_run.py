"""What a resumed run must have in common with the run that left its checkpoint: settings, rows, rewards and weights."""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..config.files import load_config, write_whole
from ..config.grpo import GRPOConfig
from ..config.saved import (
    ARE_MESSAGES,
    BASE_WEIGHTS,
    RUN_FILE,
    changed_settings,
    refuse_changes,
    saved_settings,
    settings_of,
)
from ..data.fingerprint import are_messages, fingerprint_of
from ..runtime import together

logger = logging.getLogger(__name__)

OPTIMIZER = ("initial_lr", "betas", "eps", "weight_decay", "momentum")  # settings that its groups of weights hold


class RunFacts:
    """Facts of a run that decide what is learned. They are written into each checkpoint, and compared on resuming.

    Args:
        args: the settings of the trainer.
        rows: what it trains on, see `data/fingerprint.py`.
        base_weights: the weights that no checkpoint holds, see `model/fingerprint.py`.

    Attributes:
        settings: those of the whole job, where `train` runs it; None: those in `args`.
        reward_funcs: the names of the reward functions.
    """

    def __init__(self, args: GRPOConfig, rows: Any, base_weights: str | None) -> None:
        self.settings: dict[str, Any] | None = None
        self.reward_funcs: list[str] = []
        self._changed: dict[str, tuple[Any, Any]] = {}  # what was allowed to change
        self._args, self._rows, self._base_weights = args, rows, base_weights

    @functools.cached_property
    def _training_data(self) -> str | None:
        """Only a run that saves or resumes needs it."""
        return fingerprint_of(self._rows)

    @functools.cached_property
    def questions_are_messages(self) -> bool:
        """Whether the questions of the training rows are messages, which the chat template renders in any case."""
        return are_messages(self._rows)

    def know_rows(self, are_compared: bool) -> None:
        """Look at the rows now: of a stream, before it is read.

        Args:
            are_compared: whether a checkpoint will hold what is compared of them.
        """
        _ = self.questions_are_messages
        if are_compared:
            _ = self._training_data

    def _others(self) -> dict[str, Any]:
        """What is compared besides settings. None: it is not known."""
        return {
            "training_data": self._training_data,
            BASE_WEIGHTS: self._base_weights,
            "reward_functions": self.reward_funcs if self._args.use_grpo else None,
            "processes": together.count(),
        }

    def known_settings(self) -> dict[str, Any]:
        """The settings of the run: those of the whole job, or of the trainer alone."""
        return settings_of(self._args) if self.settings is None else self.settings

    def save(self, folder: str | Path, is_checkpoint: bool) -> None:
        """Write into a folder how what was trained is asked and on which base, or of a checkpoint all facts."""
        others = self._others() if is_checkpoint else {BASE_WEIGHTS: self._base_weights}
        facts = {"settings": self.known_settings(), **others, ARE_MESSAGES: self.questions_are_messages}
        write_whole(Path(folder) / RUN_FILE, json.dumps(facts, indent=1, default=str) + "\n")

    def check(self, checkpoint: str | Path) -> None:
        """Compare the facts with those of the run that left a checkpoint, before anything is loaded from it.

        Of a checkpoint from before these facts were written, the settings in its run's folder are compared, if any.

        Raises:
            ValueError: one differs, and `allow_changes` does not name it.
        """
        earlier, file = saved_settings(checkpoint), Path(checkpoint) / RUN_FILE
        changed = {} if earlier is None else changed_settings(self.known_settings(), earlier)
        if file.is_file():
            now, then = self._others(), load_config(file)
            known = [name for name in now if None not in (now[name], then.get(name))]
            changed |= {name: (now[name], then[name]) for name in known if now[name] != then[name]}
        elif earlier is None and together.is_first():
            what = "settings, data and weights can't be compared with those of the run that left it"
            logger.warning("%s has no %s: %s", checkpoint, RUN_FILE, what)
        refuse_changes(changed, checkpoint, self._args.allow_changes)
        self._changed = changed
        self._say_length(checkpoint, earlier or {})
        if changed and together.is_first():
            shown = ", ".join(f"{name}={now!r} (was {then!r})" for name, (now, then) in changed.items())
            logger.warning(
                "Resuming from %s with changes of what is learned, as allow_changes says: %s", checkpoint, shown
            )

    def _say_length(self, checkpoint: str | Path, earlier: dict[str, Any]) -> None:
        """Say where a run has another length than it had, which a resumed run may: its schedule is another one, too."""
        names = ["max_steps"] if self._args.max_steps > 0 else ["max_steps", "num_train_epochs"]
        lengths = {name: getattr(self._args, name) for name in names}
        other = {name: now for name, now in lengths.items() if earlier.get(name, now) != now}
        if other and self._args.lr_scheduler_type not in ("constant", "constant_with_warmup") and together.is_first():
            shown = ", ".join(f"{name}={now:g} (was {earlier[name]:g})" for name, now in other.items())
            what = "the learning rate goes on along the schedule of the new length"
            logger.warning("Resuming from %s with %s: %s", checkpoint, shown, what)

    @contextlib.contextmanager
    def in_force(self, optimizer: Optimizer, scheduler: LRScheduler) -> Iterator[None]:
        """When the block has loaded the state of optimizer and schedule, put into them the settings that were allowed
        to change: the state holds those of the earlier run."""
        if not self._changed:
            yield
            return
        given = [
            {name: value for name, value in group.items() if name in OPTIMIZER} for group in optimizer.param_groups
        ]
        by_step = isinstance(scheduler, LambdaLR)
        rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
        yield
        loaded = [group["lr"] for group in optimizer.param_groups]
        for group, own in zip(optimizer.param_groups, given, strict=True):
            group.update(own)
        if by_step:
            scheduler.base_lrs = rates
            factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
            loaded = [rate * factor for rate, factor in zip(rates, factors, strict=True)]
        elif "learning_rate" in self._changed:  # a schedule that follows a metric goes on from the new rate
            loaded = rates
        for group, rate in zip(optimizer.param_groups, loaded, strict=True):
            group["lr"] = rate
        scheduler._last_lr = loaded
