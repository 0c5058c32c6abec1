"""Find the best mesh and micro-batch for a job on a TPU slice: plan every possible pair, and sort the plans."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import Job
from .quick import quick_plan
from .report import as_dict

PACKAGES = Path(__file__).parent.parent.parent  # where `tunix_torch` lies, for the plans' own processes
HOPELESS = -0.5  # spare part of HBM by arithmetic under which a pair is not worth compiling


@dataclass
class Candidate:
    """A mesh and a micro-batch, and the plan of the job with them."""

    mesh_shape: str
    micro_batch_size: int
    fits: bool
    spare_fraction: float | None  # see `Plan`; None when a graph does not compile
    step_seconds: float | None  # the least time of a training step; None when a graph does not compile
    graphs: list[dict[str, Any]]  # as in the JSON of its plan
    error: str | None = None  # the reason when the plan could not be made

    @property
    def sort_key(self) -> tuple:
        """Candidates that fit come first, fastest first; then those that do not, by the HBM that is missing.

        After them come those with a graph that does not compile, and last those without a plan.
        """
        if self.error is not None:
            return (3, 0)
        if self.fits:
            return (0, self.step_seconds)
        return (1, -self.spare_fraction) if self.spare_fraction is not None else (2, 0)


def search(job: Job, argv: Sequence[str], quick: bool, say: Callable[[str], None]) -> list[Candidate]:
    """Plan the job on every mesh of the slice with every micro-batch that the group size allows, best first.

    An impossible mesh or micro-batch is left out, and `say` is called with the reason.

    Args:
        argv: the job's flags, for the plans that compile. Each of those runs in a process of its own, since a process
            cannot change its mesh.
        quick: plan by arithmetic only, and compile nothing.
        say: is called with a line of text about each pair.
    """
    found, settings = [], list(_settings(job, say))
    for number, (mesh_shape, micro) in enumerate(settings, start=1):
        model = dataclasses.replace(job.model, mesh_shape=mesh_shape, mesh_axes="fsdp,tp")
        args = dataclasses.replace(job.args, micro_batch_size=micro)
        name = f"{number} of {len(settings)}: mesh {mesh_shape}, micro-batches of {micro}"
        try:
            plan = quick_plan(Job(model, args, job.topology))
        except ValueError as error:
            say(f"{name} left out: {error}")
            continue
        candidate = Candidate(
            mesh_shape, micro, plan.fits, plan.spare_fraction, plan.step_seconds, as_dict(plan)["graphs"]
        )
        if not quick and plan.spare_fraction < HOPELESS:
            say(f"{name}: far too large by arithmetic, not compiled")
        elif not quick:
            say(name)
            candidate = _compiled(candidate, argv, job.topology.name)
        found.append(candidate)
    return sorted(found, key=lambda candidate: candidate.sort_key)


def _settings(job: Job, say: Callable[[str], None]) -> Iterator[tuple[str, int]]:
    chips, group = job.topology.num_chips, job.args.num_completions_per_prompt
    prompts = job.args.per_device_train_batch_size
    for tp in (2**i for i in range(9) if 2**i <= chips):
        fsdp = chips // tp
        if prompts % fsdp:
            say(f"mesh {fsdp},{tp} left out: per_device_train_batch_size={prompts} is no multiple of fsdp={fsdp}")
            continue
        whole = [n for n in range(1, job.rows + 1) if group % n == 0 or (n % group == 0 and job.rows % n == 0)]
        uneven = [str(micro) for micro in whole if micro % fsdp]
        if uneven:
            say(f"mesh {fsdp},{tp}, micro-batches of {', '.join(uneven)} left out: no multiples of fsdp={fsdp}")
        for micro in whole:
            if micro % fsdp == 0:
                yield f"{fsdp},{tp}", micro


def _compiled(candidate: Candidate, argv: Sequence[str], topology: str) -> Candidate:
    with tempfile.TemporaryDirectory(prefix="plan-tpu-") as folder:
        result = os.path.join(folder, "plan.json")
        command = [sys.executable, "-m", "tunix_torch.cli", "plan", *argv, "--topology", topology, "--json", result]
        command += ["--mesh_shape", candidate.mesh_shape, "--mesh_axes", "fsdp,tp"]
        command += ["--micro_batch_size", str(candidate.micro_batch_size)]
        environment = os.environ | {"PYTHONPATH": f"{PACKAGES}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        ended = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=None)
        if not os.path.isfile(result):  # written whether the job fits or not
            error = f"the plan ended with {ended.returncode}"
            return dataclasses.replace(
                candidate, fits=False, spare_fraction=None, step_seconds=None, graphs=[], error=error
            )
        plan = json.loads(Path(result).read_text())
    return dataclasses.replace(
        candidate,
        fits=plan["fits"],
        spare_fraction=plan["spare_fraction"],
        step_seconds=plan["step_seconds_at_least"],
        graphs=plan["graphs"],
    )


def lines_of(candidates: Sequence[Candidate]) -> list[str]:
    """Return the table of the candidates as lines of text."""
    lines = [f"{'mesh (fsdp,tp)':<16}{'micro-batch':>12}{'HBM to spare':>14}{'a step at least':>17}"]
    for candidate in candidates:
        if candidate.error is not None:
            lines.append(f"{candidate.mesh_shape:<16}{candidate.micro_batch_size:>12}  failed: {candidate.error}")
            continue
        spare = "-" if candidate.spare_fraction is None else f"{candidate.spare_fraction:.0%}"
        missing = candidate.spare_fraction is None or candidate.spare_fraction < 0
        seconds = "does not fit" if missing else f"{candidate.step_seconds:.1f} s" if candidate.fits else "may not fit"
        lines.append(f"{candidate.mesh_shape:<16}{candidate.micro_batch_size:>12}{spare:>14}{seconds:>17}")
    return lines
