"""Parts of `first_gpu.sh`: the machine, decoding against the memory's bandwidth, and the join of what all have written.

python -m benchmarks.first_gpu environment FILE
python -m benchmarks.first_gpu decode 270m FILE     # with TUNIX_DEVICE=cpu the tiny model takes its place
python -m benchmarks.first_gpu join FOLDER          # first_gpu.json and first_gpu.png from the files of all parts
"""

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import utils

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl")
SIZES = ("270m", "1b")
PROMPTS, COMPLETIONS, PROMPT_LENGTH, LENGTH = 16, 8, 256, 256  # N, G, P and C of the decoding that is measured
SMALL = 2, 2, 8, 16  # the same on a CPU
COPIED = {"cuda": 2**30, "cpu": 2**22}  # bytes of the copy by which the bandwidth is measured
REPEATS = 5


def environment() -> dict[str, Any]:
    """Describe the machine: the GPU and its driver as nvidia-smi says, and the versions of the packages."""
    from tunix_torch import device

    found: dict[str, Any] = {"device": device.describe(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.KIND == "cuda":
        import torch

        query = "name,driver_version,memory.total,clocks.max.mem,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        found |= {"capability": torch.cuda.get_device_capability(), "cuda": torch.version.cuda}
    return found


def bandwidth(num_bytes: int) -> float:
    """Measure the bytes a second that a copy within the device's memory reads and writes together: the best of five."""
    import torch

    from tunix_torch.runtime import device

    source = torch.ones(num_bytes // 4, device=device.torch_device())
    target = torch.empty_like(source)
    seconds = []
    for _ in range(REPEATS + 1):  # the first one does not count
        device.wait()
        started = time.perf_counter()
        target.copy_(source)
        device.wait()
        seconds.append(time.perf_counter() - started)
    return 2 * num_bytes / min(seconds[1:])


def bytes_of_a_step(model: Any, num_prompts: int, num_rows: int, prompt_length: int, length: int) -> float:
    """How much a decode step must read at least, in bytes, as a mean over the steps of a rollout.

    That is every weight once, since the head reads the embeddings too, and the keys and values that a token looks at:
    those of a prompt once for its group, and those of each row.
    """
    from tunix_torch.model.attention import kept_tokens, layer_windows
    from tunix_torch.model.forward import text_config

    config, size = text_config(model), next(model.parameters()).element_size()
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    per_token = 2 * config.num_key_value_heads * config.head_dim * size
    cached = 0.0
    for window in layer_windows(config):
        of_prompt, _ = kept_tokens(window, prompt_length, 0)
        own = sum(kept_tokens(window, 0, used)[1] for used in range(1, length)) / (length - 1)
        cached += (num_prompts * of_prompt + num_rows * own) * per_token
    return weights + cached


def decode(size: str) -> dict[str, Any]:
    """Sample from a model with random weights in the shapes of Gemma 3 and a LoRA; no completion ends early.

    Returns:
        seconds of the first rollout, in which graphs are recorded, and of the best later one; tokens a second; and the
        share of the bound that the memory's bandwidth sets, which is measured in the same run.
    """
    import tunix_torch  # noqa: F401  (first: it chooses the device)

    # isort: split

    import torch
    from transformers import Gemma3ForCausalLM

    from tunix_torch import ModelConfig
    from tunix_torch.model.loading import add_lora, lora_config
    from tunix_torch.preflight.models import model_config
    from tunix_torch.rollout.sampler import Sampler
    from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms
    from tunix_torch.runtime import device

    on_gpu = device.KIND == "cuda"
    num_prompts, group, prompt_length, length = (PROMPTS, COMPLETIONS, PROMPT_LENGTH, LENGTH) if on_gpu else SMALL
    torch.manual_seed(0)
    config = model_config(f"google/gemma-3-{size}" if on_gpu else "tiny")
    with torch.device(device.torch_device()):
        model = Gemma3ForCausalLM(config).to(torch.bfloat16 if on_gpu else torch.float32).eval()
        model = add_lora(model, lora_config(ModelConfig(lora_rank=8, lora_alpha=16.0)))
    sampler = Sampler(model, (config.vocab_size,), 0, stop_check_interval=length)  # no token has this id
    ids = torch.randint(4, config.vocab_size, (num_prompts, prompt_length)).to(device.torch_device())
    params, num_rows = SamplingParams(length), num_prompts * group
    seconds = []
    for number in range(1 + (3 if on_gpu else 1)):
        uniforms = draw_uniforms((0, number), range(num_rows), length)
        device.wait()
        started = time.perf_counter()
        rollout = sampler.sample(ids, torch.ones_like(ids, dtype=torch.bool), group, params, uniforms)
        device.wait()
        seconds.append(time.perf_counter() - started)
        assert rollout.completion_mask.all(), "a completion ended early"
    best, needed = min(seconds[1:]), bytes_of_a_step(model, num_prompts, num_rows, prompt_length, length)
    copied = bandwidth(COPIED[device.KIND])
    return {
        "size": size,
        "shape": {"prompts": num_prompts, "rows": num_rows, "prompt": prompt_length, "completion": length},
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_seconds": seconds[0],
        "seconds": best,
        "tokens_per_second": num_rows * length / best,
        "seconds_of_a_token": best / length,  # of a decode step, with the prefill spread over all
        "bytes_of_a_step": needed,
        "bandwidth": copied,
        "share_of_bandwidth": needed / copied / (best / length),
        "peak_memory_bytes": device.peak_memory_bytes(),
    }


def join(folder: Path) -> dict[str, Any]:
    """Read what the parts have written. A part that has failed has no file, and is None here."""

    def read(name: str) -> Any:
        file = folder / f"{name}.json"
        return json.loads(file.read_text()) if file.is_file() else None

    lines = [line.split() for line in (folder / "parts.txt").read_text().splitlines()]
    tests = (folder / "tests.txt").read_text().strip().splitlines()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "parts": {name: {"seconds": int(seconds), "exit_code": int(code)} for name, seconds, code in lines},
        "environment": read("environment"),
        "tests": tests[-1] if tests else None,
        "steps": {size: read(size) for size in SIZES},
        "decode": {size: read(f"decode-{size}") for size in SIZES},
    }


def draw(found: dict[str, Any], file: Path) -> None:
    """Draw the seconds of a step, a bar for each peer, and the share of the bandwidth that decoding reaches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from .stopwatch import PARTS

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1), layout="constrained")
    bars = {
        f"{size} {peer}": {part: (of_peer["parts"][part] or {"median": 0.0})["median"] for part in PARTS}
        for size, step in found["steps"].items()
        if step
        for peer, of_peer in step["peers"].items()
    }
    start = dict.fromkeys(bars, 0.0)
    for part in PARTS:
        left.barh(list(bars), [of_part[part] for of_part in bars.values()], left=list(start.values()), label=part)
        start = {name: start[name] + bars[name][part] for name in bars}
    left.set(xlabel="seconds a GRPO step (median)", title=(found["environment"] or {}).get("device", ""))
    left.invert_yaxis()
    if bars:
        left.legend()
    shares = {size: of_size["share_of_bandwidth"] for size, of_size in found["decode"].items() if of_size}
    right.bar(list(shares), list(shares.values()))
    right.set(ylim=(0, 1), title="decoding: share of bandwidth")
    figure.savefig(file, dpi=120)


def main() -> None:
    given = sys.argv[1:]
    if len(given) == 2 and given[0] == "environment":
        found, file = environment(), Path(given[1])
    elif len(given) == 3 and given[0] == "decode" and given[1] in SIZES:
        found, file = decode(given[1]), Path(given[2])
    elif len(given) == 2 and given[0] == "join":
        found, file = join(Path(given[1])), Path(given[1]) / "first_gpu.json"
    else:
        raise ValueError("expected: environment FILE, decode 270m|1b FILE, or join FOLDER")
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if given[0] == "join":
        draw(found, file.with_suffix(".png"))


if __name__ == "__main__":
    utils.run_script(main)
