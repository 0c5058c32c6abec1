"""Run one peer of `grpo_step.py` in a fresh process: `python -m benchmarks.worker PEER SPEC.json FOLDER RESULT.json`.

The process uses as many cores as the spec has threads. The parent process sets the environment variables, which must
exist before Python starts (see `environment`).
"""

import importlib
import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .workload import Spec, check_measured, read_spec

PEERS = {  # by name: the module, and the packages that it needs besides those of this library
    "ours": ("peer_ours", {}),
    "ours-xla": ("peer_ours", {"torch_xla": "torch-xla==2.9.0"}),
    "trl": ("peer_trl", {"trl": "trl==1.16.0"}),
    "tunix": ("peer_tunix", {"tunix": "google-tunix==0.1.7", "jax": "jax==0.10.2"}),
}
CPU_ONLY = ("ours-xla", "tunix")


@dataclass
class Measurement:
    """What a peer's `run` returns. All three lists begin with the warm-up steps."""

    steps: list[dict[str, float]]  # of each step, the seconds of each part
    completion_lengths: list[list[int]]  # of each step, the tokens of every row, with the one that ends it
    losses: list[float]
    peak_memory: int | None = None  # bytes on the device; None when the process's resident set counts


def environment(peer: str, spec: Spec) -> dict[str, str]:
    """Return the environment variables of a peer's process, which give it one device and the spec's threads."""
    threads = str(spec.threads)
    device = {"ours": spec.device, "ours-xla": "xla"}.get(peer)
    chosen = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "NPROC": threads,  # XLA's thread pool
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
    }
    if device is None:  # TRL or Tunix, for which Transformers would choose an XLA device if it saw one
        chosen |= {"USE_TORCH_XLA": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    else:
        chosen["TUNIX_DEVICE"] = device
    if device == "xla":
        chosen["PJRT_DEVICE"] = "CPU"
    inherited = {name: value for name, value in os.environ.items() if name not in ("USE_TORCH_XLA", "XLA_FLAGS")}
    return inherited | chosen


def keep_to_cores(count: int) -> None:
    """Restrict this process to the first `count` of the cores that it may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def as_result(spec: Spec, measured: Measurement) -> dict[str, Any]:
    """Return what the parent process reads. The warm-up steps are apart from those that count."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "steps": measured.steps[spec.warmup :],
        "warmup_steps": measured.steps[: spec.warmup],
        "completion_lengths": measured.completion_lengths[spec.warmup :],
        "losses": measured.losses,
        "peak_memory": measured.peak_memory or resident,
    }


def main() -> None:
    peer, spec_file, folder, result_file = sys.argv[1:]
    spec = read_spec(Path(spec_file))
    keep_to_cores(spec.threads)
    module = importlib.import_module(f".{PEERS[peer][0]}", __package__)
    measured = module.run(spec, Path(folder))
    assert len(measured.steps) == spec.warmup + spec.steps, f"{len(measured.steps)} steps"
    check_measured(spec, measured.completion_lengths, measured.losses)
    Path(result_file).write_text(json.dumps(as_result(spec, measured), indent=1) + "\n")


if __name__ == "__main__":
    main()
