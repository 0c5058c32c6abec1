"""Shows where the time of a step goes: the seconds of its parts, and a Chrome or Perfetto trace of one step."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import device
from .memory import noting_what_takes_less
from .phases import during

logger = logging.getLogger(__name__)

FOLDER = "profile"
PARTS = ("rollout", "reference", "old policy", "scoring", "learning")


_seconds: dict[str, float] = {}  # of each part, since they were taken


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A context that shows as a span in the trace and as a row of the table, and to whoever watches the run, and whose
    seconds are counted. It costs microseconds."""
    assert name in PARTS, name
    started = time.perf_counter()
    with record_function(f"tunix_torch.{name}"), during(name), noting_what_takes_less(name):
        yield
    _seconds[name] = _seconds.get(name, 0.0) + time.perf_counter() - started


def take_seconds() -> dict[str, float]:
    """The seconds of each part since this was called before, as `rollout_seconds` and the like.

    Only those of the CPU are known: an accelerator may be at work on one part when the next one begins. It has ended
    where Python waits for it, which is at the end of the rollout and of learning.
    """
    taken = {f"{name.replace(' ', '_')}_seconds": seconds for name, seconds in _seconds.items()}
    _seconds.clear()
    return taken


class ProfileStep(TrainerCallback):
    """Records optimizer step number `step` (from 1) to `output_dir/profile/step-N.json`.

    The file opens in https://ui.perfetto.dev or chrome://tracing. On XLA it shows what the CPU does. What the device
    does is written beside it, in the form that TensorBoard's profile plugin reads. The table has the CPU's time: an
    accelerator may still be at work on one part when the next one begins.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.profile: profile | None = None
        self.done = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step + 1 == self.step and state.is_world_process_zero:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.KIND == "cuda")
            device.start_trace(Path(args.output_dir) / FOLDER)
            self.profile = profile(activities=activities)
            self.profile.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.profile is None:
            return
        device.wait()
        self.profile.stop()
        device.stop_trace()
        file = Path(args.output_dir) / FOLDER / f"step-{self.step}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(file))
        events = self.profile.events()
        total = (max(event.time_range.end for event in events) - min(event.time_range.start for event in events)) / 1e6
        lines = []
        for name in PARTS:
            spans = [e for e in events if e.name == f"tunix_torch.{name}" and e.device_type == DeviceType.CPU]
            seconds = sum(span.time_range.elapsed_us() for span in spans) / 1e6
            lines.append(f"  {name:<12} {seconds:8.3f} s  {seconds / total:4.0%}")
        logger.warning("Step %d took %.3f s under the profiler:\n%s\n%s", self.step, total, "\n".join(lines), file)
        self.profile, self.done = None, True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.done and state.is_world_process_zero:
            logger.warning("profile_step=%d was not recorded: this run ended at step %d", self.step, state.global_step)
