"""Run cases: record this library's steps and compare them with Tunix's and TRL's."""

from collections.abc import Iterator, Sequence

import numpy as np

from ..model.loading import load_base_model
from .cases import CASES, Case
from .compare import PARAMETERS, Row, compare_step, largest_difference, steps, tunix_updates
from .differences import DIFFERENCES
from .job import Job
from .ours import ALPHA, RANK, lora_of, make_trainer, record_steps, saved_model
from .tunix_side import TunixPolicy

# The others have no like in TRL (k1, k2, the clamp) or are one of these again.
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
)


def rows_of(job: Job) -> Iterator[Row]:
    """A job's rows, one by one."""
    if job.kind == "tunix":
        yield from rows_of_family(job.family, [c for c in CASES if job.cases is None or c.name in job.cases], job.chain)
    elif job.kind == "trl":
        yield from rows_of_trl(job.family)
    else:
        for difference in DIFFERENCES:
            yield from difference()


def rows_of_family(family: str, cases: Sequence[Case], chain: int) -> Iterator[Row]:
    """Each case on one family's model: one step, quantity by quantity, then parameters after 1 and `chain` steps."""
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
                    difference = float(np.max(gaps))  # not a number when any is not, unlike Python's max
                    yield Row(name, f"parameters after {steps(number)}", difference, PARAMETERS)


def rows_of_trl(family: str, cases: Sequence[str] = TRL_CASES) -> Iterator[Row]:
    """The cases that TRL shares, on batches without an empty completion, which TRL counts as a row."""
    from .trl_side import compare_with_trl

    with saved_model(family) as folder:
        for case in CASES:
            if case.name in cases:
                trainer = make_trainer(folder, case)
                (record,) = record_steps(trainer, case, 1, empty=False)
                yield from compare_with_trl(f"TRL, {family}, {case.name}", folder, record, trainer.args)
