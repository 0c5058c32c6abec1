"""A finding of the diagnosis: its name, what was seen, the lines of the metrics that say so, and what to try."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """A number that was logged at a step, or the mean of the numbers of several logs, of which this is the last."""

    step: int
    key: str  # in metrics.jsonl; it begins with "completions:" where it was read in the completions that were kept
    value: float
    logs: int = 1  # whose mean it is

    @property
    def note(self) -> str:
        """What must be known besides: whether it is a mean."""
        return f"mean of {self.logs} logs" if self.logs > 1 else ""

    def __str__(self) -> str:
        return f"step {self.step}: {self.key} = {self.value:.4g}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class Finding:
    """What a run shows that should not be so."""

    name: str
    shows: str  # one sentence or two
    lines: Sequence[Line]
    tries: Sequence[str]  # what to try, with the settings by their names

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON holds it."""
        return asdict(self)


def in_one_line(names: Iterable[str], output_dir: str | Path) -> str:
    """The names of findings about a run, and the command that says more of them."""
    how = f"python -m tunix_torch.diagnose {shlex.quote(str(output_dir))} says why, and what to try"
    return f"{', '.join(names)}; {how}"


def in_plain_text(findings: Sequence[Finding], without: str, looked: Sequence[str]) -> str:
    """The findings for a terminal.

    Args:
        without: what to say where there are none.
        looked: lines that say what was looked for.
    """
    if not findings:
        return "\n".join([without, *looked])
    parts = []
    for finding in findings:
        lines = "".join(f"\n    {line}" for line in finding.lines)
        tries = "".join(f"\n  - {what}" for what in finding.tries)
        parts.append(f"{finding.name.upper()}\n  {finding.shows}\n  Seen in:{lines}\n  Try:{tries}")
    parts = [part.replace("\n  - ", "\n    - ") for part in parts]
    return "\n\n".join([*parts, "\n".join(looked)] if looked else parts)
