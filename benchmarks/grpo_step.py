"""Compare the seconds of a GRPO step in this library, TRL and Tunix, which do the same work in turns.

python -m benchmarks.grpo_step --peers ours,trl,tunix
python -m benchmarks.grpo_step --preset long --json long.json
python -m benchmarks.grpo_step --peers ours-xla,tunix --num_prompts 16
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import utils

from .summary import Result, step_seconds, summarise, table
from .worker import CPU_ONLY, PEERS, environment
from .workload import PRESETS, Spec, check_spec, write_spec

OVERRIDES = {
    "num_prompts": "prompts a step",
    "num_completions": "completions a prompt",
    "prompt_length": "tokens of every prompt",
    "completion_length": "tokens of a completion at most",
    "steps": "steps of a round that count",
    "warmup": "steps before them that do not count",
    "threads": "threads, and cores, that each peer gets; by default all",
    "tokens_per_pass": "tokens of a learning pass of TRL and Tunix; by default what was fastest for each",
}
ROOT = Path(__file__).parent.parent
TAIL = 12  # how many of the last lines of a failed peer's output are shown


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grpo_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: utils.fail(message)
    parser.add_argument("--peers", default="ours,trl,tunix", help=f"in this order, among {', '.join(PEERS)}")
    parser.add_argument("--preset", default="small", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--rounds", type=int, default=3, help="processes a peer, in turns")
    for name, text in OVERRIDES.items():
        parser.add_argument(f"--{name}", type=int, help=text)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args(argv)


def choose_peers(names: str) -> list[str]:
    """Return the peers of a list such as "ours,trl".

    Raises:
        ValueError: a peer does not exist, is named twice, or is not installed.
    """
    peers = [name.strip() for name in names.split(",")]
    for peer in peers:
        if peer not in PEERS:
            raise ValueError(f"peers={names!r}: choose among {', '.join(PEERS)}")
        needed = PEERS[peer][1]
        missing = [what for module, what in needed.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ValueError(f"peer {peer!r} is not installed: pip install {' '.join(missing)}")
    if len(set(peers)) < len(peers):
        raise ValueError(f"peers={names!r}: name each once")
    return peers


def make_spec(args: argparse.Namespace, peers: Sequence[str]) -> Spec:
    """Return the preset with the changes of the command line.

    Raises:
        ValueError: there is no such preset, a number is out of range, or the device is not available.
    """
    if args.preset not in PRESETS:
        raise ValueError(f"preset={args.preset!r}: choose among {', '.join(PRESETS)}")
    if args.rounds < 1:
        raise ValueError(f"rounds={args.rounds}: must be at least 1")
    cores = len(os.sched_getaffinity(0))
    given = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    spec = replace(PRESETS[args.preset], **({"threads": cores} | given))
    check_spec(spec)
    if spec.threads > cores:
        raise ValueError(f"threads={spec.threads}: this process may use {cores} cores")
    if spec.device == "cuda":
        without = [peer for peer in peers if peer in CPU_ONLY]
        if without:
            raise ValueError(f"preset={spec.preset!r} runs on CUDA, and {without[0]!r} on the CPU: --peers ours,trl")
        if not _has_cuda():
            raise ValueError(f"preset={spec.preset!r} needs CUDA, and PyTorch sees no CUDA device here")
    return spec


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run_peer(peer: str, spec: Spec, spec_file: Path) -> Result | str:
    """Return what the peer measured, or the end of its output when it failed. Inputs are beside the spec's file."""
    folder = spec_file.parent
    result_file = folder / f"{peer}.json"
    result_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.worker", peer, str(spec_file), str(folder), str(result_file)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(peer, spec), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0 or not result_file.is_file():
        return "\n".join([f"exit code {done.returncode}", *done.stdout.strip().splitlines()[-TAIL:]])
    return json.loads(result_file.read_text())


def run_rounds(
    peers: Sequence[str], spec: Spec, spec_file: Path, rounds: int
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """Run the peers in turns (A B C A B C ...), so that a change of the machine's speed meets all of them.

    Returns:
        each peer's results, and the errors of the peers that failed. Those get no further round.
    """
    results: dict[str, list[Result]] = {peer: [] for peer in peers}
    errors: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for peer in peers:
            if peer in errors:
                continue
            started = time.perf_counter()
            result = run_peer(peer, spec, spec_file)
            if isinstance(result, str):
                errors[peer] = result
                print(f"round {number}, {peer}: failed\n{result}", file=sys.stderr, flush=True)
                continue
            results[peer].append(result)
            seconds = ", ".join(f"{value:.3f}" for value in step_seconds(result))
            print(f"round {number}, {peer}: {seconds} s ({time.perf_counter() - started:.0f} s in all)", flush=True)
    return {peer: found for peer, found in results.items() if found}, errors


def describe_machine(device: str = "cpu") -> dict[str, str]:
    """Return the processor, its cores, the versions of the libraries, and the GPU when `device` is "cuda"."""
    from importlib.metadata import PackageNotFoundError, version

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    versions = {}
    for package in ("torch", "transformers", "peft", "trl", "torch_xla", "jax", "google-tunix"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    machine = {"processor": f"{model}, {len(os.sched_getaffinity(0))} cores"}
    if device == "cuda":
        import torch

        machine["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return machine | versions


def compare(peers: Sequence[str], spec: Spec, rounds: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return all figures of one spec (see `summary.summarise`), and the errors of the peers that failed."""
    with tempfile.TemporaryDirectory(prefix="tunix-torch-bench-") as name:
        folder = Path(name)
        spec_file = folder / "spec.json"
        write_spec(spec, spec_file)
        make = [sys.executable, "-m", "benchmarks.workload", str(spec_file), str(folder)]
        subprocess.run(make, cwd=ROOT, env=environment("trl", spec), check=True)
        results, errors = run_rounds(peers, spec, spec_file, rounds)
    about = {"errors": errors, "spec": asdict(spec), "machine": describe_machine(spec.device)}
    return summarise(spec, results) | about, errors


def main() -> None:
    args = parse_args(sys.argv[1:])
    peers = choose_peers(args.peers)
    spec = make_spec(args, peers)
    utils.check_output_file("json", args.json)
    print(
        f"{spec.preset}: {spec.num_prompts} prompts x {spec.num_completions} completions, {spec.prompt_length} + "
        f"{spec.completion_length} tokens{' at most' if spec.spread else ''}, {spec.dtype} on {spec.device}, "
        f"{spec.threads} thread(s); {args.rounds} rounds of {spec.warmup} + {spec.steps} steps",
        flush=True,
    )
    summary, errors = compare(peers, spec, args.rounds)
    summary["command"] = " ".join(["python -m benchmarks.grpo_step", *sys.argv[1:]])
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    if summary["peers"]:
        print(f"\n{table(summary)}")
    if errors:
        sys.exit(1)


if __name__ == "__main__":
    utils.run_script(main)
