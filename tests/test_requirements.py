"""`requirements.lock` holds what `requirements.txt` asks for, with hashes, so that every `make setup` is the same."""

import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


def requirements(name):
    """The requirements of a file by their canonical names, and how many hashes each has."""
    lines = (ROOT / name).read_text().replace("\\\n", " ").splitlines()
    found = {}
    for line in (line for line in lines if line.strip() and not line.startswith("#")):
        text, *hashes = re.split(r"\s--hash=sha256:", line)
        required = Requirement(text.strip())
        assert canonicalize_name(required.name) not in found, f"{required.name} is there twice"
        found[canonicalize_name(required.name)] = required, hashes
    return found


def test_the_lock_has_the_versions_of_requirements_txt_and_a_hash_of_every_file():
    asked, locked = requirements("requirements.txt"), requirements("requirements.lock")
    for name, (required, _) in asked.items():
        assert name in locked, f"{name}: run make lock"
        assert locked[name][0].specifier == required.specifier, f"{name}: run make lock"
    assert len(locked) > 2 * len(asked), "what the requirements need themselves is not there"
    for name, (required, hashes) in locked.items():
        (specifier,) = required.specifier
        assert specifier.operator == "==", name
        assert hashes and all(re.fullmatch("[0-9a-f]{64}", digest.strip()) for digest in hashes), name
