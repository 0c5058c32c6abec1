"""What the README, AGENTS.md and the pages of docs/ name is there: tests, files, links, commands of make."""

import ast
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
from shown_commands import as_if_not_called_by_make

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SUFFIXES = (".py", ".md", ".sh", ".json", ".yaml", ".toml", ".txt", ".png")
# What a run, a command or a peer has, and not this repository.
ELSEWHERE = {
    "config.json",
    "crosscheck.json",
    "evaluation.summary.json",
    "fsdp_config.json",
    "first_run/recipe/profile/step-10.json",
    "generation_config.json",
    "long.json",
    "multirun/",
    "my_module.py",
    "outputs/",
    "plan-1.json",
    "plan.json",
    "run.json",
    "previous/",
    "reasoning_training_data.json",
    "run_config.json",
    "time.json",
    "time_to_accuracy.png",
    "training_curves.png",
}


def each(pages=PAGES):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


def words_of_code(page):
    """Each word in backticks, without the arguments and punctuation around it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {word.strip("(),:;'\"") for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()}


def anchors_of(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_every_page_of_docs_is_found_from_the_readme_or_from_the_quick_start_that_it_names():
    text, start = (ROOT / "README.md").read_text(), (ROOT / "docs" / "index.md").read_text()
    assert "(docs/index.md)" in text and "(AGENTS.md)" in text
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"}
    assert not {page for page in pages if f"(docs/{page})" not in text and f"({page})" not in start}


@each()
def test_every_test_that_a_page_names_exists(page):
    named = re.findall(r"`((?:tests/)?(?:\w+/)*test_\w+\.py)::(\w+)", page.read_text())
    missing = []
    for file, name in named:
        path = ROOT / file
        there = path.exists() and {n.name for n in ast.walk(ast.parse(path.read_text())) if hasattr(n, "name")}
        if not there or name not in there:
            missing.append(f"{file}::{name}")
    assert not missing
    assert page.name not in ("guarantees.md", "migration.md") or len(named) > 40, "the pattern finds no tests"


@each()
def test_every_file_that_a_page_names_exists(page):
    """By its path from the root, from tunix_torch/ or from the page; a name without a folder may stand in any."""
    names = {word.partition("::")[0] for word in words_of_code(page)}
    paths = {name for name in names if re.fullmatch(r"[\w./-]+", name) and name.endswith((*SUFFIXES, "/"))}
    missing = []
    for name in paths - ELSEWHERE:
        places = [ROOT, ROOT / "tunix_torch", page.parent]
        if (
            name.startswith((".", "/"))
            and not (ROOT / name).exists()
            or any(part.isupper() for part in name.split("/"))
        ):
            continue  # a folder of the user's, or a word to put a name in place of
        if not any((place / name).exists() for place in places) and not (
            "/" not in name and any(ROOT.glob(f"*/**/{name}"))
        ):
            missing.append(name)
    assert not missing


@each()
def test_every_link_within_the_repository_resolves(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            wrong.append(target)
    assert not wrong


@each()
def test_every_target_of_make_that_a_page_names_exists(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:[`;] *|^)make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert not named - targets


def test_the_map_of_files_is_up_to_date():
    spec = importlib.util.spec_from_file_location("write_files", ROOT / "docs" / "write_files.py")
    write_files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(write_files)
    text = (ROOT / "docs" / "files.md").read_text()
    listed = set(re.findall(r"^\| `([\w/.]+\.py)`", text, re.MULTILINE))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tunix_torch").rglob("*.py")}
    files = {file for file in files if not re.fullmatch(r"tunix_torch/\w+/__init__\.py", file)}  # these head the rooms
    files |= {path.name for path in ROOT.glob("*.py")}
    assert listed == files
    assert text == write_files.page(), "run python docs/write_files.py"


@pytest.mark.parametrize(
    "target, command",
    [
        ("train", "train.py --use_grpo"),
        ("train-quick", "run_training.py +experiment=quick_test"),
        ("train-show-config", "run_training.py --cfg job"),
        ("train-sweep", "run_training.py --multirun"),
        ("evaluate", "evaluate.py"),
        ("tensorboard", "tensorboard --logdir"),
        ("check-device", "verify_tpu_setup"),
        ("crosscheck", "-m crosscheck"),
    ],
)
def test_make_has_the_documented_targets(target, command):
    result = subprocess.run(
        ["make", "--dry-run", "--old-file", ".venv/.installed", target],
        cwd=ROOT,
        env=as_if_not_called_by_make(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 and command in result.stdout, result.stdout + result.stderr


def test_the_picture_of_the_readme_is_drawn_from_runs_and_a_folder_without_any_is_named(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_learning_curve", ROOT / "docs" / "draw_learning_curve.py")
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    rows = [{"step": step, "reward": 1 + step / 100} for step in range(1, 31)]
    rows += [{"step": step, "eval_accuracy": 0.4, "eval_mean@8": 0.3} for step in (0, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    drawing.draw([tmp_path, tmp_path], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert drawing.smooth([1.0] * 9 + [11.0] * 2) == [1.0] * 9 + [2.0, 3.0]
    with pytest.raises(ValueError, match="no 'eval_accuracy': expected the folder of a run"):
        drawing.draw([tmp_path / "none"], tmp_path / "curve.png")
