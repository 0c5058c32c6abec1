"""Plan a job: compile its graphs, of cuts where the model is deep; what each needs, and how fast it can be.

A deep model takes the compiler many minutes and more memory than a workstation has, since its layers are unrolled. So
models of more than `CUT_DEPTHS[1]` layers are compiled with few layers, twice, and every figure is taken to grow
linearly with the number of layers. It does but for the compiler's choices: layers do the same work, with a sliding
window too (it is a mask), and what a learning pass keeps of each is alive when the head's gradient is computed.
`test_preflight.py` compares with 6 layers of Gemma 3 270m. Where sequences outgrow the window, layers with one
keep fewer keys while decoding: then a third cut tells how figures grow with each kind.
"""

import argparse
import ctypes
import dataclasses
import gc
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from .. import GRPOConfig, ModelConfig
from ..config.files import load_config
from ..config.flags import parse_job
from ..model.attention import kept_tokens, layer_windows
from ..model.loading import torch_dtype
from ..runtime import device
from .chips import Chip, Topology
from .compiler import Program, compile_for
from .models import kinds_of_layers, vision_parameters, with_depth, with_layers
from .models import model_config as config_of
from .trace import DECODE, Graph, make_trainer, trace_step

CUT_DEPTHS = (2, 4)  # layers; each has a sliding and a full one
QUICK_MARGIN = 0.15  # of HBM, to be left by arithmetic: the compiler needs more than it says, see `report.CAVEAT`
NUMBERS = (
    "argument_bytes",
    "output_bytes",
    "alias_bytes",
    "temporary_bytes",
    "code_bytes",
    "flops",
    "hbm_traffic",
    "seconds",
)


@dataclass(frozen=True)
class Job:
    """What is planned: a model, its training, and the slice that it shall run on."""

    model: ModelConfig
    args: GRPOConfig
    topology: Topology

    @property
    def num_partitions(self) -> int:
        """Chips that the job uses."""
        return 1 if self.model.mesh is None else math.prod(self.model.mesh[0])

    @property
    def config(self) -> PretrainedConfig:
        return config_of(self.model.model_name)

    @property
    def rows(self) -> int:
        """Completions a step."""
        return self.args.per_device_train_batch_size * self.args.num_completions_per_prompt


@dataclass(frozen=True)
class Cut:
    """A model with few of the job's layers, whose graphs are compiled, or the whole one."""

    config: PretrainedConfig
    weight: float  # of its figures in the sum that is the whole model's figure

    @property
    def layers(self) -> str:
        """How many layers, and of which kinds: "4 (3 sliding_attention, 1 full_attention)"."""
        kinds = getattr(self.config, "layer_types", None) or []
        each = ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
        return f"{self.config.num_hidden_layers} ({each})" if each else str(self.config.num_hidden_layers)


@dataclass
class Traffic:
    """Collectives of one kind in one run of a graph."""

    count: float
    bytes: float  # that each chip sends


@dataclass
class GraphPlan:
    """One graph at the model's full depth. Bytes, operations and seconds are a chip's, in one run of it."""

    name: str
    runs: int  # times a step
    compiled_depths: list[int]  # one: the whole model; more: the figures are extrapolated
    error: str | None = None
    argument_bytes: float = 0.0
    output_bytes: float = 0.0  # those that take over no argument's buffer
    temporary_bytes: float = 0.0
    code_bytes: float = 0.0
    held_bytes: float = 0.0  # lies in HBM meanwhile, and the graph does not read it
    flops: float = 0.0
    hbm_traffic: float = 0.0  # bytes read from and written to HBM
    collectives: dict[str, Traffic] = field(default_factory=dict)
    compile_seconds: float = 0.0  # of all compilations of it
    compute_seconds: float = 0.0
    hbm_seconds: float = 0.0
    ici_seconds: float = 0.0

    @property
    def total_bytes(self) -> float:
        parts = (self.argument_bytes, self.output_bytes, self.temporary_bytes, self.code_bytes, self.held_bytes)
        return sum(parts)

    @property
    def bound_seconds(self) -> float:
        """One run takes at least this long, if the three overlap perfectly."""
        return max(self.compute_seconds, self.hbm_seconds, self.ici_seconds)

    def bound_by(self, chip: Chip) -> None:
        """Set how long one run takes at least, from each of the three."""
        self.compute_seconds = self.flops / chip.flops
        self.hbm_seconds = self.hbm_traffic / chip.hbm_bytes_per_second
        self.ici_seconds = sum(traffic.bytes for traffic in self.collectives.values()) / chip.ici_bytes_per_second

    @property
    def binds(self) -> str:
        """What the bound comes from."""
        times = {"compute": self.compute_seconds, "HBM": self.hbm_seconds, "interconnect": self.ici_seconds}
        return max(times, key=times.__getitem__)


@dataclass
class Plan:
    """A job's graphs on a slice."""

    job: Job
    graphs: list[GraphPlan]

    @property
    def chip(self) -> Chip:
        return self.job.topology.chip

    @property
    def worst(self) -> GraphPlan:
        """The graph that leaves least of HBM, or does not compile."""
        return max(self.graphs, key=lambda graph: (graph.error is not None, graph.total_bytes))

    @property
    def spare_fraction(self) -> float | None:
        """The part of a chip's HBM that no graph needs; below 0: so much is missing; None: a graph does not compile."""
        return None if self.worst.error else 1 - self.worst.total_bytes / self.chip.hbm_bytes

    @property
    def by_arithmetic(self) -> bool:
        """Nothing was compiled: `quick.quick_plan`."""
        return not any(graph.compiled_depths for graph in self.graphs)

    @property
    def fits(self) -> bool:
        """By arithmetic: probably."""
        return self.spare_fraction is not None and self.spare_fraction >= (QUICK_MARGIN if self.by_arithmetic else 0)

    @property
    def step_seconds(self) -> float:
        """A step takes at least this long, when every completion has full length."""
        return sum(graph.runs * graph.bound_seconds for graph in self.graphs)

    @property
    def decode_tokens_per_second(self) -> float:
        """At most so many tokens of all rows together, while decoding."""
        decode = next(graph for graph in self.graphs if graph.name == DECODE)
        return self.job.rows / decode.bound_seconds

    @property
    def step_tokens_per_second(self) -> float:
        """At most so many completion tokens a second over the whole step, when every completion has full length."""
        return self.job.rows * self.job.args.generation_max_length / self.step_seconds


def plan_job(job: Job, say: Callable[[str], None] = lambda text: None, whole: bool = False) -> Plan:
    """Trace and compile every graph of a job.

    Args:
        say: is told what is going on, since it takes minutes.
        whole: compile all layers, also of a model with more than `CUT_DEPTHS[1]`.

    Raises:
        ValueError: a setting that can't be, such as a mesh that does not divide the model.
    """
    full, plans = job.config.num_hidden_layers, []
    cuts = [Cut(job.config, 1.0)] if whole or full <= CUT_DEPTHS[1] else cuts_of(job)
    traced = [trace(job, cut.config) for cut in cuts]
    for graphs in zip(*traced, strict=True):
        programs = []
        for cut, graph in zip(cuts, graphs, strict=True):
            program = compile_for(job.topology, job.num_partitions, graph)
            took = "no" if program.error else f"{program.seconds:.0f} s"
            say(f"{graph.name}, {cut.layers} of {full} layers: {took}")
            programs.append(program)
            if program.error:
                break
        plans.append(plan_graph(job, cuts, graphs, programs))
    return Plan(job, plans)


def cuts_of(job: Job) -> list[Cut]:
    """The models with few layers that stand for a deep one."""
    config, (few, more) = job.config, CUT_DEPTHS
    kinds, count = kinds_of_layers(config), (job.args.max_prompt_length, job.args.generation_max_length - 1)
    if len({kept_tokens(window, *count) for window in layer_windows(config)}) == 1:
        slope = (config.num_hidden_layers - few) / (more - few)
        return [Cut(with_depth(config, few), 1 - slope), Cut(with_depth(config, more), slope)]
    repeated = more - few  # layers of one kind
    slopes = [(config.layer_types.count(kind) - 1) / repeated for kind in kinds]
    others = [Cut(with_layers(config, kinds + [k] * repeated), s) for k, s in zip(kinds, slopes, strict=True)]
    return [Cut(with_layers(config, kinds), 1 - sum(slopes)), *others]


def trace(job: Job, config: PretrainedConfig) -> list[Graph]:
    """The graphs of a step of the job, of this model in place of its own."""
    trainer = make_trainer(config, job.model, dataclasses.replace(job.args))
    graphs = trace_step(trainer)
    del trainer
    gc.collect()  # the zeros that stood for weights: the compiler needs the memory
    ctypes.CDLL(None).malloc_trim(0)  # which the C library would keep
    return graphs


def plan_graph(job: Job, cuts: Sequence[Cut], graphs: Sequence[Graph], programs: Sequence[Program]) -> GraphPlan:
    """Put together what was compiled: of each cut a graph and its program."""
    failed = next((program.error for program in programs if program.error), None)
    depths = [cut.config.num_hidden_layers for cut in cuts]
    result = GraphPlan(graphs[0].name, graphs[0].runs, depths, failed)
    result.compile_seconds = sum(program.seconds for program in programs)
    if failed:
        return result

    def at_full_depth(values: Sequence[float]) -> float:
        return max(0.0, sum(cut.weight * value for cut, value in zip(cuts, values, strict=True)))

    number = {name: at_full_depth([getattr(program, name) for program in programs]) for name in NUMBERS}
    for name in ("argument_bytes", "temporary_bytes", "code_bytes", "flops", "hbm_traffic"):
        setattr(result, name, number[name])
    result.output_bytes = max(0.0, number["output_bytes"] - number["alias_bytes"])
    vision = vision_parameters(job.model.model_name) * torch_dtype(job.model.model_dtype).itemsize
    result.held_bytes = max(0.0, at_full_depth([graph.live_bytes for graph in graphs]) - result.argument_bytes) + vision
    for kind in sorted({collective.kind for program in programs for collective in program.collectives}):
        alike = [[c for c in program.collectives if c.kind == kind] for program in programs]
        count = at_full_depth([len(found) for found in alike])
        sent = at_full_depth([sum(c.bytes for c in found) for found in alike])
        result.collectives[kind] = Traffic(count, sent)
    result.bound_by(job.topology.chip)
    return result


def job_of(argv: Sequence[str], topology: Topology, any_mesh: bool = False) -> Job:
    """The job that flags of `train.py` describe, `--config` among them.

    Args:
        any_mesh: whatever mesh the flags name is for another slice, perhaps; the job gets one of this slice.

    Raises:
        ValueError: an unknown setting, a value that can't be, a mesh of another size than the slice, or supervised
            fine-tuning, which is not planned.
    """
    if any_mesh:
        argv = [*argv, "--mesh_shape", f"1,{topology.num_chips}", "--mesh_axes", "fsdp,tp"]
    _check_mesh(argv, topology)
    device.plan_for_tpu()
    model, _, args = parse_job([*argv, "--device", "xla"])
    if not args.use_grpo:
        raise ValueError("use_grpo=False: only GRPO is planned; set use_grpo to true")
    return Job(model, args, topology)


def _check_mesh(argv: Sequence[str], topology: Topology) -> None:
    """Before the parser does, whose words are about the devices of this process."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "mesh_shape", "mesh_axes"):
        given.add_argument(f"--{name}")
    flags = vars(given.parse_known_args(argv)[0])
    settings = load_config(flags["config"]) if flags["config"] else {}
    settings |= {name: value for name, value in flags.items() if value is not None}
    mesh = ModelConfig(**{name: settings[name] for name in ("mesh_shape", "mesh_axes") if name in settings}).mesh
    chips = topology.num_chips
    if mesh is not None and math.prod(mesh[0]) not in (1, chips):
        fitting = " ".join(f"{chips // tp},{tp}" for tp in (2**i for i in range(9)) if tp <= chips)
        raise ValueError(
            f"mesh_shape={settings['mesh_shape']!r}: {math.prod(mesh[0])} devices, and {topology.name} has {chips} "
            f"chips; meshes of as many: {fitting}"
        )


def check_traceable() -> None:
    """Raises ValueError when this process can't trace a job's graphs."""
    if device.KIND != "xla":
        raise ValueError("the pre-flight traces with torch_xla: pip install 'torch-xla[tpu]==2.9.0'")
