"""Turn the peers' measurements into figures: minimum, median, maximum, ratios, and a table. All functions are pure."""

import statistics
from collections.abc import Sequence
from typing import Any

from .stopwatch import PARTS
from .workload import Spec

Result = dict[str, Any]  # of a worker, see `worker.as_result`


def spread_of(values: Sequence[float]) -> dict[str, float]:
    """Return the minimum, the median and the maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def step_seconds(result: Result) -> list[float]:
    """Return the seconds of each step that counts."""
    return [sum(parts.values()) for parts in result["steps"]]


def summarise_peer(results: Sequence[Result]) -> dict[str, Any]:
    """Return one peer's figures over all steps of all its rounds."""
    seconds = [value for result in results for value in step_seconds(result)]
    rows = [row for result in results for row in result["completion_lengths"]]  # a list of lengths for each step
    tokens = [sum(row) for row in rows]
    steps = [parts for result in results for parts in result["steps"]]
    timed = set().union(*steps)
    return {
        "seconds_per_step": spread_of(seconds),
        "parts": {  # None for a part that this peer cannot be timed for
            name: spread_of([parts.get(name, 0.0) for parts in steps]) if name in timed else None for name in PARTS
        },
        "tokens_per_second": spread_of([count / value for count, value in zip(tokens, seconds, strict=True)]),
        "peak_memory_bytes": max(result["peak_memory"] for result in results),
        "completions_per_step": len(rows[0]),
        "tokens_per_step": tokens[0],
        "first_step_seconds": spread_of([sum((r["warmup_steps"] + r["steps"])[0].values()) for r in results]),
        "losses": [result["losses"] for result in results],
        "rounds": [step_seconds(result) for result in results],
    }


def ratios(peer: Sequence[Result], ours: Sequence[Result]) -> dict[str, float]:
    """Return the spread of how many times as long the peer takes as `ours`.

    Medians of the same round are compared, so that a machine that gets slower between rounds changes nothing.
    """
    pairs = zip(peer, ours, strict=False)  # a peer that failed has fewer rounds
    medians = [(statistics.median(step_seconds(a)), statistics.median(step_seconds(b))) for a, b in pairs]
    return spread_of([a / b for a, b in medians])


def check_same_work(spec: Spec, results: dict[str, list[Result]]) -> None:
    """Raise AssertionError unless all peers generated completions of the same lengths, row by row."""
    found = {
        peer: {tuple(row) for result in rounds for row in result["completion_lengths"]}
        for peer, rounds in results.items()
    }
    kinds = set().union(*found.values())
    assert len(kinds) <= 1, f"the peers generated different numbers of tokens: {found}"


def summarise(spec: Spec, results: dict[str, list[Result]]) -> dict[str, Any]:
    """Return all figures of the peers with at least one round, which `--json` writes. Ratios are to the first peer."""
    check_same_work(spec, results)
    first = next(iter(results), None)
    return {
        "peers": {peer: summarise_peer(rounds) for peer, rounds in results.items()},
        "ratios": {peer: ratios(rounds, results[first]) for peer, rounds in results.items() if peer != first},
        "ratios_to": first,
    }


def _cell(value: dict[str, float] | None, digits: int) -> str:
    return "-" if value is None else f"{value['median']:.{digits}f}"


def table(summary: dict[str, Any]) -> str:
    """Return the table of medians as text, with the spread of the seconds a step and of the ratios."""
    header = ["peer", "s/step (min .. max)", *PARTS, "tokens/s", "peak GiB"]
    lines = [header]
    for peer, figures in summary["peers"].items():
        seconds = figures["seconds_per_step"]
        lines.append(
            [
                peer,
                f"{seconds['median']:.3f} ({seconds['min']:.3f} .. {seconds['max']:.3f})",
                *(_cell(figures["parts"][name], 3) for name in PARTS),
                _cell(figures["tokens_per_second"], 0),
                f"{figures['peak_memory_bytes'] / 2**30:.2f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for peer, ratio in summary["ratios"].items():
        spread = f"min {ratio['min']:.2f}, max {ratio['max']:.2f}"
        rows.append(f"{peer} takes {ratio['median']:.2f} times as long as {summary['ratios_to']} ({spread})")
    return "\n".join(rows)
