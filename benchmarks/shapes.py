"""Repeat the comparison of `grpo_step.py` with many shapes of the batch, as the library shall be fast on all of them.

python -m benchmarks.shapes --peers ours,trl   # prompts, group size and lengths halved and doubled: the worst ratio
python -m benchmarks.shapes --growth           # ours alone from 4 to 64 prompts, and from 2 to 16 completions
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import utils

from .grpo_step import choose_peers, compare, describe_machine, make_spec
from .worker import PEERS
from .workload import PRESETS, Spec

VARIED = ("num_prompts", "num_completions", "prompt_length", "completion_length")
GROWTH = {"num_prompts": (4, 8, 16, 32, 64), "num_completions": (2, 4, 8, 16)}

LONG_RUN = 30  # steps of the run whose last steps are compared with its first


def variations(spec: Spec) -> dict[str, Spec]:
    """Return the spec itself, and the spec with each of its sizes halved and doubled, by a name for the table."""
    shapes = {"as it is": spec}
    for name in VARIED:
        for size in (getattr(spec, name) // 2, getattr(spec, name) * 2):
            shapes[f"{name}={size}"] = replace(spec, **{name: size})
    return shapes


def slopes(sizes: Sequence[int], seconds: Sequence[float]) -> list[float]:
    """Return what one more unit costs between neighbouring sizes, relative to the mean over all sizes.

    Growth is linear when all are 1, whatever the fixed cost of a step is.
    """
    pairs = list(zip(sizes, seconds, strict=True))
    costs = [(t1 - t0) / (n1 - n0) for (n0, t0), (n1, t1) in zip(pairs, pairs[1:], strict=False)]
    return [cost / ((seconds[-1] - seconds[0]) / (sizes[-1] - sizes[0])) for cost in costs]


def measure(peers: Sequence[str], spec: Spec, rounds: int, name: str) -> dict[str, Any]:
    """Measure one spec, whose name is printed first. Ends the program when a peer fails, whose error was printed."""
    print(f"\n{name}", flush=True)
    summary, errors = compare(peers, spec, rounds)
    if errors:
        sys.exit(1)
    return summary


def compare_shapes(peers: Sequence[str], spec: Spec, rounds: int) -> dict[str, Any]:
    """Print and return the ratio of each peer's time to the first peer's for each shape, and the smallest of them."""
    found = {name: measure(peers, shape, rounds, name) for name, shape in variations(spec).items()}
    others = peers[1:]
    print(f"\n| shape | {peers[0]}, s a step | " + " | ".join(f"{peer}, times as long" for peer in others) + " |")
    print("|---" * (2 + len(others)) + "|")
    for name, summary in found.items():
        ours = summary["peers"][peers[0]]["seconds_per_step"]["median"]
        cells = [f"{summary['ratios'][peer]['median']:.2f}" for peer in others]
        print(f"| {name} | {ours:.2f} | " + " | ".join(cells) + " |")
    worst = {peer: min((found[name]["ratios"][peer]["median"], name) for name in found) for peer in others}
    for peer, (ratio, name) in worst.items():
        print(f"worst beside {peer}: {ratio:.2f}, with {name}")
    return {"worst": worst, "shapes": found}


def measure_growth(spec: Spec, rounds: int) -> dict[str, Any]:
    """Print and return how this library's seconds a step grow with prompts, with completions, and over a longer run."""
    result: dict[str, Any] = {}
    for name, sizes in GROWTH.items():
        seconds = []
        for size in sizes:
            summary = measure(["ours"], replace(spec, **{name: size}), rounds, f"{name}={size}")
            seconds.append(summary["peers"]["ours"]["seconds_per_step"]["median"])
        result[name] = {"sizes": sizes, "seconds": seconds, "slopes": slopes(sizes, seconds)}
        print(f"\n| {name} | s a step | cost of one more, of the mean |\n|---|---|---|")
        for size, value, slope in zip(sizes, seconds, [None, *result[name]["slopes"]], strict=True):
            print(f"| {size} | {value:.2f} | {'' if slope is None else f'{slope:.2f}'} |")
    long_run = measure(["ours"], replace(spec, steps=LONG_RUN), 1, f"{LONG_RUN} steps")
    steps = long_run["peers"]["ours"]["rounds"][0]
    third = LONG_RUN // 3
    result["last_third_of_first"] = statistics.median(steps[-third:]) / statistics.median(steps[:third])
    print(f"\nthe last {third} of {LONG_RUN} steps take {result['last_third_of_first']:.2f} times as long as the first")
    return result


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: utils.fail(message)
    parser.add_argument("--peers", default="ours,trl", help=f"in this order, among {', '.join(PEERS)}")
    parser.add_argument("--preset", default="small", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--growth", action="store_true", help="how ours grows, in place of the comparison")
    parser.add_argument("--rounds", type=int, default=1, help="processes a peer and shape, in turns")
    for name, text in {
        "steps": "steps of a round that count",
        "warmup": "steps before them that do not count",
        "threads": "threads, and cores, that each peer gets; by default all",
    }.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.set_defaults(tokens_per_pass=None, **dict.fromkeys(VARIED))  # overrides of `make_spec` without a flag here
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args(sys.argv[1:])
    peers = choose_peers("ours" if args.growth else args.peers)
    if len(peers) < 2 and not args.growth:
        raise ValueError(f"peers={args.peers!r}: a comparison needs two")
    utils.check_output_file("json", args.json)
    spec = make_spec(args, peers)
    result = measure_growth(spec, args.rounds) if args.growth else compare_shapes(peers, spec, args.rounds)
    if args.json:
        result |= {"command": " ".join(["python -m benchmarks.shapes", *sys.argv[1:]]), "machine": describe_machine()}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    utils.run_script(main)
