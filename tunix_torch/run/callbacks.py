"""Callbacks of a job: what precedes training, metrics.jsonl, the diagnosis so far, a checkpoint when it must stop."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config.files import write_whole
from ..report.diagnosis import diagnose
from ..report.findings import in_one_line
from ..report.metrics import METRICS_FILE
from ..report.record import RunRecord
from ..runtime import together


class BeforeTraining(TrainerCallback):
    """Calls a function when model, data, optimizer and schedule are made and the checkpoint is loaded.

    Whatever fails while these are made fails before the function is called.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.function()


# A machine gets one of these before it is taken away; a terminal sends SIGHUP as it closes, and SIGINT at Ctrl-C.
STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGINT)

TWICE = 0.5  # seconds within which the same Ctrl-C comes again: torchrun and `timeout` pass it on to all processes


class SaveOnSignal(TrainerCallback):
    """On a signal that asks to end, finishes the step or the evaluation, saves a checkpoint and stops training.

    A second Ctrl-C is again what it was before training: it stops at once.

    Args:
        anyone: takes whether this process got the signal, and returns whether any process of the run did. All of them
            must stop at the same step.
    """

    def __init__(self, anyone: Callable[[bool], bool]) -> None:
        self.anyone, self.stopped = anyone, False
        self.told: signal.Signals | None = None  # the signal that this process got
        self.before: dict[signal.Signals, Any] = {}  # the handlers that were there before training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # one that is ignored stays so, as nohup ignores SIGHUP
        numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        self.before, self.process = {number: signal.signal(number, self._handle) for number in numbers}, os.getpid()

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:  # a process that loads data was forked from this one, and goes on
            return
        if self.told is not None:
            if number == signal.SIGINT and time.monotonic() - self.told_at > TWICE:
                signal.signal(number, self.before[number])
                signal.raise_signal(number)
            return
        self.told, self.told_at = signal.Signals(number), time.monotonic()
        said = f"\n{signal_name(number)}: after this step and its evaluation the run saves a checkpoint and stops"
        if number == signal.SIGINT:
            said += "; Ctrl-C again stops at once"
        if together.is_first():
            with contextlib.suppress(RuntimeError, OSError):  # it came in the middle of a print; the terminal has gone
                print(said, file=sys.stderr, flush=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.anyone(self.told is not None) and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step > 0:  # at step 0 there is nothing to keep yet: the first step follows
            self.on_step_end(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back to those who had them before training. It may be called twice."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


def signal_name(number: int) -> str:
    """What the user knows a signal by."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class MetricsFile(TrainerCallback):
    """Appends every log to `output_dir/metrics.jsonl`, as one JSON object a line with its `step`.

    A resumed run first writes the lines of the steps up to its checkpoint anew, from the state that the checkpoint
    holds. So the file reads as if the run had not stopped, whatever had become of it.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rewrite_metrics(args.output_dir, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / METRICS_FILE, "a") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class FindingsSoFar(TrainerCallback):
    """Says after an evaluation or a checkpoint what the diagnosis finds in the metrics so far, each finding
    once a start."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ends = state.global_step >= state.max_steps or control.should_training_stop  # which says it itself
        if not state.is_world_process_zero or ends:
            return
        found = diagnose(RunRecord(folder=Path(args.output_dir), rows=state.log_history))
        names = [finding.name for finding in found if finding.name not in self.said]
        if names:
            self.said.update(names)
            print(f"Diagnosis so far: {in_one_line(names, args.output_dir)}", flush=True)

    on_evaluate = on_save


def rewrite_metrics(output_dir: str | Path, state: TrainerState) -> None:
    """Write a run's metrics anew, from the logs that its state holds."""
    path = Path(output_dir) / METRICS_FILE
    if state.is_world_process_zero and (path.exists() or state.log_history):
        rows = [{"step": row["step"], **row} for row in state.log_history]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def complete_metrics(output_dir: str | Path, state: TrainerState) -> None:
    """Keep what a finished run logged after its last checkpoint, and write its metrics anew if they are damaged."""
    path = Path(output_dir) / METRICS_FILE
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for line in lines[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    known = len(state.log_history)
    if rows[:known] == state.log_history and all(row["step"] == state.global_step for row in rows[known:]):
        state.log_history += rows[known:]
    if rows != state.log_history or lines[len(rows) :] != [b""]:
        rewrite_metrics(output_dir, state)
