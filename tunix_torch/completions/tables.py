"""Shows completions with their rewards: as a table on the terminal, in W&B and Trackio, and as text in TensorBoard."""

import sys
from collections.abc import Callable
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..config.grpo import GRPOConfig
from ..data.visible import visible
from ..runtime.columns import columns_of
from .rows import Columns

LONGEST = 600  # characters of a text on the terminal; files and services get all of it
NARROWEST_TEXT = 24  # columns for completions beside their numbers; with less room, numbers stand below them
WIDEST_NUMBER = 7  # characters: "123 cut"


class ShowCompletions:
    """Shows the completions of a step at the first log after every `log_completions_steps`, or at every log.

    Args:
        args: the settings of the run.
        text_writer: gives the function that adds a text of a step to TensorBoard: (name, text, step); None: the run
            does not report to TensorBoard.
    """

    def __init__(self, args: GRPOConfig, text_writer: Callable[[], Callable[[str, str, int], None] | None]) -> None:
        self.args, self.text_writer = args, text_writer
        self._last = 0  # the step at the newest log

    def begin(self, step: int) -> None:
        """The run begins after this step."""
        self._last = step

    def __call__(self, columns: Columns) -> None:
        step, every = columns["step"][0], self.args.log_completions_steps or 1
        due, self._last = step // every > self._last // every, step
        if not due:
            return
        rows = chosen(columns, self.args.num_completions_to_print, self.args.log_unique_prompts)
        console = Console(file=sys.stdout, highlight=False, width=columns_of(sys.stdout))
        console.print(on_terminal(rows, f"Step {step}", console.width))
        self._report(chosen(columns, None, self.args.log_unique_prompts), step)

    def _report(self, rows: Columns, step: int) -> None:
        table = {"columns": list(rows), "data": [list(row) for row in zip(*rows.values(), strict=True)]}
        if "wandb" in self.args.report_to:
            import wandb

            wandb.log({"completions": wandb.Table(**table), "train/global_step": step})
        if "trackio" in self.args.report_to:
            import trackio

            trackio.log({"completions": trackio.Table(**table)}, step=step)
        write = self.text_writer()
        if write is not None:
            write("completions", as_markdown(rows), step)


def chosen(columns: Columns, limit: int | None, unique_prompts: bool) -> Columns:
    """The first rows, `limit` at most, so that whole groups stand side by side.

    Args:
        limit: None: all.
        unique_prompts: take one completion of each prompt only.
    """
    rows, seen = [], set()
    for row, prompt in enumerate(columns["prompt"]):
        if not unique_prompts or prompt not in seen:
            rows.append(row)
        seen.add(prompt)
    return {name: [values[row] for row in rows[:limit]] for name, values in columns.items()}


def on_terminal(columns: Columns, title: str, width: int) -> RenderableType:
    """Completions as a terminal shows them, group by group under their prompts, with control characters spelled.

    Args:
        width: the columns of the terminal. Where they leave too little room for texts, numbers stand below them.
    """
    names = [name for name in columns if name in ("reward", "advantage") or name.startswith("rewards/")]
    labels = {name: _label(name) for name in [*names, "length"]}
    widths = {name: max(len(label), WIDEST_NUMBER) for name, label in labels.items()}
    room = width - sum(number + 2 for number in widths.values()) - 2
    longest = max((cell_len(line) for text in columns["completion"] for line in _shown(text).split("\n")), default=0)
    room = min(room, max(longest, NARROWEST_TEXT))
    parts, last = [Text(title, style="bold")], None
    table: Table | None = None
    for row, prompt in enumerate(columns["prompt"]):
        if prompt != last:
            answer = columns["answer"][row]
            expected = "" if answer is None else f"  (answer: {_shown(answer)})"
            parts.append(Text(f"\n{_shown(prompt)}{expected}", style="yellow"))
            table, last = None, prompt
        text = Text(_shown(columns["completion"][row]), style="green")
        cut = " cut" if columns["clipped"][row] else ""
        numbers = [_shown(columns[name][row]) for name in names] + [f"{columns['length'][row]}{cut}"]
        if room < NARROWEST_TEXT:
            shown = ", ".join(f"{label} {number}" for label, number in zip(labels.values(), numbers, strict=True))
            parts += [text, Text(f"  {shown}", style="cyan")]
            continue
        if table is None:
            table = Table(box=None, show_header=len(parts) == 2, pad_edge=False, padding=(0, 2, 0, 0))
            table.add_column("", width=room, overflow="fold")
            for name, label in labels.items():
                style = "magenta" if name == "advantage" else "cyan"
                table.add_column(label, width=widths[name], justify="right", style=style)
            parts.append(table)
        table.add_row(text, *numbers)
    return Group(*parts)


def as_markdown(columns: Columns) -> str:
    """Completions as TensorBoard renders texts: a line of numbers, and the texts indented, in which no mark counts."""
    parts = []
    names = [name for name in columns if name not in ("step", "prompt_index", "prompt", "answer", "completion")]
    for row in range(len(columns["prompt"])):
        numbers = ", ".join(f"`{name}` {_shown(columns[name][row])}" for name in names)
        parts.append(f"**{row + 1}** {numbers}\n")
        answer = columns["answer"][row]
        texts = [
            columns["prompt"][row],
            *([] if answer is None else [f"expected: {answer}"]),
            "",
            columns["completion"][row],
        ]
        lines = visible("\n".join(texts)).split("\n")
        parts.append("\n".join(f"    {line}" for line in lines) + "\n")
    return "\n".join(parts)


def _label(name: str) -> str:
    return visible(name.removeprefix("rewards/").removesuffix("_reward"))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2f}"
    text = visible(str(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
