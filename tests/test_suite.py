"""The tests stay independent of each other: none imports another."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported_modules(path):
    """Yield the names of all modules, and of what is taken from them, that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (alias.name for alias in node.names)


def test_no_test_imports_another():
    """Shared code lies in modules beside conftest.py, since a test that others import could not be changed alone."""
    for path in TESTS.rglob("*.py"):
        for module in imported_modules(path):
            assert not any(part.startswith("test_") for part in module.split(".")), f"{path} imports {module}"
