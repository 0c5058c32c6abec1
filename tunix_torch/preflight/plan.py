"""Plan a job for a TPU slice: compile its graphs, and derive how much memory each needs and how fast it can be.

The compiler unrolls a model's layers, so that a deep model takes it many minutes and more memory than a workstation
has. A model of more than `CUT_DEPTHS[1]` layers is therefore compiled twice with few layers (two "cuts"), and every
figure is extrapolated linearly to the model's depth. Apart from choices of the compiler, figures do grow linearly: all
layers do the same work, those with a sliding window too (the window is only a mask), and what a learning pass keeps
of each layer exists when the head's gradient is computed. `tests/preflight` compares with 6 layers of Gemma 3 270m.
When sequences are longer than the window, layers with a window keep fewer keys while decoding than the others. A third
cut then tells how figures grow with each kind of layer.
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
from .graph import Graph
from .graph_names import DECODE
from .models import kinds_of_layers, vision_parameters, with_depth, with_layers
from .models import model_config as config_of
from .trace import make_trainer, trace_step

CUT_DEPTHS = (2, 4)  # layers of the two cuts; each cut has layers with a window and layers without
# The part of HBM that a plan by arithmetic must leave free, as the compiler may need more: see `report.CAVEAT`.
QUICK_MARGIN = 0.15
EXTRAPOLATED = (  # fields of `Program`
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
    """What is planned: a model, the settings of its training, and the slice on which it shall run."""

    model: ModelConfig
    args: GRPOConfig
    topology: Topology

    @property
    def num_partitions(self) -> int:
        """Number of chips that the job uses."""
        return 1 if self.model.mesh is None else math.prod(self.model.mesh[0])

    @property
    def config(self) -> PretrainedConfig:
        return config_of(self.model.model_name)

    @property
    def rows(self) -> int:
        """Number of completions in a training step."""
        return self.args.per_device_train_batch_size * self.args.num_completions_per_prompt


@dataclass(frozen=True)
class Cut:
    """A model whose graphs are compiled: the job's model with few of its layers, or with all of them."""

    config: PretrainedConfig
    weight: float  # the whole model's figure is the sum of each cut's figure times its weight

    @property
    def layers(self) -> str:
        """The number of layers, in all and of each kind: "4 (3 sliding_attention, 1 full_attention)"."""
        kinds = getattr(self.config, "layer_types", None) or []
        each = ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
        return f"{self.config.num_hidden_layers} ({each})" if each else str(self.config.num_hidden_layers)


@dataclass
class CollectiveTraffic:
    """All collectives of one kind in one run of a graph."""

    count: float
    bytes: float  # that each chip sends


@dataclass
class GraphPlan:
    """One graph at the model's full depth. Bytes, operations and seconds are those of one chip in one run of it."""

    name: str
    runs: int  # how often it runs in a training step
    compiled_depths: list[int]  # layers of each cut; with more than one cut, the figures are extrapolated
    error: str | None = None
    argument_bytes: float = 0.0
    output_bytes: float = 0.0  # of the outputs that do not overwrite an argument's buffer
    temporary_bytes: float = 0.0
    code_bytes: float = 0.0
    held_bytes: float = 0.0  # of what lies in HBM meanwhile and is no argument of the graph
    flops: float = 0.0
    hbm_traffic: float = 0.0  # bytes read from and written to HBM
    collectives: dict[str, CollectiveTraffic] = field(default_factory=dict)
    compile_seconds: float = 0.0  # of all its compilations together
    compute_seconds: float = 0.0  # this and the next two: the least time for its operations, HBM bytes and sent bytes
    hbm_seconds: float = 0.0
    ici_seconds: float = 0.0

    @property
    def total_bytes(self) -> float:
        parts = (self.argument_bytes, self.output_bytes, self.temporary_bytes, self.code_bytes, self.held_bytes)
        return sum(parts)

    @property
    def bound_seconds(self) -> float:
        """The least time of one run, in which computing, HBM traffic and communication overlap perfectly."""
        return max(self.compute_seconds, self.hbm_seconds, self.ici_seconds)

    def bound_by(self, chip: Chip) -> None:
        """Set the least seconds of one run that computing, HBM traffic and communication each need on this chip."""
        self.compute_seconds = self.flops / chip.flops
        self.hbm_seconds = self.hbm_traffic / chip.hbm_bytes_per_second
        self.ici_seconds = sum(traffic.bytes for traffic in self.collectives.values()) / chip.ici_bytes_per_second

    @property
    def binds(self) -> str:
        """What decides `bound_seconds`: "compute", "HBM" or "interconnect"."""
        times = {"compute": self.compute_seconds, "HBM": self.hbm_seconds, "interconnect": self.ici_seconds}
        return max(times, key=times.__getitem__)


@dataclass
class Plan:
    """All graphs of a job on a slice, and what follows from them for a training step."""

    job: Job
    graphs: list[GraphPlan]

    @property
    def chip(self) -> Chip:
        return self.job.topology.chip

    @property
    def worst(self) -> GraphPlan:
        """The graph that leaves the least HBM free, or one that does not compile."""
        return max(self.graphs, key=lambda graph: (graph.error is not None, graph.total_bytes))

    @property
    def spare_fraction(self) -> float | None:
        """The part of a chip's HBM that the largest graph leaves free.

        It is below 0 when HBM is missing, and None when a graph does not compile.
        """
        return None if self.worst.error else 1 - self.worst.total_bytes / self.chip.hbm_bytes

    @property
    def by_arithmetic(self) -> bool:
        """Whether nothing was compiled, as in `quick.quick_plan`."""
        return not any(graph.compiled_depths for graph in self.graphs)

    @property
    def fits(self) -> bool:
        """Whether every graph fits a chip's HBM; for a plan by arithmetic, whether it probably does."""
        return self.spare_fraction is not None and self.spare_fraction >= (QUICK_MARGIN if self.by_arithmetic else 0)

    @property
    def step_seconds(self) -> float:
        """The least time of a training step in which every completion has full length."""
        return sum(graph.runs * graph.bound_seconds for graph in self.graphs)

    @property
    def decode_tokens_per_second(self) -> float:
        """The most tokens a second, of all rows together, while decoding."""
        decode = next(graph for graph in self.graphs if graph.name == DECODE)
        return self.job.rows / decode.bound_seconds

    @property
    def step_tokens_per_second(self) -> float:
        """The most completion tokens a second over a whole step in which every completion has full length."""
        return self.job.rows * self.job.args.generation_max_length / self.step_seconds


def plan_job(job: Job, say: Callable[[str], None] = lambda text: None, whole: bool = False) -> Plan:
    """Trace and compile every graph of a job.

    Args:
        say: is called with a line of text whenever a graph was compiled, since the whole takes minutes.
        whole: compile all layers of the model, also when it has more than `CUT_DEPTHS[1]`.

    Raises:
        ValueError: a setting is impossible, such as a mesh that does not divide the model.
    """
    full, plans = job.config.num_hidden_layers, []
    cuts = [Cut(job.config, 1.0)] if whole or full <= CUT_DEPTHS[1] else cuts_of(job)
    traced = [trace_job(job, cut.config) for cut in cuts]
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
    """Return the models with few layers from which a deep model's figures are extrapolated."""
    config, (few, more) = job.config, CUT_DEPTHS
    kinds, count = kinds_of_layers(config), (job.args.max_prompt_length, job.args.generation_max_length - 1)
    if len({kept_tokens(window, *count) for window in layer_windows(config)}) == 1:
        slope = (config.num_hidden_layers - few) / (more - few)
        return [Cut(with_depth(config, few), 1 - slope), Cut(with_depth(config, more), slope)]
    repeated = more - few  # additional layers of one kind in each further cut
    slopes = [(config.layer_types.count(kind) - 1) / repeated for kind in kinds]
    others = [Cut(with_layers(config, kinds + [k] * repeated), s) for k, s in zip(kinds, slopes, strict=True)]
    return [Cut(with_layers(config, kinds), 1 - sum(slopes)), *others]


def trace_job(job: Job, config: PretrainedConfig) -> list[Graph]:
    """Return the graphs of a training step of the job, with this model in place of the job's own."""
    trainer = make_trainer(config, job.model, dataclasses.replace(job.args))
    graphs = trace_step(trainer)
    del trainer
    gc.collect()  # frees the tensors of zeros, since the compiler needs the memory
    ctypes.CDLL(None).malloc_trim(0)  # otherwise the C library would keep that memory in this process
    return graphs


def plan_graph(
    job: Job, cuts: Sequence[Cut], graphs: Sequence[Graph], programs: Sequence[Program], loads_vision: bool = True
) -> GraphPlan:
    """Return the figures of one graph at full depth, from the graph and the compiled program of each cut.

    Args:
        loads_vision: whether a model's vision tower is held, though no graph reads it, as Transformers loads it.
    """
    failed = next((program.error for program in programs if program.error), None)
    depths = [cut.config.num_hidden_layers for cut in cuts]
    result = GraphPlan(graphs[0].name, graphs[0].runs, depths, failed)
    result.compile_seconds = sum(program.seconds for program in programs)
    if failed:
        return result

    def at_full_depth(values: Sequence[float]) -> float:
        return max(0.0, sum(cut.weight * value for cut, value in zip(cuts, values, strict=True)))

    number = {name: at_full_depth([getattr(program, name) for program in programs]) for name in EXTRAPOLATED}
    for name in ("argument_bytes", "temporary_bytes", "code_bytes", "flops", "hbm_traffic"):
        setattr(result, name, number[name])
    result.output_bytes = max(0.0, number["output_bytes"] - number["alias_bytes"])
    vision = loads_vision * vision_parameters(job.model.model_name) * torch_dtype(job.model.model_dtype).itemsize
    result.held_bytes = max(0.0, at_full_depth([graph.live_bytes for graph in graphs]) - result.argument_bytes) + vision
    for kind in sorted({collective.kind for program in programs for collective in program.collectives}):
        alike = [[c for c in program.collectives if c.kind == kind] for program in programs]
        count = at_full_depth([len(found) for found in alike])
        sent = at_full_depth([sum(c.bytes for c in found) for found in alike])
        result.collectives[kind] = CollectiveTraffic(count, sent)
    result.bound_by(job.topology.chip)
    return result


def job_of(argv: Sequence[str], topology: Topology, any_mesh: bool = False) -> Job:
    """Return the job that flags of `train.py` describe, `--config` among them.

    Args:
        any_mesh: ignore the mesh in the flags, which may be for another slice; the job gets a mesh of this slice.

    Raises:
        ValueError: a setting is unknown, a value is impossible, the mesh has another size than the slice, or the
            flags ask for supervised fine-tuning or for training all weights, which are not planned.
    """
    if any_mesh:
        argv = [*argv, "--mesh_shape", f"1,{topology.num_chips}", "--mesh_axes", "fsdp,tp"]
    _check_mesh(argv, topology)
    device.plan_for_tpu()
    model, _, args = parse_job([*argv, "--device", device.KIND])
    if not args.use_grpo:
        raise ValueError("use_grpo=False: only GRPO is planned; set use_grpo to true")
    for name, planned in (("steps_per_generation", 1), ("dynamic_sampling", False)):
        value = getattr(args, name)
        if value != planned:
            raise ValueError(f"{name}={value}: a plan is of a step with one rollout of its own prompts; leave it out")
    if model.trains_all:
        raise ValueError("lora_rank=0: only training of a LoRA is planned; give a rank")
    return Job(model, args, topology)


def _check_mesh(argv: Sequence[str], topology: Topology) -> None:
    """Check the mesh before the parser of settings does, whose errors would name the devices of this process."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "mesh_shape", "mesh_axes"):
        given.add_argument(f"--{name}")
    flags = vars(given.parse_known_args(argv)[0])
    settings = load_config(flags["config"]) if flags["config"] else {}
    settings |= {name: value for name, value in flags.items() if value is not None}
    mesh = ModelConfig(**{name: settings[name] for name in ("mesh_shape", "mesh_axes") if name in settings}).mesh
    chips = topology.num_chips
    check_one_chip(mesh, f"mesh_shape={settings.get('mesh_shape')!r}")
    if mesh is not None and math.prod(mesh[0]) not in (1, chips):
        fitting = " ".join(f"{chips // tp},{tp}" for tp in (2**i for i in range(9)) if tp <= chips)
        raise ValueError(
            f"mesh_shape={settings['mesh_shape']!r}: {math.prod(mesh[0])} devices, and {topology.name} has {chips} "
            f"chips; meshes of as many: {fitting}"
        )


def check_traceable() -> None:
    """Raise ValueError when this process cannot trace a job's graphs, since torch_xla is missing."""
    if not device.traces_graphs():
        raise ValueError("the pre-flight traces with torch_xla: pip install 'torch-xla[tpu]==2.9.0'")


def check_one_chip(mesh: tuple[Sequence[int], Sequence[str]] | None, given: str) -> None:
    """Raise ValueError when a mesh of several chips is to be planned from the graphs of torch_tpu, which has none.

    Args:
        given: what asks for the mesh, as words.
    """
    if device.graph_dialect() == "stablehlo" and mesh is not None and math.prod(mesh[0]) > 1:
        hint = "plan it in torch-xla's environment (make setup), or leave the mesh out"
        raise ValueError(f"{given}: the graphs of torch_tpu are those of one chip; {hint}")
