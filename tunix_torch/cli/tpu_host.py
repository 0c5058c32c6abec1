"""Looks, before a job starts, whether its machine has what it needs: a device, libtpu, the model, room on the disk."""

import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.files import load_config
from ..config.model import TINY_NAME
from ..runtime import choice
from .script import values_of

# The slices that one host can be, as `preflight.chips.parse_topology` takes them: by chip and number of chips.
TOPOLOGIES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4"},
    "v5p": {1: "1x1x1", 4: "2x2x1"},
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # one is in the cache when a model is
LEAST_FREE = 2**30  # bytes that a run's folder needs: checkpoints of a LoRA, metrics


def verify_tpu_setup() -> dict[str, Any]:
    """What this process computes on, after a small matrix product there whose result is checked."""
    import torch

    from ..runtime import device, mesh

    ones = torch.ones(8, 8, device=device.torch_device())
    total = float((ones @ ones).sum().cpu())
    assert total == 512.0, f"the device multiplied wrongly: {total}"
    return {"kind": device.KIND, "tpu": device.is_tpu(), "description": mesh.describe(), "torch": torch.__version__}


def check_tpu_host(argv: Sequence[str]) -> str | None:
    """What a job with these flags needs of this host: a TPU, the libtpu that fits, the model, room on the disk.

    Says on standard error what it finds. Computes nothing, and leaves the TPU to the job.

    Returns:
        the slice that this host is, such as "v5e:2x4"; None without a TPU, or where it can't be planned.

    Raises:
        ValueError: something is missing, and the job would fail over it.
    """
    given = values_of(("--model_name", "--model_size", "--output_dir", "--config"), argv)
    settings = load_config(given["--config"]) if given.get("--config") else {}
    settings |= {name.removeprefix("--"): value for name, value in given.items()}
    topology = _find_tpu()
    size = settings.get("model_size")
    name = f"google/gemma-3-{size}-it" if size else settings.get("model_name") or TINY_NAME
    needed = {Path(settings.get("output_dir") or "./outputs"): LEAST_FREE} | _find_model(name)
    for folder, least in needed.items():
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if free < least:
            raise ValueError(f"{folder}: {free / 2**30:.1f} GiB free, and {least / 2**30:.1f} GiB are needed")
        _say("disk", f"{free / 2**30:.0f} GiB free for {folder}")
    return topology


def _say(what: str, found: str) -> None:
    print(f"{what:<8} {found}", file=sys.stderr)


def _find_tpu() -> str | None:
    """The slice that this host is; None without a TPU, or where it can't be planned."""
    chips = choice.tpu_chips()
    if not chips:
        if choice.tpu_backend() == "tpu":
            raise ValueError("no TPU was found on this machine, and torch_tpu computes on nothing else: device='cpu'")
        _say("TPU", "No TPU was found on this machine: running the same graphs through XLA on the CPU.")
        return None
    _say("TPU", f"{len(chips)} chip(s), {chips[0]}")
    _say("libtpu", f"{choice.check_libtpu()}, as {choice.PACKAGES[choice.tpu_backend()]} needs it")
    shape = TOPOLOGIES.get(chips[0], {}).get(len(chips))
    return f"{chips[0]}:{shape}" if shape else None


def _find_model(name: str) -> dict[Path, int]:
    """Say where the model is. Returns the folder that it will be downloaded to, with the bytes that it needs there."""
    from huggingface_hub import constants, try_to_load_from_cache

    if name == TINY_NAME or Path(name).exists():
        _say("model", f"{name} is here")
        return {}
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHTS):
        _say("model", f"{name} is in the cache, {constants.HF_HUB_CACHE}")
        return {}
    _say("model", f"{name} is not in the cache and will be downloaded to {constants.HF_HUB_CACHE}")
    billions = re.search(r"(\d+(?:\.\d+)?)([mb])\b", name.lower())
    if billions is None:
        return {}
    return {Path(constants.HF_HUB_CACHE): int(float(billions[1]) * {"m": 2e6, "b": 2e9}[billions[2]])}  # bfloat16
