"""Feed the same batches to Google's Tunix on JAX and to this library, and print how far apart they are."""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..crosscheck.job import Job, quiet, run_job
from ..report.record import CROSSCHECK_FILE
from .script import Parser, check_output_file, choose_device

if TYPE_CHECKING:
    from ..crosscheck.compare import Row

EXAMPLES = """
COMMAND                                   # every case on every model family
COMMAND --families gemma3-1 --cases gspo
COMMAND --from-run outputs                # replay a run made with train.py --save_batches 3
"""

NEEDED = {"jax": "jax==0.10.2", "tunix": "google-tunix==0.1.7"}
TRL = "trl==1.16.0"
CHAIN = 20  # AdamW steps
TRL_FAMILIES = ("gemma3-2", "gemma2", "gemma4")


def parse_args(argv: Sequence[str], command: str) -> argparse.Namespace:
    """Which cases, of which models, or which run.

    Raises:
        ValueError: an unknown flag, or a file that can't be written.
    """
    parser = Parser(command, f"{__doc__}\n{EXAMPLES}")
    parser.add_argument("--from-run", "--from_run", type=Path, help="a run's output_dir, made with --save_batches")
    also = (
        "and then without TRL, preferences and the differences on purpose; an unknown name lists those that there are"
    )
    parser.add_argument("--families", nargs="+", help=f"only these model families, {also}")
    parser.add_argument("--cases", nargs="+", help=f"only these cases, {also}")
    kept = f"also write the table to this file (default with --from-run: {CROSSCHECK_FILE} there, for the run's report)"
    parser.add_argument("--json", type=Path, help=kept)
    args = parser.parse_args(argv)
    if args.json is None and args.from_run and args.from_run.is_dir():
        args.json = args.from_run / CROSSCHECK_FILE
    check_output_file("json", args.json)
    if args.from_run and (args.families or args.cases):
        raise ValueError("from_run: a run has its own model and settings; leave out --families and --cases")
    return args


def check_installed() -> None:
    """Raises ValueError when a package of Tunix's side is missing, saying what to install."""
    missing = [what for module, what in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"the cross-check needs Google's Tunix: pip install {' '.join(missing)}")


def choose(names: Sequence[str] | None, known: Sequence[str], option: str) -> list[str]:
    """The chosen names in the order of `known`. All of them when none is chosen."""
    for name in names or []:
        if name not in known:
            raise ValueError(f"{option}={name!r}: choose among {', '.join(known)}")
    return [name for name in known if names is None or name in names]


def rows_of_cases(families: Sequence[str] | None, cases: Sequence[str] | None) -> Iterator["Row"]:
    """Every chosen case on every chosen family; when nothing was chosen, also TRL, preferences and distillation, and
    the differences on purpose.

    Jobs of several families run side by side, one thread each: small models keep no more busy.
    """
    from ..crosscheck.cases import CASES, FAMILIES
    from ..crosscheck.run import rows_of

    cases = choose(cases, [case.name for case in CASES], "cases") if cases else None
    in_tunix = {case.name for case in CASES if case.in_tunix}
    chosen = choose(families, FAMILIES, "families")
    jobs = [Job("tunix", family, cases, CHAIN) for family in chosen if cases is None or in_tunix & set(cases)]
    only_in_trl = [case for case in cases or [] if case not in in_tunix]
    has_trl = importlib.util.find_spec("trl") is not None
    if only_in_trl:
        if not has_trl:
            raise ValueError(f"cases={only_in_trl[0]!r}: only TRL has it: pip install {TRL}")
        jobs += [Job("trl", family, only_in_trl) for family in chosen if family in TRL_FAMILIES]
    if families is None and cases is None:
        if has_trl:
            jobs += [Job("trl", family) for family in TRL_FAMILIES]
        else:
            print("trl is not installed: its opinion is left out")
        jobs += [Job("preferences"), Job("differences")]
    if len(jobs) == 1:
        yield from rows_of(jobs[0])
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_job, job) for job in jobs]
        try:
            for future in tqdm(running, desc="Cross-check", unit="job"):
                yield from future.result()
        except BaseException:  # on Ctrl-C too, jobs that have not begun are cancelled
            pool.shutdown(cancel_futures=True)
            raise


def as_dict(row: "Row") -> dict[str, object]:
    """A row for JSON, which knows no infinity and no NaN."""
    finite = math.isfinite(row.difference)
    return {**vars(row), "difference": row.difference if finite else None, "verdict": row.verdict}


def show(row: "Row") -> None:
    print(
        f"{row.case:<30} {row.quantity:<28} {row.difference:>9.1e} {row.tolerance:>9.1e}  {row.verdict}"
        + (f"  ({row.note})" if row.note else ""),
        flush=True,
    )


def summarise(rows: Sequence["Row"]) -> None:
    """The largest difference of each quantity, and how it went."""
    print(f"\n{'quantity':<28} {'comparisons':>11} {'largest difference':>19} {'tolerance':>10}  verdict")
    for quantity in dict.fromkeys(row.quantity for row in rows):
        among = [row for row in rows if row.quantity == quantity]
        worst = max(among, key=lambda row: row.difference / row.tolerance if row.tolerance else row.difference)
        verdict = "fail" if any(row.verdict == "fail" for row in among) else "pass"
        print(f"{quantity:<28} {len(among):>11} {worst.difference:>19.1e} {worst.tolerance:>10.1e}  {verdict}")


def conclude(rows: Sequence["Row"], seconds: float) -> bool:
    """Print in one paragraph how it went. Returns whether every comparison is within its tolerance."""
    failed = [row for row in rows if row.verdict == "fail"]
    if not failed:
        print(f"\n{len(rows)} comparisons, all within tolerance ({seconds:.0f} s)")
        return True
    worst = max(failed, key=lambda row: row.difference / max(row.tolerance, 1e-12) if row.difference >= 0 else 1e99)
    print(
        f"\n{len(failed)} of {len(rows)} comparisons fall short ({seconds:.0f} s). "
        f"Worst: {worst.quantity} of {worst.case}, {worst.difference:.2g} against {worst.tolerance:.1g}. "
        f"First to differ: {failed[0].quantity} of {failed[0].case}."
    )
    return False


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Compare, print each comparison and a summary; exit code 1 where one falls short.

    Args:
        argv: the flags; None: those of this process.
        command: what the user has called; None: `python -m crosscheck`.

    Raises:
        ValueError: a flag, a run or a package that is missing.
    """
    args = parse_args(sys.argv[1:] if argv is None else argv, command or "python -m crosscheck")
    check_installed()
    choose_device(["--device=cpu"])  # where both sides compute
    quiet()
    from ..crosscheck.replay import replay

    started = time.perf_counter()
    rows = []
    try:
        for row in replay(args.from_run) if args.from_run else rows_of_cases(args.families, args.cases):
            if not rows:
                print(f"{'case':<30} {'quantity':<28} {'differ by':>9} {'tolerance':>9}  verdict")
            show(row)
            rows.append(row)
    finally:  # also what there is after Ctrl-C
        if args.json and rows:
            args.json.write_text(json.dumps({"rows": list(map(as_dict, rows))}, indent=1) + "\n")
    summarise(rows)
    if not conclude(rows, time.perf_counter() - started):
        sys.exit(1)
