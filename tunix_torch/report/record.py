"""Reads everything that a run left in its folder and that its report and its diagnosis need."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.method import method_name
from ..data.visible import visible
from .completions import Completion, read_answers, read_completions
from .metrics import METRICS_FILE, is_number, load_metrics
from .starts import read_starts

CROSSCHECK_FILE = "crosscheck.json"  # what `python -m crosscheck --from-run OUTPUT_DIR` writes
# The settings of a run that trains a LoRA, or a whole model, whose own config.json is beside them: config/saved.py has
# the same names, and loads PyTorch.
SETTINGS_FILES = ("run_config.json", "config.json")


@dataclass
class RunRecord:
    """What a run left on disk."""

    folder: Path
    rows: list[dict[str, Any]]  # of its logs, at least one: see `load_metrics`
    settings: dict[str, Any] = field(default_factory=dict)  # {}: it was no job of `train`, which writes them
    starts: list[dict[str, Any]] = field(default_factory=list)  # see `starts.py`; none of an early version
    completions: list[Completion] = field(default_factory=list)  # of training steps; none: they were not kept
    answers: list[Completion] = field(default_factory=list)  # of evaluations; none: they were not kept
    crosscheck: list[dict[str, Any]] = field(default_factory=list)  # rows of a cross-check; none: there was none

    @property
    def name(self) -> str:
        """The name of the run's folder, in characters that a page may show."""
        return visible(self.folder.absolute().name) or "run"

    @property
    def last_step(self) -> int:
        """The newest step of which something was logged."""
        return max(row["step"] for row in self.rows)

    @property
    def method(self) -> str:
        """What a reader calls the training: GRPO, DPO, SFT and so on."""
        samples = any("frac_reward_zero_std" in row for row in self.rows)  # where no settings say it
        return method_name({"use_grpo": samples} | self.settings)


def read_run(output_dir: str | Path, setting: str = "output_dir") -> RunRecord:
    """Read what a run left in its folder. The run may have ended, or be at work.

    Args:
        setting: the name of what holds `output_dir`, for error messages.

    Raises:
        ValueError: there is no such folder, it holds no metrics, or a file in it is damaged.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        raise ValueError(f"{setting}={str(folder)!r}: {'a file, expected' if folder.exists() else 'no such'} folder")
    rows = load_metrics(folder)
    if not rows:
        hint = f"holds neither a {METRICS_FILE} with a step in it nor a checkpoint"
        raise ValueError(f"{setting}={str(folder)!r}: {hint}")
    return RunRecord(
        folder=folder,
        rows=rows,
        settings=_settings(folder),
        starts=read_starts(folder),
        completions=read_completions(folder),
        answers=read_answers(folder),
        crosscheck=_crosscheck(folder),
    )


def _object_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return content


def _settings(folder: Path) -> dict[str, Any]:
    """The run's settings. The config.json of a whole model is no file of settings."""
    for name in SETTINGS_FILES:
        settings = _object_in(folder / name)
        if "learning_rate" in settings:
            return settings
    return {}


def _crosscheck(folder: Path) -> list[dict[str, Any]]:
    path = folder / CROSSCHECK_FILE
    rows = _object_in(path).get("rows", [])
    good = isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("quantity"), str)
        and row.get("verdict") in ("pass", "fail")
        and is_number(row.get("tolerance"))
        and (row.get("difference") is None or is_number(row["difference"]))
        for row in rows
    )
    if not good:
        raise ValueError(f"{path}: not the table that python -m crosscheck writes")
    return rows
