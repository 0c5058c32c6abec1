"""The command `tunix-torch` and what stands behind the scripts at the root: flags, one-line errors, exit codes."""

import importlib.util
import sys

if importlib.util.find_spec("torch") is None:
    print(
        f"error: {sys.executable} has no PyTorch; in a clone of the repository, `make setup` installs everything in"
        " .venv, and `. .venv/bin/activate` makes it the Python of this terminal",
        file=sys.stderr,
    )
    raise SystemExit(2)
