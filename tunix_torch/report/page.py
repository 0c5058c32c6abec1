"""Writes the report of a run, or of two runs side by side: one page of HTML that needs no network and no script."""

import functools
import logging
import math
import os
import shlex
from pathlib import Path
from typing import Any

from ..config.files import write_whole
from ..config.recipes import whose_defaults
from ..config.saved import config_file
from ..data.visible import visible
from .about import facts_of
from .completions import Completion, steps_of
from .diagnosis import diagnose, without_findings
from .looked_for import curves_not_there, looked_for
from .panels import distribution, mean_seconds, overlaid, panels_of
from .pictures import can_draw, pictures_of
from .record import RunRecord, read_run
from .samples import best_and_worst, most_changed, same_questions
from .settings import command_of, command_with_file, differing, not_at_default
from .verdict import rivals, verdict_of

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
COMPARISON_FILE = "comparison.html"
MARK = "<!doctype html>\n<!-- written by tunix-torch report -->"  # how a page begins that may be written anew
MOST_TEXT = 1500  # characters of a prompt or a completion that are shown


def write_report(output_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        output: the file; None: REPORT_FILE in the run's folder.

    Returns:
        the file.

    Raises:
        ValueError: the folder holds no run, a file in it is damaged, or the page can't be written there.
    """
    run = read_run(output_dir)
    file = _target(Path(output) if output is not None else run.folder / REPORT_FILE)
    write_whole(file, report_of(run))
    return file


def write_comparison(output_dir: str | Path, other: str | Path, output: str | Path | None = None) -> Path:
    """Write a page that compares a run with another one. See `write_report`; by default it is COMPARISON_FILE."""
    runs = read_run(output_dir), read_run(other, "other")
    file = _target(Path(output) if output is not None else runs[0].folder / COMPARISON_FILE)
    write_whole(file, comparison_of(*runs))
    return file


def write_report_of_ended_run(output_dir: str | Path) -> bool:
    """Write the report of a run that has just ended. Whatever fails in it does not make the run fail: a line says so.

    Args:
        output_dir: the run's folder, whose files are whole.

    Returns:
        whether it was written, so that everything in the folder could be read.
    """
    try:
        write_report(output_dir)
        return True
    except Exception as error:
        if os.environ.get("TUNIX_DEBUG") == "1":
            raise
        again = f"python report.py {shlex.quote(str(output_dir))} tries again"
        logger.warning("The report was not written: %s: %s. %s", type(error).__name__, error, again)
        return False


def _target(file: Path) -> Path:
    """The file to write, unless it is something else than a report.

    Raises:
        ValueError: its folder is missing, it is a folder, or a file that is no report.
    """
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"output={str(file)!r}: expected a file in a folder that exists")
    if file.exists():
        with open(file, "rb") as there:
            if there.read(len(MARK)) != MARK.encode():
                raise ValueError(f"output={str(file)!r}: is there already, and is no report; give another file")
    return file


def report_of(run: RunRecord) -> str:
    """The page about one run, as HTML."""
    counts, questions = same_questions(run.answers)
    best, worst = best_and_worst(run.completions)
    moves = distribution(run.completions)
    return _page(
        "report.html.jinja",
        run=run,
        title=f"Report on {run.name}",
        facts=facts_of(run),
        verdict=verdict_of(run),
        findings=diagnose(run),
        without_findings=without_findings(run),
        looked=looked_for(run),
        pictures=pictures_of(panels_of(run.rows)),
        not_there=curves_not_there(run),
        distribution=pictures_of([moves])[0] if moves is not None else None,
        counts=counts,
        questions=questions,
        evaluated=steps_of(run.answers),
        best=best,
        worst=worst,
        changed=most_changed(run.answers, questions),
        crosscheck=_crosscheck(run),
        settings=not_at_default(run.settings),
        whose_defaults="the defaults of {}{}".format(*whose_defaults(run.settings)),
        written_by=_called("report.py", run.folder),
        **_repeat(run),
    )


def comparison_of(one: RunRecord, other: RunRecord) -> str:
    """The page about two runs, as HTML."""
    names = (one.name, other.name) if one.name != other.name else (str(one.folder), str(other.folder))
    runs = [
        {
            "name": visible(name),
            "facts": facts_of(run),
            "verdict": verdict_of(run),
            "findings": diagnose(run),
            "without_findings": without_findings(run),
            "looked": looked_for(run),
            "not_there": curves_not_there(run),
            "seconds": mean_seconds(run.rows),
        }
        for name, run in zip(names, (one, other), strict=True)
    ]
    panels = overlaid([(run["name"], panels_of(record.rows)) for run, record in zip(runs, (one, other), strict=True)])
    headline, detail = rivals(*(run["verdict"] for run in runs), tuple(run["name"] for run in runs))
    return _page(
        "comparison.html.jinja",
        headline=headline,
        detail=detail,
        title=f"{runs[0]['name']} and {runs[1]['name']}",
        runs=runs,
        known=bool(one.settings and other.settings),
        settings=differing(one.settings, other.settings),
        pictures=pictures_of(panels),
        written_by=_called("report.py", one.folder, "--compare", other.folder),
    )


def _called(*words: str | Path) -> str:
    """A script with its arguments, as a shell takes it."""
    return visible(shlex.join(["python", *map(str, words)]))


def _repeat(run: RunRecord) -> dict[str, Any]:
    """The commands that repeat the run; None where its settings are not known."""
    if not run.settings:
        return {"command": None, "command_with_file": None}
    by_file = command_with_file(run.folder, config_file(run.folder).name)
    return {"command": visible(command_of(run.settings)), "command_with_file": visible(by_file)}


def _crosscheck(run: RunRecord) -> list[dict[str, Any]]:
    """Of each quantity of a cross-check, how many comparisons there were, how many failed, and the worst of them: the
    one that takes most of its tolerance, or that has no finite difference."""

    def excess(row: dict[str, Any]) -> float:
        return math.inf if row.get("difference") is None else row["difference"] / max(row["tolerance"], 1e-300)

    found = []
    for quantity in dict.fromkeys(row["quantity"] for row in run.crosscheck):
        rows = [row for row in run.crosscheck if row["quantity"] == quantity]
        worst = max(rows, key=excess)
        failed = sum(row["verdict"] == "fail" for row in rows)
        numbers = {"worst": worst.get("difference"), "tolerance": worst["tolerance"]}
        found.append({"name": visible(quantity), "count": len(rows), "failed": failed, **numbers})
    return found


@functools.cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": _shown, "number": _number}
    environment.globals |= {"completions_of": _completion}
    return environment


def _page(template: str, **values: Any) -> str:
    page = _environment().get_template(template).render(**values, can_draw=can_draw())
    return f"{MARK}\n{page}\n"


def _shown(text: str) -> str:
    """A text of a model or of data: its first MOST_TEXT characters, without what would change a page's direction."""
    rest = len(text) - MOST_TEXT
    return visible(text if rest <= 0 else f"{text[:MOST_TEXT]} … and {rest:,} more characters")


def _number(value: float | None, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def _completion(completion: Completion) -> dict[str, str]:
    """The rewards of a completion by name, as they are shown."""
    rewards = {name.removesuffix("_reward").replace("_", " "): _number(v) for name, v in completion.rewards.items()}
    return {visible(name): value for name, value in rewards.items()}
