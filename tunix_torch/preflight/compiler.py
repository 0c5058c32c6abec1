"""Have graphs compiled for a TPU slice, each in a process of its own, and keep the results by the graph's hash."""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..model import tiny
from .chips import Topology
from .compile_tpu import Compiled, Request
from .hlo import Collective, collectives_of
from .trace import Graph
from .traffic import hbm_bytes

ROOT = Path(__file__).parent.parent.parent
VERSION = 3  # of what is kept
REFUSALS = ("RESOURCE_EXHAUSTED", "Ran out of memory in memory space")  # the program is too large, and always will be


@dataclass
class Program(Compiled):
    """A compiled graph, with what its text says."""

    collectives: list[Collective] = field(default_factory=list)
    hbm_traffic: float = 0.0  # read from and written to HBM


def check_installed() -> None:
    """Raises ValueError when the TPU's compiler is not here, saying what to install."""
    missing = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"the pre-flight compiles with {' and '.join(missing)}: pip install jax==0.10.2 libtpu==0.0.21"
        )


def cache_folder() -> Path:
    """Where results are kept: beside the tiny model."""
    return tiny.cache_folder() / "plans"


def compile_for(topology: Topology, num_partitions: int, graph: Graph) -> Program:
    """Compile a graph for the first `num_partitions` chips of a slice, or look up what came of it before.

    Returns:
        what the compiler says; its `error` says why a graph does not compile.
    """
    versions = [importlib.metadata.version(name) for name in ("libtpu", "jaxlib")]
    key = repr((VERSION, versions, topology.name, topology.libtpu_flags, num_partitions, graph.digest))
    kept = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if not kept.is_file():
        program = _compile(topology, num_partitions, graph)
        if program.error and not any(words in program.error for words in REFUSALS):
            return program  # another time it may compile
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = kept.with_suffix(f".{os.getpid()}")  # another plan may be reading
        written.write_text(json.dumps(asdict(program)))
        os.replace(written, kept)
    values = json.loads(kept.read_text())
    values["collectives"] = [Collective(**value) for value in values["collectives"]]
    return Program(**values)


def _compile(topology: Topology, num_partitions: int, graph: Graph) -> Program:
    with tempfile.TemporaryDirectory(prefix="plan-tpu-") as folder:
        files = {name: os.path.join(folder, name) for name in ("request", "hlo", "result", "program")}
        Path(files["hlo"]).write_bytes(graph.hlo)
        request = Request(topology.name, num_partitions, files["hlo"], graph.donated, files["result"], files["program"])
        Path(files["request"]).write_text(json.dumps(asdict(request)))
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",  # jax itself looks for no TPU; libtpu is only asked to compile
            "TPU_SKIP_MDS_QUERY": "1",  # nor asks Google Cloud for one
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another plan may be compiling
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-8",
            "LIBTPU_INIT_ARGS": " ".join(topology.libtpu_flags),
        }
        command = [sys.executable, "-m", "tunix_torch.preflight.compile_tpu", files["request"]]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if not Path(files["result"]).is_file():
            if ended.returncode == -9:
                raise ValueError(f"the compiler was killed at {graph.name}: this machine has too little memory for it")
            raise RuntimeError(f"the compiler ended with {ended.returncode} at {graph.name}:\n{ended.stderr[-4000:]}")
        compiled = json.loads(Path(files["result"]).read_text())
        text = "" if compiled["error"] else Path(files["program"]).read_text()
        if os.environ.get("TUNIX_KEEP_PROGRAMS"):  # for people who want to read them
            target = Path(os.environ["TUNIX_KEEP_PROGRAMS"])
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{graph.name.replace(' ', '-')}-{graph.digest[:8]}.txt").write_text(text)
        if compiled["error"]:
            return Program(**compiled)
        return Program(**compiled, collectives=collectives_of(text), hbm_traffic=hbm_bytes(text))
