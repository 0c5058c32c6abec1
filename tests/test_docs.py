"""The pages of docs/ are a site that builds without a warning and asks no other server; the quick start's code runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


def test_every_page_of_docs_is_a_page_of_the_site(site):
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert len(pages) > 20
    assert not {name for name in pages if not (site / f"{name}.html").is_file()}
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not {name for name in pages if f" {name}.md\n" not in navigation}, "pages that no menu leads to"


def test_no_page_asks_another_server_for_anything(site):
    asked = r"<(?:link|script|img|iframe|source)\b[^>]*?(?:src|href)=\"(?:https?:)?//(?!mkdocs)"
    wrong = {page.name: found for page in site.glob("*.html") if (found := re.findall(asked, page.read_text()))}
    assert not wrong


def test_equations_are_mathml(site):
    page = (site / "grpo.html").read_text()
    source = (ROOT / "docs" / "grpo.md").read_text()
    assert page.count("<math") == len(
        re.findall(r"^\$\$\n.+?\n\$\$$", source, re.MULTILINE | re.DOTALL)
    ) + source.count("$`")
    assert "$$" not in page and "$`" not in page and "\\frac" not in re.sub(r"<annotation.*?</annotation>", "", page)


@pytest.mark.thorough
def test_the_python_of_the_quick_start_runs(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNIX_CACHE", cache)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"^```python\n(.+?)^```", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    exec(code.replace("max_steps=20", "max_steps=2"), names := {})
    assert [row["step"] for row in names["trainer"].state.log_history if "reward" in row] == [1, 2]
