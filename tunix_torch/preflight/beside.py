"""A table of the same training step by this library and by Google's Tunix, both compiled for the same slice.

Both sides are measured alike: operations and memory by the compiler's own report, bytes from and to HBM and what chips
send by the text of the compiled programs (`traffic.py`, `hlo.py`). The time is a bound and no prediction: the largest
of the times that operations, HBM and the interconnect need, and a stated cost for each collective.
"""

from dataclasses import asdict, dataclass
from typing import Any

from .chips import GiB
from .graph_names import LEARN, OPTIMIZER
from .plan import GraphPlan, Plan
from .report import first_line
from .tunix_plan import TunixPlan, seconds_of

OURS, TUNIX = "ours", "Tunix"


@dataclass
class Stage:
    """What one side does in one stage of a step. All but `step_seconds` is of one run, on one chip."""

    name: str
    side: str  # OURS or TUNIX
    runs: int
    flops: float
    hbm_traffic: float
    collectives: float  # how many
    sent_bytes: float
    memory_bytes: float
    seconds: float  # at least
    binds: str
    error: str | None = None

    @property
    def step_seconds(self) -> float:
        """The least time of all runs in a step."""
        return self.runs * self.seconds


@dataclass
class Comparison:
    """Both sides' stages of a training step."""

    plan: Plan
    tunix: TunixPlan
    collective_seconds: float

    @property
    def sides(self) -> list[tuple[str, list[GraphPlan]]]:
        return [(OURS, self.plan.graphs), (TUNIX, self.tunix.graphs)]

    @property
    def stages(self) -> list[Stage]:
        """The stages in the order in which they run, each once for each side."""
        found = [_stage(graph, side, self.collective_seconds) for side, graphs in self.sides for graph in graphs]
        order = list(dict.fromkeys(stage.name for stage in found if stage.side == OURS))
        return sorted(found, key=lambda stage: (order.index(stage.name), stage.side == TUNIX))

    def step_seconds(self, side: str) -> float:
        """The least time of a training step in which every completion has full length."""
        return sum(stage.step_seconds for stage in self.stages if stage.side == side)

    @property
    def ratios(self) -> dict[str, float]:
        """Our least time of each stage of a step in parts of Tunix's. Tunix's learning includes the optimizer."""
        seconds: dict[tuple[str, str], float] = {}
        for stage in self.stages:
            key = (LEARN if stage.name == OPTIMIZER else stage.name, stage.side)
            seconds[key] = seconds.get(key, 0.0) + stage.step_seconds
        return {name: value / seconds[name, TUNIX] for (name, side), value in seconds.items() if side == OURS}


def _stage(graph: GraphPlan, side: str, collective_seconds: float) -> Stage:
    traffic = graph.collectives.values()
    return Stage(
        name=graph.name,
        side=side,
        runs=graph.runs,
        flops=graph.flops,
        hbm_traffic=graph.hbm_traffic,
        collectives=sum(one.count for one in traffic),
        sent_bytes=sum(one.bytes for one in traffic),
        memory_bytes=graph.total_bytes,
        seconds=seconds_of(graph, collective_seconds),
        binds=graph.binds,
        error=graph.error,
    )


def lines_of(comparison: Comparison) -> list[str]:
    """Return the table as lines of text; the last one is the whole step."""
    job, plan = comparison.plan.job, comparison.plan
    mesh = f"mesh {job.model.mesh_shape} ({job.model.mesh_axes})" if job.model.mesh else "one chip"
    lines = [
        f"{job.model.model_name}, LoRA {job.model.lora_rank}, {job.rows} rows of {job.args.max_prompt_length} + "
        f"{job.args.generation_max_length} tokens, {job.args.num_iterations} iteration(s), on {job.topology.name}, "
        f"{mesh}",
        f"Tunix: {comparison.tunix.settings}",
        "",
        f"{'of one run, a chip':<28}{'side':<6}{'runs':>5}{'TFLOP':>8}{'HBM GB':>8}{'coll.':>7}{'sent MB':>9}"
        f"{'GiB':>7}{'ms':>9}  {'binds':<13}{'step s':>7}",
    ]
    for stage in comparison.stages:
        lines.append(_line(stage, plan.chip.hbm_bytes))
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in comparison.ratios.items())
    ours, tunix = comparison.step_seconds(OURS), comparison.step_seconds(TUNIX)
    return [
        *lines,
        "",
        f"Bounds, not predictions: the largest of operations, HBM and interconnect, and "
        f"{comparison.collective_seconds * 1e6:g} us a collective.",
        f"Ours in parts of Tunix's: {ratios}.",
        f"A step takes at least {ours:.3f} s here and {tunix:.3f} s in Tunix: {ours / tunix:.2f} of it.",
    ]


def _line(stage: Stage, hbm_bytes: int) -> str:
    if stage.error:
        return f"{stage.name:<28}{stage.side:<6}{stage.runs:>5}  does not compile: {first_line(stage.error)}"
    return (
        f"{stage.name:<28}{stage.side:<6}{stage.runs:>5}{stage.flops / 1e12:>8.3f}{stage.hbm_traffic / 1e9:>8.2f}"
        f"{stage.collectives:>7.0f}{stage.sent_bytes / 1e6:>9.1f}{stage.memory_bytes / GiB:>7.2f}"
        f"{stage.seconds * 1e3:>9.3f}  {stage.binds:<13}{stage.step_seconds:>7.3f}"
        + (" (does not fit)" if stage.memory_bytes > hbm_bytes else "")
    )


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison for JSON. Figures are bytes, operations, seconds and counts."""
    job = comparison.plan.job
    return {
        "model_name": job.model.model_name,
        "topology": job.topology.name,
        "mesh_shape": job.model.mesh_shape,
        "collective_seconds": comparison.collective_seconds,
        "stages": [asdict(stage) | {"step_seconds": stage.step_seconds} for stage in comparison.stages],
        "ratios": comparison.ratios,
        "step_seconds": {side: comparison.step_seconds(side) for side in (OURS, TUNIX)},
        "tunix_settings": comparison.tunix.settings,
        "tunix_attempts": [asdict(attempt) for attempt in comparison.tunix.attempts],
        "collectives": {
            side: {graph.name: {kind: asdict(t) for kind, t in graph.collectives.items()} for graph in graphs}
            for side, graphs in comparison.sides
        },
    }
