"""Run a job of the cross-check: record this library's learning steps, and compare them with Tunix's or TRL's."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..model.loading import load_base_model
from .cases import CASES, Case
from .compare import PARAMETERS, Row, compare_step, count_of_steps, largest_difference, tunix_updates
from .differences import DIFFERENCES
from .job import Job
from .ours import ALPHA, RANK, lora_of, make_trainer, record_steps, saved_model
from .preferences import rows_of_preferences
from .tunix_lora import TunixPolicy

# TRL has nothing to compare with the other cases (k1, k2, the clamp), or they would repeat one of these.
TRL_CASES = (
    "defaults",
    "old",
    "two passes",
    "token-mean",
    "row-scale",
    "row-sum",
    "temperature 0.9",
    "gspo",
    "dual clip",
    "dapo",
    "dr_grpo",
    "rloo",
    *(case.name for case in CASES if not case.in_tunix),
)


def rows_of(job: Job) -> Iterator[Row]:
    """Run a job, and return its lines of the table one by one."""
    if job.kind == "tunix":
        cases = [case for case in CASES if case.in_tunix and (job.cases is None or case.name in job.cases)]
        yield from rows_of_family(job.family, cases, job.chain)
    elif job.kind == "trl":
        yield from rows_of_trl(job.family, TRL_CASES if job.cases is None else job.cases)
    elif job.kind == "preferences":
        yield from rows_of_preferences()
    else:
        for difference in DIFFERENCES:
            yield from difference()


def rows_of_family(family: str, cases: Sequence[Case], chain: int) -> Iterator[Row]:
    """Compare with Tunix, in each case: every quantity of one step, and the parameters after 1 and `chain` steps."""
    with saved_model(family) as folder:
        tunix, base = None, load_base_model(str(folder))
        for case in cases:
            trainer = make_trainer(folder, case)
            if tunix is None:
                shapes = {name: tuple(weights.shape) for name, weights in lora_of(trainer).items()}
                tunix = TunixPolicy(folder, base.config, shapes, RANK, ALPHA)
            records = record_steps(trainer, case, chain)
            name = f"{family}, {case.name}"
            yield from compare_step(name, records[0], trainer.args, tunix, base)
            ours = [record.lora for record in records[1:]] + [lora_of(trainer)]
            for number, theirs in enumerate(tunix_updates(records, trainer.args, tunix), start=1):
                if number in (1, chain):
                    gaps = [largest_difference(ours[number - 1][matrix], theirs[matrix]) for matrix in theirs]
                    difference = float(np.max(gaps))  # NaN when any is NaN, unlike Python's max
                    yield Row(name, f"parameters after {count_of_steps(number)}", difference, PARAMETERS)


def rows_of_trl(family: str, cases: Sequence[str] = TRL_CASES) -> Iterator[Row]:
    """Compare with TRL, in the cases that it shares. No completion is empty, since TRL would count it as a row."""
    from .trl_side import compare_advantages, compare_with_trl

    with saved_model(family) as folder:
        if cases is TRL_CASES:
            yield from compare_advantages(f"TRL, {family}", folder)
        for case in CASES:
            if case.name in cases:
                trainer = make_trainer(folder, case)
                (record,) = record_steps(trainer, case, 1, empty=False)
                yield from compare_with_trl(f"TRL, {family}, {case.name}", folder, record, trainer.args)
