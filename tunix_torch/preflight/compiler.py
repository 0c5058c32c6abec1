"""Compile graphs for a TPU slice, each in a process of its own, and cache the results on disk by the graph's hash."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..model import tiny
from ..runtime import device
from .chips import Topology
from .compile_tpu import Compiled, Request
from .graph import Graph
from .hlo import Collective, collectives_of
from .traffic import hbm_traffic_bytes

ROOT = Path(__file__).parent.parent.parent
VERSION = 4  # of the cached files' format; a new number makes old files unused
# Of what compiles, by the dialect of the graphs: beside torch-xla 2.9.0 and beside torch_tpu 0.2.0.
VERSIONS = {
    "hlo": {"jax": "0.10.2", "libtpu": "0.0.21"},
    "stablehlo": {"jax": "0.10.2", "libtpu": "0.0.52"},
}
REFUSALS = (
    "RESOURCE_EXHAUSTED",
    "Ran out of memory in memory space",
)  # errors of programs that are too large


@dataclass
class Program(Compiled):
    """What the compiler reports about a graph, and what the text of the compiled program adds to it."""

    collectives: list[Collective] = field(default_factory=list)
    hbm_traffic: float = 0.0  # bytes read from and written to HBM, on one chip in one run


def check_installed() -> None:
    """Raise ValueError, with the packages to install, when the TPU's compiler is missing."""
    missing = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        needed = " ".join(f"{name}=={VERSIONS[device.graph_dialect()][name]}" for name in missing)
        raise ValueError(f"the pre-flight compiles with {' and '.join(missing)}: pip install {needed}")


def cache_folder() -> Path:
    """Return the folder of the cached results, which lies beside the cached tiny model."""
    return tiny.cache_folder() / "plans"


def compile_for(topology: Topology, num_partitions: int, graph: Graph) -> Program:
    """Compile a graph for the first `num_partitions` chips of a slice, or return the cached result of doing so.

    Returns:
        the compiler's report; when the graph does not compile, `error` gives the reason.
    """
    versions = [importlib.metadata.version(name) for name in ("libtpu", "jaxlib")]
    key = repr((VERSION, versions, topology.name, topology.libtpu_flags, num_partitions, graph.digest))
    cached = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if not cached.is_file():
        program = _compile(topology, num_partitions, graph)
        if is_passing(program):
            return program
        keep(cached, asdict(program))
    return program_from(json.loads(cached.read_text()))


def is_passing(program: Program) -> bool:
    """Whether a graph did not compile for a reason that may not be there another time."""
    return program.error is not None and not any(words in program.error for words in REFUSALS)


def keep(file: Path, values: Any) -> None:
    """Write values to a file of the cache, which appears when it is whole, as another plan may read it meanwhile."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(values))
    os.replace(unfinished, file)


def program_from(values: dict[str, Any]) -> Program:
    """Return the program whose fields were kept as JSON."""
    return Program(**values | {"collectives": [Collective(**value) for value in values["collectives"]]})


def _compile(topology: Topology, num_partitions: int, graph: Graph) -> Program:
    with tempfile.TemporaryDirectory(prefix="plan-tpu-") as folder:
        files = {name: os.path.join(folder, name) for name in ("graph", "result", "program")}
        Path(files["graph"]).write_bytes(graph.program)
        request = Request(topology.name, num_partitions, dialect=graph.dialect, donated=graph.donated, **files)
        run_compiler("compile_tpu", asdict(request), Path(folder), graph.name, topology.libtpu_flags)
        compiled = Compiled(**json.loads(Path(files["result"]).read_text()))
        return program_of(compiled, Path(files["program"]), f"{graph.name}-{graph.digest[:8]}")


def run_compiler(module: str, request: dict[str, Any], folder: Path, what: str, flags: Sequence[str] = ()) -> None:
    """Run one of this room's compilers in a process of its own. It reads `folder/request` and writes `folder/result`.

    Args:
        what: is compiled, for the errors.
        flags: of libtpu.

    Raises:
        ValueError: this machine has too little memory for it.
    """
    (folder / "request").write_text(json.dumps(request))
    inherited = {name: value for name, value in os.environ.items() if name != "TPU_LIBRARY_PATH"}
    environment = {
        **inherited,  # without the plugin that may stand for a TPU: libtpu shall compile
        "JAX_PLATFORMS": "cpu",  # keeps jax from looking for a TPU: libtpu shall only compile
        "TPU_SKIP_MDS_QUERY": "1",  # keeps libtpu from asking Google Cloud for a TPU
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another plan may be compiling at the same time
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "LIBTPU_INIT_ARGS": " ".join(flags),
        "TUNIX_DEVICE": "cpu",
    }
    command = [sys.executable, "-m", f"tunix_torch.preflight.{module}", str(folder / "request")]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if not (folder / "result").is_file():
        if ended.returncode == -9:
            raise ValueError(f"the compiler was killed at {what}: this machine has too little memory for it")
        raise RuntimeError(f"the compiler ended with {ended.returncode} at {what}:\n{ended.stderr[-4000:]}")


def program_of(compiled: Compiled, program: Path, name: str) -> Program:
    """Return the compiler's report with what the text of the compiled program, if there is one, adds to it.

    Args:
        name: of the file under which the text is kept for people, who give a folder in TUNIX_KEEP_PROGRAMS.
    """
    values = {field.name: getattr(compiled, field.name) for field in fields(Compiled)}
    text = "" if compiled.error else program.read_text()
    if os.environ.get("TUNIX_KEEP_PROGRAMS"):
        target = Path(os.environ["TUNIX_KEEP_PROGRAMS"])
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{name.replace(' ', '-')}.txt").write_text(text)
    if compiled.error:
        return Program(**values)
    return Program(**values, collectives=collectives_of(text), hbm_traffic=hbm_traffic_bytes(text))
