"""Where the time of a step goes: a Chrome / Perfetto trace of one optimizer step, and its parts as a table."""

import logging
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import device

logger = logging.getLogger(__name__)

FOLDER = "profile"
PARTS = ("rollout", "scoring", "reference", "learning")


def span(name: str) -> record_function:
    """A context that shows as a span in the trace, and as a row of the table; costs microseconds."""
    assert name in PARTS, name
    return record_function(f"tunix_torch.{name}")


class ProfileStep(TrainerCallback):
    """Records optimizer step number `step` (from 1) to `output_dir/profile/step-N.json`.

    Open it in https://ui.perfetto.dev or chrome://tracing. On XLA it shows what the host does; what the device does is
    written beside it as TensorBoard's profile plugin reads it.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.profile: profile | None = None

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
            seconds = sum(e.time_range.elapsed_us() for e in events if e.name == f"tunix_torch.{name}") / 1e6
            lines.append(f"  {name:<10} {seconds:8.3f} s  {seconds / total:4.0%}")
        logger.warning("Step %d took %.3f s under the profiler:\n%s\n%s", self.step, total, "\n".join(lines), file)
        self.profile = None
