"""Print a plan for people, or give it as JSON: memory and speed of its graphs, and whether the job fits the slice."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..runtime import device
from .chips import GiB
from .graph_names import DECODE, LEARN, OLD, PREFILL, REFERENCE
from .plan import GraphPlan, Job, Plan
from .quick import mesh_sizes

# Measured on the learning pass of configs/gemma2_2b_v5e8.json on v5e:2x4: 9.21 GiB compiled, 7.61 by arithmetic.
CAVEAT = "by arithmetic, and the compiler needed up to a quarter more for the one job where both are known"


def lines_of(plan: Plan) -> list[str]:
    """Return the report as lines of text; the last one is the verdict."""
    compiled = [graph for graph in plan.graphs if not graph.error]
    return [
        *_lines_about_job(plan.job),
        "",
        *_memory_table(plan),
        "",
        *_speed_table(compiled),
        "",
        *_collectives_table(compiled),
        *_notes(plan, compiled),
        verdict(plan),
    ]


def _lines_about_job(job: Job) -> list[str]:
    mesh = job.model.mesh
    over = f"mesh {job.model.mesh_shape} ({job.model.mesh_axes})" if mesh else "one chip (mesh_shape is not set)"
    args = job.args
    return [
        f"{job.model.model_name}, LoRA {job.model.lora_rank}, on {job.topology.name}, {over}",
        f"{args.per_device_train_batch_size} prompts of {args.max_prompt_length} tokens, "
        f"{args.num_completions_per_prompt} completions each of {args.generation_max_length} tokens, "
        f"micro-batches of {args.rows_per_pass or job.rows}, {args.num_iterations} iteration(s)",
    ]


def _memory_table(plan: Plan) -> list[str]:
    lines = [
        f"HBM a chip, GiB of {plan.chip.hbm_bytes / GiB:.2f}",
        f"{'graph':<29}{'arguments':>10}{'outputs':>9}{'temporary':>10}{'code':>7}{'held':>7}{'total':>8}",
    ]
    for graph in plan.graphs:
        if graph.error:
            lines.append(f"{graph.name:<29}does not compile: {first_line(graph.error)}")
            continue
        parts = (graph.argument_bytes, graph.output_bytes, graph.temporary_bytes, graph.code_bytes, graph.held_bytes)
        widths = (10, 9, 10, 7, 7)
        numbers = "".join(f"{part / GiB:>{width}.2f}" for part, width in zip(parts, widths, strict=True))
        lines.append(f"{graph.name:<29}{numbers}{graph.total_bytes / GiB:>8.2f}")
    return lines


def _speed_table(compiled: Sequence[GraphPlan]) -> list[str]:
    lines = [
        "Of one run of each graph, a chip",
        f"{'graph':<29}{'runs':>5}{'TFLOP':>9}{'HBM GB':>9}{'sent MB':>9}  at least, of which what binds",
    ]
    for graph in compiled:
        sent = sum(traffic.bytes for traffic in graph.collectives.values())
        lines.append(
            f"{graph.name:<29}{graph.runs:>5}{graph.flops / 1e12:>9.3f}{graph.hbm_traffic / 1e9:>9.2f}"
            f"{sent / 1e6:>9.1f}  {graph.bound_seconds * 1e3:.2f} ms, {graph.binds} "
            f"(compute {graph.compute_seconds * 1e3:.2f}, HBM {graph.hbm_seconds * 1e3:.2f}, "
            f"interconnect {graph.ici_seconds * 1e3:.2f})"
        )
    return lines


def _collectives_table(compiled: Sequence[GraphPlan]) -> list[str]:
    lines = ["Collectives in one run of each graph: number, MB that a chip sends"]
    for graph in compiled:
        parts = [f"{kind} {t.count:.0f}, {t.bytes / 1e6:.1f} MB" for kind, t in graph.collectives.items()]
        lines.append(f"{graph.name:<29}{'; '.join(parts) or 'none'}")
    return lines


def _notes(plan: Plan, compiled: Sequence[GraphPlan]) -> list[str]:
    """Return the lines that say where the figures come from, and the bounds of a training step."""
    job, chip, lines = plan.job, plan.chip, []
    if any(not graph.compiled_depths for graph in compiled):
        lines += ["", "By arithmetic: nothing was compiled, and what XLA keeps besides is estimated."]
    depths = next((graph.compiled_depths for graph in compiled if len(graph.compiled_depths) > 1), None)
    lines.append("")
    if depths:
        lines.append(
            f"Compiled with {', '.join(map(str, depths[:-1]))} and {depths[-1]} of the model's "
            f"{job.config.num_hidden_layers} layers; every figure is extrapolated linearly"
            f"{', for each kind of layer' * (len(depths) > 2)}."
        )
    if compiled and not plan.by_arithmetic and device.graph_dialect() == "stablehlo":
        lines.append("Graphs of torch_tpu. All but decoding runs in several programs, and is planned as one each.")
    lines.append(
        f"Peaks of {chip.name}: {chip.flops / 1e12:.0f} bfloat16 TFLOP/s, {chip.hbm_bytes_per_second / 1e9:.0f} GB/s "
        f"of HBM, {chip.ici_bytes_per_second / 1e9:.0f} GB/s sent (source: preflight/chips.py)."
    )
    if not plan.worst.error:
        lines.append(
            "Bounds, not predictions, with the KV cache at its widest throughout: a step takes at least "
            f"{plan.step_seconds:.1f} s; at most "
            f"{plan.decode_tokens_per_second:,.0f} tokens/s while decoding, {plan.step_tokens_per_second:,.0f} "
            "completion tokens/s over the whole step."
        )
    return lines


def verdict(plan: Plan) -> str:
    """Return the report's last line: the job fits with so much to spare; or it does not, and what to change first."""
    where = f"{plan.job.topology.name}"
    worst = plan.worst
    if worst.error:
        return f"Does not fit {where}: {worst.name} does not compile. First: {first_change(plan)}"
    spare, caveat = plan.spare_fraction, f"; {CAVEAT}" if plan.by_arithmetic else ""
    if spare < 0:
        return (
            f"Does not fit {where}: {worst.name} needs {-spare:.0%} more HBM than there is. "
            f"First: {first_change(plan)}{caveat}"
        )
    if not plan.fits:
        return f"May not fit {where}: run without --quick. {worst.name} leaves {spare:.0%} of HBM{caveat}"
    fits = "Probably fits" if plan.by_arithmetic else "Fits"
    return f"{fits} {where} with {spare:.0%} of HBM to spare (least in {worst.name}){caveat}"


def first_change(plan: Plan) -> str:
    """Return the change of a setting that frees the most HBM in the graph that needs the most."""
    args, worst, job = plan.job.args, plan.worst, plan.job
    group, prompts, rows = (
        args.num_completions_per_prompt,
        args.per_device_train_batch_size,
        args.rows_per_pass or job.rows,
    )
    fsdp = mesh_sizes(job)["fsdp"]
    weights = not worst.error and worst.argument_bytes + worst.held_bytes > 0.7 * plan.chip.hbm_bytes
    if not weights and worst.name in (LEARN, REFERENCE, OLD):
        smaller = [
            n for n in range(fsdp, rows // 2 + 1, fsdp) if group % n == 0 or (n % group == 0 and job.rows % n == 0)
        ]
        if smaller:  # multiples of fsdp only: other rows would lie whole on every chip
            return f"micro_batch_size={smaller[-1]} in place of {rows}"
        if worst.name == LEARN and not args.gradient_checkpointing:
            return "gradient_checkpointing=true"
    fewer = prompts // 2 // fsdp * fsdp
    if not weights and worst.name in (PREFILL, DECODE) and fewer:
        return f"per_device_train_batch_size={fewer}"
    return "a mesh_shape with a larger tp, or a larger slice"


def first_line(error: str) -> str:
    """Return the compiler's error as one line of at most 300 characters."""
    return " ".join(error.split())[:300]


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan for JSON: `fits`, `spare_fraction`, `graphs` and more. Figures are bytes, seconds and counts."""
    return {
        "fits": plan.fits,
        "spare_fraction": plan.spare_fraction,
        "verdict": verdict(plan),
        "topology": plan.job.topology.name,
        "mesh_shape": plan.job.model.mesh_shape,
        "step_seconds_at_least": None if plan.worst.error else plan.step_seconds,
        "decode_tokens_per_second_at_most": None if plan.worst.error else plan.decode_tokens_per_second,
        "graphs": [_graph_as_dict(graph) for graph in plan.graphs],
    }


def _graph_as_dict(graph: GraphPlan) -> dict[str, Any]:
    derived = {"total_bytes": graph.total_bytes, "bound_seconds": graph.bound_seconds, "binds": graph.binds}
    return asdict(graph) | derived
