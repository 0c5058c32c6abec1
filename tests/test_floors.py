"""The library has rooms; imports run one way between them, and each room keeps its private names to itself."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "tunix_torch"
# The rooms from top to bottom. A file imports only from its own room and from rooms above it; `rewards` has none above.
ROOMS = [
    "public",
    "rewards",
    "runtime",
    "batch",
    "grpo",
    "config",
    "model",
    "data",
    "rollout",
    "learn",
    "rewarding",
    "evals",
    "completions",
    "checkpoints",
    "trainer",
    "compat",
    "report",
    "run",
    "preflight",
    "crosscheck",
    "cli",
    "export",
    "replay",
    "diagnose",
]


def modules(folder=LIBRARY):
    return sorted(path for path in folder.rglob("*.py"))


def name_of(path):
    """Return a file's module as names, ("tunix_torch", "model", "loading"); an `__init__` gives the room itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports_of(path):
    """Return (module as a tuple of names, name taken from it or None) for every import, anywhere in a file."""
    package = name_of(path) if path.stem == "__init__" else name_of(path)[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(tuple(alias.name.split(".")), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = start + tuple((node.module or "").split(".") if node.module else ())
            found += [(module, alias.name) for alias in node.names]
    return found


def room_of(module):
    return module[1] if len(module) > 1 else None


def test_every_file_stands_in_a_room():
    rooms = {room_of(name_of(path)) for path in modules() if name_of(path) != ("tunix_torch",)}
    assert rooms == set(ROOMS)


def test_imports_run_one_way_between_rooms():
    wrong = []
    for path in modules():
        here = room_of(name_of(path))
        if here is None:
            continue
        for module, name in imports_of(path):
            if module[0] != "tunix_torch":
                continue
            there = room_of(module) or (name if name in ROOMS else None)
            if there is None:
                assert here in ROOMS[ROOMS.index("run") :], f"{path}: the public names are for users"
            elif there != here and ROOMS.index(there) > ROOMS.index(here):
                wrong.append(f"{path.relative_to(LIBRARY)} imports {there}, which is below it")
    assert not wrong, "\n".join(wrong)


def test_no_room_takes_another_rooms_private_names():
    wrong = []
    for path in modules():
        for module, name in imports_of(path):
            private = [part for part in (*module[1:], name or "") if part.startswith("_") and not part.endswith("__")]
            if module[0] == "tunix_torch" and private and room_of(module) != room_of(name_of(path)):
                wrong.append(f"{path.relative_to(LIBRARY)} imports {'.'.join(module)}.{name}")
    assert not wrong, "\n".join(wrong)


ALGORITHM = ("batch.py", "grpo.py", "trainer.py", "rollout/sampler.py", "learn/step.py")
MACHINES = re.compile(
    r"(?<![a-z])(xla|cuda|gpus?|tpus?|mesh(es)?|fsdp|hosts?)(?![a-z])|\bprocess(es)?\b|\b(?-i:KIND)\b", re.IGNORECASE
)


def test_the_algorithm_is_five_short_files_that_name_no_machine():
    """What differs between machines is behind `runtime` and behind the shapes that the caller gets."""
    texts = {name: (LIBRARY / name).read_text() for name in ALGORITHM}
    counts = {name: len(text.splitlines()) for name, text in texts.items()}
    assert sum(counts.values()) <= 900 and counts["trainer.py"] <= 350, counts
    found = [f"{name}: {match[0]!r}" for name, text in texts.items() for match in MACHINES.finditer(text)]
    assert not found, found


def test_rewards_are_pure():
    for path in modules(LIBRARY / "rewards"):
        for module, _ in imports_of(path):
            known = module[0] in sys.stdlib_module_names or module[:2] == ("tunix_torch", "rewards")
            assert known or (module[0] == "mpmath" and path.stem in ("math_equal", "math_numbers", "math_value")), (
                path.name,
                module,
            )


def test_the_library_does_not_know_its_users():
    users = {path.stem for path in ROOT.glob("*.py")} | {"benchmarks", "tests"}
    for path in modules():
        assert not {module[0] for module, _ in imports_of(path)} & users, path


def test_the_peers_are_imported_only_where_they_are_compared():
    files = [*modules(), *ROOT.glob("*.py")]
    places = {path.relative_to(ROOT).as_posix(): {module[0] for module, _ in imports_of(path)} for path in files}
    sides = {f"tunix_torch/crosscheck/tunix_{name}.py" for name in ("lora", "models", "preferences", "side")}
    sides |= {f"tunix_torch/preflight/tunix_{name}.py" for name in ("configs", "graphs")}
    assert {p for p, names in places.items() if names & {"flax", "optax", "qwix", "tunix"}} == sides
    assert {p for p, names in places.items() if names & {"jax", "jaxlib"}} == {
        *sides,
        "tunix_torch/preflight/compile_tpu.py",
    }
    trl = {f"tunix_torch/crosscheck/trl_{name}.py" for name in ("preferences", "side")}
    assert {p for p, names in places.items() if "trl" in names} == trl


def test_only_the_runtime_imports_torch_tpu():
    importers = {path for path in modules() if "torch_tpu" in {module[0] for module, _ in imports_of(path)}}
    assert {path.relative_to(LIBRARY).parts[0] for path in importers} == {"runtime"}


def test_only_the_runtime_and_plans_import_torch_xla():
    importers = {path for path in modules() if "torch_xla" in {module[0] for module, _ in imports_of(path)}}
    assert {room_of(name_of(path)) for path in importers} == {"runtime", "preflight"}


def test_library_stays_off_xla_even_when_transformers_was_imported_first():
    code = (
        "from transformers import Trainer; import tunix_torch; from tunix_torch import GRPOConfig;"
        "print(GRPOConfig(output_dir='x').device)"
    )
    environment = {"PATH": "/usr/bin:/bin", "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/tmp")
    assert result.stdout.strip() == "cpu", result.stderr


def test_every_public_name_of_a_room_is_there():
    for path in sorted(LIBRARY.glob("*/__init__.py")):
        room = importlib.import_module(".".join(name_of(path)))
        assert room.__doc__ and all(hasattr(room, name) for name in getattr(room, "__all__", [])), path.parent.name


def test_importing_the_library_loads_nothing_heavy():
    code = "import sys, tunix_torch, tunix_torch.rewards; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "set()", result.stdout + result.stderr
