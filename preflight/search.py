"""Which mesh and which micro-batch? Plan each that can be, and put the best first."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .plan import Job
from .quick import quick_plan

ROOT = Path(__file__).parent.parent
HOPELESS = -0.5  # of HBM to spare by arithmetic: not worth compiling


@dataclass
class Candidate:
    """A mesh and a micro-batch, and what came of them."""

    mesh_shape: str
    micro_batch_size: int
    fits: bool
    spare_fraction: float | None  # None: a graph does not compile
    step_seconds: float | None

    @property
    def order(self) -> tuple:
        """Those that fit first, then by the bound of a step; the others by what is missing."""
        if self.fits:
            return (0, self.step_seconds)
        return (1, -self.spare_fraction) if self.spare_fraction is not None else (2, 0)


def search(job: Job, argv: Sequence[str], quick: bool, say: Callable[[str], None]) -> list[Candidate]:
    """Plan the job on every mesh of the slice with every micro-batch that the group size allows, best first.

    Args:
        argv: the job's flags; each plan that compiles runs in a process of its own, which has one mesh for life.
        quick: by arithmetic only.
        say: is told what is going on.
    """
    found = []
    for mesh_shape, micro in _settings(job):
        model = dataclasses.replace(job.model, mesh_shape=mesh_shape, mesh_axes="fsdp,tp")
        args = dataclasses.replace(job.args, micro_batch_size=micro)
        try:
            plan = quick_plan(Job(model, args, job.topology))
        except ValueError as error:
            say(f"mesh {mesh_shape}, micro-batches of {micro}: {error}")
            continue
        candidate = Candidate(mesh_shape, micro, plan.fits, plan.spare_fraction, plan.step_seconds)
        if not quick and plan.spare_fraction < HOPELESS:
            say(f"mesh {mesh_shape}, micro-batches of {micro}: far too large by arithmetic, not compiled")
        elif not quick:
            say(f"mesh {mesh_shape}, micro-batches of {micro}:")
            candidate = _compiled(candidate, argv, job.topology.name)
        found.append(candidate)
    return sorted(found, key=lambda candidate: candidate.order)


def _settings(job: Job) -> Iterator[tuple[str, int]]:
    chips, group = job.topology.num_chips, job.args.num_completions_per_prompt
    for tp in (2**i for i in range(9)):
        fsdp = chips // tp
        if tp > chips or job.args.per_device_train_batch_size % fsdp:
            continue
        for micro in range(1, job.rows + 1):
            whole = group % micro == 0 or (micro % group == 0 and job.rows % micro == 0)
            if whole and micro % fsdp == 0:
                yield f"{fsdp},{tp}", micro


def _compiled(candidate: Candidate, argv: Sequence[str], topology: str) -> Candidate:
    with tempfile.TemporaryDirectory(prefix="plan-tpu-") as folder:
        result = os.path.join(folder, "plan.json")
        command = [sys.executable, "plan_tpu.py", *argv, "--topology", topology, "--json", result]
        command += ["--mesh_shape", candidate.mesh_shape, "--mesh_axes", "fsdp,tp"]
        command += ["--micro_batch_size", str(candidate.micro_batch_size)]
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=None)
        if ended.returncode:
            raise ValueError(f"mesh_shape={candidate.mesh_shape!r} could not be planned, see above")
        plan = json.loads(Path(result).read_text())
    return dataclasses.replace(
        candidate,
        fits=plan["fits"],
        spare_fraction=plan["spare_fraction"],
        step_seconds=plan["step_seconds_at_least"],
    )


def lines_of(candidates: Sequence[Candidate]) -> list[str]:
    """The table."""
    lines = [f"{'mesh (fsdp,tp)':<16}{'micro-batch':>12}{'HBM to spare':>14}{'a step at least':>17}"]
    for candidate in candidates:
        spare = "-" if candidate.spare_fraction is None else f"{candidate.spare_fraction:.0%}"
        missing = candidate.spare_fraction is None or candidate.spare_fraction < 0
        seconds = "does not fit" if missing else f"{candidate.step_seconds:.1f} s" if candidate.fits else "may not fit"
        lines.append(f"{candidate.mesh_shape:<16}{candidate.micro_batch_size:>12}{spare:>14}{seconds:>17}")
    return lines
