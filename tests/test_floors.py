"""The library imports downwards only, and only device.py knows torch_xla."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        "device",
        "tiny",
        "batch",
        "callbacks",
        "checkpoint",
        "estimators",
        "groups",
        "metrics",
        "packing",
        "processes",
        "reward_workers",
        "rows",
        "settings",
    },
    {
        "attention",
        "beforehand",
        "config",
        "cuda_graph",
        "merged_lora",
        "profiling",
        "readers",
        "record",
        "results",
        "scoring",
        "shapes",
        "sharding",
    },
    {"fast_layers", "static_rows"},
    {"grpo", "model", "nested", "sources"},
    {"adapter", "logprobs", "sampler", "data", "run_folder"},
    {"checks", "evaluation", "export", "learning"},
    {"sft"},
    {"trainer"},
    {"job"},
]


def imports_of(path):
    """(modules imported absolutely, modules of the same package imported relatively), anywhere in the file."""
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            relative |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return absolute, relative


def test_files_import_from_lower_floors_only():
    files = {path.stem: path for path in (ROOT / "tunix_torch").glob("*.py") if path.stem != "__init__"}
    assert set(files) == set().union(*FLOORS), "a file without a floor, or a floor without its file"
    for number, floor in enumerate(FLOORS):
        below = set().union(*FLOORS[:number])
        for name in floor:
            _, relative = imports_of(files[name])
            assert relative <= below, f"{name}.py imports {relative - below}, which is not below it"


def test_library_and_rewards_do_not_know_their_users():
    users = {
        "utils",
        "train",
        "inference",
        "evaluate",
        "run_training",
        "rewards",
        "crosscheck",
        "benchmarks",
        "preflight",
        "plan_tpu",
        "example_usage",
        "jax",
        "tunix",
        "trl",
    }
    for path in (ROOT / "tunix_torch").glob("*.py"):
        allowed = {"rewards"} if path.stem == "job" else set()  # takes them by name
        assert not imports_of(path)[0] & (users - allowed), path.name
    for path in (ROOT / "rewards").glob("*.py"):
        assert not imports_of(path)[0] & {"tunix_torch", "torch", "numpy", "utils"}, path.name


def test_only_the_cross_check_imports_tunix_and_one_more_process_jax():
    folders = (".", "tunix_torch", "rewards", "crosscheck", "preflight")
    files = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    importers = {path.name for path in files if imports_of(path)[0] & {"flax", "optax", "qwix", "tunix"}}
    assert importers == {"tunix_side.py"}
    importers = {path.name for path in files if imports_of(path)[0] & {"jax", "jaxlib"}}
    assert importers == {"tunix_side.py", "compile_tpu.py"}


def test_only_device_imports_torch_xla():
    importers = {
        path.name
        for path in [*(ROOT / "tunix_torch").glob("*.py"), *(ROOT / "preflight").glob("*.py")]
        if "torch_xla" in imports_of(path)[0]
    }
    assert importers == {"device.py"}


def test_library_stays_off_xla_even_when_transformers_was_imported_first():
    code = (
        "from transformers import Trainer; import tunix_torch; from tunix_torch import GRPOConfig;"
        "print(GRPOConfig(output_dir='x').device)"
    )
    environment = {"PATH": "/usr/bin:/bin", "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/tmp")
    assert result.stdout.strip() == "cpu", result.stderr


def test_the_notes_on_a_port_name_every_place_that_asks_for_xla():
    notes = (ROOT / "docs" / "torch_tpu.md").read_text().split("## The three other places")[1]
    asking = [p for p in (ROOT / "tunix_torch").glob("*.py") if re.search('KIND [!=]= "xla"', p.read_text())]
    missing = [p.name for p in asking if p.name != "device.py" and p.name not in notes]
    assert not missing
