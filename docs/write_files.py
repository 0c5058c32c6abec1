"""Write docs/files.md: every room and file of the library, each with the first sentence of its own docstring.

Run it after a file was added, removed, renamed or described anew: python docs/write_files.py
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "tunix_torch"
TARGET = Path(__file__).parent / "files.md"
ALGORITHM = ("batch.py", "grpo.py", "trainer.py", "rollout/sampler.py", "learn/step.py")
# The rooms in the order in which a reader meets them; a room that is not named here comes after them.
ORDER = (
    "runtime config model data rollout learn rewarding rewards evals completions checkpoints run cli compat preflight "
    "crosscheck"
).split()

HEAD = """# Files

Written by `python docs/write_files.py` from the docstrings; `tests/test_readme.py` holds that it is up to date.

A file imports from its own room and from rooms above it, see the table in [AGENTS.md](../AGENTS.md).
"""

OUTSIDE = """## Outside the library

| place | what it is |
|---|---|
| `conf/` | the groups of `run_training.py` |
| `configs/` | recipes, one file a job |
| `config_example.json` | every setting, with the values of the tiny model's job |
| `notebooks/` | a job from installation to export, on a Kaggle TPU and on a Colab GPU |
| `run_tpu_training.sh` | starts a job on a TPU VM, after checks |
| `training_data/` | templates of questions with computed answers, for `generate_training_data.py` |
| `benchmarks/` | speed beside TRL and Tunix: [benchmarks/README.md](../benchmarks/README.md) |
| `tests/` | in folders like the rooms, named after what they guard |
"""


def first_sentence(path: Path) -> str:
    """The first paragraph of a file's docstring in one line, up to the end of its first sentence.

    Raises:
        ValueError: the file has no docstring.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path}: no docstring")
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    sentence, end, _ = paragraph.partition(". ")
    return (sentence + end.strip()).replace("|", "\\|")


def rooms() -> list[Path]:
    """The folders of the library, in the order of the page."""
    found = [folder for folder in LIBRARY.iterdir() if (folder / "__init__.py").exists()]
    return sorted(found, key=lambda room: (ORDER.index(room.name) if room.name in ORDER else len(ORDER), room.name))


def table(files: list[Path], root: Path) -> Iterator[str]:
    """A table of files, each under its path from `root`."""
    yield "| file | what it holds |"
    yield "|---|---|"
    for path in files:
        yield f"| `{path.relative_to(root).as_posix()}` | {first_sentence(path)} |"
    yield ""


def page() -> str:
    """The text of docs/files.md."""
    lines = [HEAD, "## The algorithm, in reading order", ""]
    lines += table([LIBRARY / name for name in ALGORITHM], ROOT)
    others = [path for path in sorted(LIBRARY.glob("*.py")) if path.name not in ALGORITHM]
    lines += ["## The package itself", "", *table(others, ROOT)]
    for room in rooms():
        files = [path for path in sorted(room.rglob("*.py")) if path.name != "__init__.py"]
        lines += [f"## `tunix_torch/{room.name}/`", "", first_sentence(room / "__init__.py"), "", *table(files, ROOT)]
    lines += ["## Scripts", "", *table(sorted(ROOT.glob("*.py")), ROOT), OUTSIDE]
    return "\n".join(lines)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
