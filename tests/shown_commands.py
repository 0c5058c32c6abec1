"""Finds the commands that pages show, in blocks of shell and in backticks, with the words that the shell makes of them.

Bash itself reads a page's blocks, in an empty folder and without any program: each program that a block calls is noted
down and not run. So loops, variables, quotes and pipes mean what they mean to a reader who pastes the block.
"""

import ast
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}  # place -> text
SHELL = ("bash", "sh", "console")
NOT_SHELL = ("ini", "json", "python", "toml", "yaml")
# What a line begins with, after settings of the environment, that is a command.
BEGINS = r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\S*bin/)?"
BEGINS += r"(?:python|make|tunix-torch|accelerate|torchrun|pip|vllm|transformers|git|\S+\.sh)(?: |$)"
# Notes every call of a program: the line, the number of words, the words; after them, what `python -` reads.
NOTING = r"""
PATH=/nowhere
note() {
    local code=()
    if [[ "$1" == *python && "${2:-}" == - ]]; then mapfile -d '' code; fi
    printf '%s\0' "${BASH_LINENO[1]}" $(($# + ${#code[@]})) "$@" "${code[@]}" >>"$NOTES"
}
command_not_found_handle() { note "$@"; }
function . { :; }
for name in exec exit kill $NAMES; do eval "function $name { note $name \"\$@\"; }"; done
set -o noclobber
source "$BLOCKS"
"""


@dataclass(frozen=True)
class Command:
    """A call of one program, as a page shows it.

    Attributes:
        words: the program and its arguments.
        place: the page and the line, such as "docs/tpu.md:12".
        lines: the lines of its block from the first up to the end of the command; empty: it stands in backticks.
    """

    words: tuple[str, ...]
    place: str
    lines: tuple[str, ...] = ()


def blocks_of(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield the fenced blocks of a page: the number of the first line inside, the language, and the lines."""
    language, inside = None, []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.match(r" *```(\w*)", line)
        if fence and language is None:
            language, inside = fence[1], []
        elif fence:
            yield number - len(inside), language, inside
            language = None
        elif language is not None:
            inside.append(line)


def in_blocks(place: str, text: str) -> list[Command]:
    """The commands of a page's blocks of shell, and those that a block of systemd's settings starts.

    Raises:
        ValueError: Bash can't read a block.
    """
    script, blocks = [""] * (text.count("\n") + 1), {}
    for first, language, lines in blocks_of(text):
        if language == "console":  # lines without a prompt are what the commands print
            lines = [line.removeprefix("$ ") if line.startswith("$ ") else "" for line in lines]
        elif language == "ini":
            lines = [re.sub(r"/srv/[\w-]+/(?:\.venv/bin/)?", "", line.partition("ExecStart=")[2]) for line in lines]
        elif language not in SHELL:
            continue
        script[first - 1 : first - 1 + len(lines)] = lines
        blocks |= dict.fromkeys(range(first, first + len(lines)), first)
    found = []
    for number, words in called_by("\n".join(script)):
        end = number
        while script[end - 1].endswith("\\"):
            end += 1
        lines = script[blocks[number] - 1 : end]
        found.append(Command(words, f"{place}:{number}", tuple(lines)))
    return found


def in_backticks(place: str, text: str) -> list[Command]:
    """The commands among the words of a page that are set as code, over the end of a line too."""
    text = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    found = []
    for code in re.finditer(r"`((?:[^`\n]|\n(?!\n))+)`", text):
        if re.match(BEGINS, code[1]):
            number = text.count("\n", 0, code.start()) + 1
            found += [Command(words, f"{place}:{number}") for _, words in called_by(code[1].replace("\n", " "))]
    return found


def in_source() -> list[Command]:
    """The commands that sources give as examples: docstrings of scripts, helps of `tunix-torch`, and the Makefile."""
    lines = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]:
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        lines += [(path, re.sub(r"^ *(?:Run: )?", "", line)) for line in docstring.splitlines()]
    for path in ROOT.glob("tunix_torch/cli/*.py"):
        lines += [
            (path, line.replace("COMMAND", f"tunix-torch {path.stem}"))
            for line in path.read_text().splitlines()
            if line.startswith("COMMAND ")
        ]
    makefile = (ROOT / "Makefile").read_text()
    for target, given in re.findall(r"^([a-z-]+):.*##.*\bARGS=(\"[^\"]+\"|[^\s:)]+)", makefile, re.MULTILINE):
        lines.append((ROOT / "Makefile", f"make {target} ARGS={given}"))
    return [
        Command(words, str(path.relative_to(ROOT)))
        for path, line in lines
        if re.match(BEGINS, line)
        for _, words in called_by(line)
    ]


def without_language(place: str, text: str) -> list[str]:
    """The lines of a page that look like commands, and stand in a block whose language is none that is read here."""
    blocks = [(first, lines) for first, language, lines in blocks_of(text) if language not in SHELL + NOT_SHELL]
    return [
        f"{place}:{first + i}: {line}"
        for first, lines in blocks
        for i, line in enumerate(lines)
        if re.match(BEGINS, line)
    ]


def called_by(script: str) -> list[tuple[int, tuple[str, ...]]]:
    """The programs that a script of Bash calls where each of them succeeds: the line and the words of every call.

    Raises:
        ValueError: Bash can't read the script, or it does not end.
    """
    names = sorted(set(re.findall(r"(?<![\w./$-])\.{0,2}[\w.-]*/[\w./-]+", script)))  # programs called by their path
    with tempfile.TemporaryDirectory() as folder:
        blocks, notes = Path(folder, "blocks"), Path(folder, "notes")
        blocks.write_text(script + "\n")
        notes.touch()
        # The folders that a page's own `mkdir` makes are there, so that output can be redirected into them.
        for name in re.findall(r"mkdir -p (\S+)", script):
            Path(folder, "work", name).mkdir(parents=True)
        Path(folder, "work").mkdir(exist_ok=True)
        environment = {"NOTES": str(notes), "BLOCKS": str(blocks), "NAMES": " ".join(names), "HOME": folder}
        try:
            ended = subprocess.run(
                ["/bin/bash", "--norc", "-c", NOTING],
                cwd=Path(folder, "work"),
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=20,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"the shell does not come to an end: {script}") from error
        wrong = [line for line in ended.stderr.splitlines() if "warning" not in line]
        if wrong:
            raise ValueError(f"the shell says: {wrong[0].replace(str(blocks), 'the page')}")
        return list(_read_notes(notes.read_text().split("\0")[:-1]))


def _read_notes(fields: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    at = 0
    while at < len(fields):
        count = int(fields[at + 1])
        yield int(fields[at]), tuple(fields[at + 2 : at + 2 + count])
        at += 2 + count


def as_if_not_called_by_make() -> dict[str, str]:
    """This process's environment without what a make above it says to its children: flags, level, and our variables.

    Tests may be run by make, whose level alone changes the name by which a make below speaks: make[1].
    """
    said = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ARGS", "CASES")
    return {name: value for name, value in os.environ.items() if name not in said}


def called_by_make(words: Sequence[str]) -> list[tuple[str, ...]]:
    """What a call of make would run, without what installs packages.

    Raises:
        ValueError: make has no such target.
    """
    installed = [word for stamp in (".venv/.installed", ".venv-tpu/.installed") for word in ("--old-file", stamp)]
    ended = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *installed, *words],
        cwd=ROOT,
        env=as_if_not_called_by_make(),
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        raise ValueError(ended.stderr.strip())
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("make: ")]  # what make says itself
    return [called for _, called in called_by("\n".join(lines))]
