"""What holds of the tests themselves."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported_modules(path):
    """Names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (alias.name for alias in node.names)


def test_no_test_imports_another():
    """What tests share lies in the modules beside conftest.py; a test that is imported could not be changed alone."""
    for path in TESTS.rglob("*.py"):
        for module in imported_modules(path):
            assert not any(part.startswith("test_") for part in module.split(".")), f"{path} imports {module}"
