"""Plan a job for Google's Tunix: compile its graphs for the job's slice, with the settings that are best for Tunix.

Tunix may have as many rows in a pass as it likes, and may compute layers again in the backward pass
(rematerialisation), which takes less memory and more time. The least rematerialisation is taken that fits a chip's
memory, and then the number of rows that is fastest by the bound of time. Tunix's trainer takes whole groups of
completions; where not even one group fits, fewer rows are tried, which the plan says.
"""

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PretrainedConfig

from ..model.loading import torch_dtype
from .chips import Chip
from .compile_tunix import LEARNING, LOGPS, ROLLOUT, TunixCompiled, TunixRequest
from .compiler import VERSION, Program, cache_folder, is_passing, keep, program_from, program_of, run_compiler
from .graph import Graph
from .graph_names import DECODE, LEARN
from .plan import CUT_DEPTHS, Cut, GraphPlan, Job, cuts_of, plan_graph

MODELS = ("gemma2", "gemma3_text")  # model types whose graphs are compiled for Tunix
REMATERIALISATIONS = ("NONE", "BLOCK", "DECODER")  # from the least computation to the least memory
PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "qwix", "optax", "libtpu")
Say = Callable[[str], None]


@dataclass
class Attempt:
    """Settings of Tunix that were compiled: what a whole step spends in the graph then, and whether it fits."""

    graph: str
    rows: int  # of a pass
    rematerialisation: str | None  # None: there is nothing to choose
    fits: bool
    step_seconds: float | None  # at least, of all runs in a step; None where the graph does not compile


@dataclass
class TunixPlan:
    """The graphs of a training step of Tunix, with its best settings, and all settings that were compiled."""

    graphs: list[GraphPlan]
    attempts: list[Attempt]
    settings: str  # in words


def check_installed() -> None:
    """Raise ValueError, with what to install, when Tunix is missing."""
    missing = [name for name in ("tunix", "flax", "qwix", "optax") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"Tunix's graphs need {', '.join(missing)}: pip install 'tunix-torch[crosscheck]'")


def check_model(job: Job) -> None:
    """Raise ValueError when Tunix has no such model."""
    if job.config.model_type not in MODELS:
        raise ValueError(
            f"model_name={job.model.model_name!r}: of model type {job.config.model_type!r} Tunix has no model here; "
            f"choose one of {', '.join(MODELS)}"
        )


def seconds_of(graph: GraphPlan, collective_seconds: float) -> float:
    """Return the least time of one run: the largest of its bounds, and a cost for each collective."""
    return graph.bound_seconds + collective_seconds * sum(traffic.count for traffic in graph.collectives.values())


def plan_tunix(job: Job, collective_seconds: float, say: Say = lambda text: None) -> TunixPlan:
    """Trace and compile the graphs of Tunix for the job's model, mesh and slice.

    Args:
        collective_seconds: the cost of a collective, by which settings are compared.
        say: is called with a line of text whenever a part of the step was compiled.

    Raises:
        ValueError: Tunix has no such model, or nothing fits the slice.
    """
    check_model(job)
    full = job.config.num_hidden_layers
    cuts = [Cut(job.config, 1.0)] if full <= CUT_DEPTHS[1] else cuts_of(job)
    planner = _Planner(job, cuts, collective_seconds, say)
    graphs = planner.compiled(ROLLOUT, job.rows)
    words = []
    if job.args.beta > 0 or job.args.num_iterations > 1:
        best, rows, _ = planner.best(LOGPS, ("NONE",))
        graphs += best
        words.append(f"log-probabilities of {rows} rows at once")
    best, rows, kind = planner.best(LEARNING, REMATERIALISATIONS)
    words.append(f"learning passes of {rows} rows, rematerialisation {kind}")
    if rows % job.args.num_completions_per_prompt:
        words.append("fewer rows than a group, which Tunix's own trainer does not allow")
    return TunixPlan(graphs + best, planner.attempts, "; ".join(words))


class _Planner:
    """Compiles parts of Tunix's step with different settings, and remembers what came out."""

    def __init__(self, job: Job, cuts: Sequence[Cut], collective_seconds: float, say: Say) -> None:
        self.job, self.cuts, self.collective_seconds, self.say = job, cuts, collective_seconds, say
        self.attempts: list[Attempt] = []

    def best(self, part: str, kinds: Sequence[str]) -> tuple[list[GraphPlan], int, str]:
        """Return the graphs of a part with the best settings that fit, and the rows and kind of these.

        Args:
            kinds: rematerialisations, the best first.

        Raises:
            ValueError: nothing fits.
        """
        group, count = self.job.args.num_completions_per_prompt, self.job.rows
        fsdp = dict(zip(*self.mesh()[::-1], strict=True))["fsdp"]
        fewer = [n for n in range(group - 1, 0, -1) if group % n == 0 and n % fsdp == 0]
        whole = [n for n in range(group, count + 1, group) if count % n == 0 and n % fsdp == 0]
        for choices in (whole, *([n] for n in fewer)):
            for kind in kinds:
                found = self._that_fit(part, choices, kind)
                if found:
                    return min(found, key=lambda one: self._step_seconds(one[0]))
        raise ValueError(f"{part} of Tunix does not fit {self.job.topology.name}, however few rows a pass has")

    def _that_fit(self, part: str, choices: Sequence[int], kind: str) -> list[tuple[list[GraphPlan], int, str]]:
        """Compile with each number of rows in turn, until one does not fit.

        A number of rows for which the temporaries cannot fit, as they grow with the rows, is not compiled.
        """
        found: list[tuple[list[GraphPlan], int, str]] = []
        for rows in choices:
            if found:
                graphs, fewer, _ = found[-1]
                if any(g.total_bytes + g.temporary_bytes * (rows / fewer - 1) > self.chip.hbm_bytes for g in graphs):
                    break
            graphs = self.compiled(part, rows, kind)
            fits = all(not g.error and g.total_bytes <= self.chip.hbm_bytes for g in graphs)
            for g in graphs:
                seconds = None if g.error else self._step_seconds([g])
                self.attempts.append(Attempt(g.name, rows, kind if part == LEARNING else None, fits, seconds))
            if not fits:
                break
            found.append((graphs, rows, kind))
        return found

    def _step_seconds(self, graphs: Sequence[GraphPlan]) -> float:
        return sum(graph.runs * seconds_of(graph, self.collective_seconds) for graph in graphs)

    @property
    def chip(self) -> Chip:
        return self.job.topology.chip

    def compiled(self, part: str, rows: int, kind: str = "NONE") -> list[GraphPlan]:
        """Compile the graphs of a part for every cut of the model, and return their figures at full depth."""
        of_cuts = [compile_tunix(self.request(cut.config, part, rows, kind)) for cut in self.cuts]
        names = [name for name, *_ in of_cuts[0]]
        plans = []
        for i, name in enumerate(names):
            found = [of_cut[i] for of_cut in of_cuts if i < len(of_cut)]
            graphs = [Graph(name, b"", [], self.runs(name, rows), live) for _, _, live in found]
            programs = [program for _, program, _ in found]
            failed = next((n for n, program in enumerate(programs) if program.error), None)
            programs = programs if failed is None else programs[: failed + 1]
            plans.append(plan_graph(self.job, self.cuts, graphs, programs, loads_vision=False))
            took = f"{sum(program.seconds for program in programs):.0f} s"
            settings = f", {rows} rows" + (f", rematerialisation {kind}" if part == LEARNING else "")
            self.say(f"Tunix's {name}{settings}: {took if failed is None else 'does not compile'}")
        return plans

    def runs(self, name: str, rows: int) -> int:
        """Return how often a graph with so many rows runs in a step."""
        passes = self.job.rows // rows
        if name == DECODE:
            return self.job.args.generation_max_length  # one turn more than tokens are missing: see Sampler._decode_fn
        return passes * (self.job.args.num_iterations if name == LEARN else 1)

    def mesh(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the job's mesh, with both of the axes that Tunix's shardings name."""
        sizes, names = self.job.model.mesh or ((), ())
        missing = tuple(name for name in ("fsdp", "tp") if name not in names)
        return sizes + (1,) * len(missing), names + missing

    def request(self, config: PretrainedConfig, part: str, rows: int, kind: str) -> TunixRequest:
        """Return what `compile_tunix.py` needs to know, and nothing that does not change the part's graphs."""
        model, args, mesh = self.job.model, self.job.args, self.mesh()
        values = {
            "part": part,
            "topology": self.job.topology.name,
            "mesh": [list(mesh[0]), list(mesh[1])],
            "model": json.loads(config.to_json_string(use_diff=False)),
            "dtype": str(torch_dtype(model.model_dtype)).removeprefix("torch."),
            "lora_rank": model.lora_rank,
            "lora_alpha": float(model.lora_alpha),
            "rows": rows,
            "prompt_length": args.max_prompt_length,
            "completion_length": args.generation_max_length,
            "temperature": args.generation_temperature,
        }
        if part == ROLLOUT:
            return TunixRequest(**values, top_k=args.generation_top_k, top_p=args.generation_top_p)
        values |= {"beta": args.beta, "has_old": args.num_iterations > 1}
        if part == LOGPS:
            return TunixRequest(**values)
        return TunixRequest(
            **values,
            epsilon=args.epsilon,
            max_grad_norm=args.max_grad_norm,
            weight_decay=args.weight_decay,
            passes=self.job.rows // rows,
            rematerialisation=kind,
        )


def compile_tunix(request: TunixRequest) -> list[tuple[str, Program, float]]:
    """Compile a part of Tunix's step, or return the kept result of doing so.

    Returns:
        the name of each graph, the compiler's report, and the bytes of one chip's memory that all arrays take when the
        graph starts. After a graph that does not compile come no others.
    """
    sources = [Path(__file__).with_name(f"{name}.py") for name in ("tunix_graphs", "tunix_configs", "compile_tunix")]
    versions = [importlib.metadata.version(name) for name in PACKAGES]
    key = repr((VERSION, versions, [file.read_text() for file in sources], sorted(asdict(request).items())))
    cached = cache_folder() / f"tunix-{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if cached.is_file():
        kept = json.loads(cached.read_text())
        return [(name, program_from(values), live) for name, values, live in kept]
    with tempfile.TemporaryDirectory(prefix="plan-tunix-") as name:
        folder = Path(name)
        run_compiler("compile_tunix", asdict(request), folder, f"Tunix's {request.part}")
        found = [TunixCompiled(**values) for values in json.loads((folder / "result").read_text())]
        label = f"tunix-{request.model['num_hidden_layers']}-layers-{request.rows}-rows-{request.rematerialisation}"
        programs = [program_of(one, folder / one.program, f"{label}-{one.name}") for one in found]
    result = [(one.name, program, one.live_bytes) for one, program in zip(found, programs, strict=True)]
    if not any(is_passing(program) for program in programs):
        keep(cached, [(name, dataclasses.asdict(program), live) for name, program, live in result])
    return result
