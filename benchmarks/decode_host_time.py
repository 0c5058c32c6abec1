"""Measure the time that the host needs for one decode step on XLA, which must be less than a device's.

Run it as `TUNIX_DEVICE=xla python -m benchmarks.decode_host_time`. Models of 6 and of 26 layers, which are so narrow
that computing takes almost no time, decode 64 tokens. The time until the call of a step returns is printed; its result
is not waited for.
"""

import os

os.environ.setdefault("TUNIX_DEVICE", "xla")

import argparse
import statistics
import time
from unittest import mock

import tunix_torch  # noqa: F401  (first: it chooses the device)

# isort: split

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import utils
from tunix_torch.config.model import ModelConfig
from tunix_torch.model.loading import add_lora, lora_config, place
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms
from tunix_torch.runtime import compiled, device, mesh

ROWS, TOKENS = 4, 64


def measure(num_layers: int) -> list[float]:
    """Return the milliseconds of each call of the decode step, in the second of two rollouts."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = place(add_lora(Gemma3ForCausalLM(config), lora_config(ModelConfig(lora_rank=4))))
    milliseconds: list[float] = []
    compile_step = compiled.compile_step

    def timed(*args: object) -> object:
        step = compile_step(*args)

        def call(*args: object) -> object:
            started = time.perf_counter()
            result = step(*args)
            milliseconds.append(1e3 * (time.perf_counter() - started))
            return result

        return call

    with mock.patch.object(compiled, "compile_step", timed):
        sampler = Sampler(model, [64], 0, stop_check_interval=TOKENS)  # no token ends a completion
        prompt = torch.ones(ROWS, 8, dtype=torch.int64, device=device.torch_device())
        for number in range(2):
            milliseconds.clear()
            uniforms = draw_uniforms((0, number), range(ROWS), TOKENS)
            rollout = sampler.sample(prompt, prompt.bool(), 1, SamplingParams(TOKENS), uniforms)
            rollout.completion_ids.cpu()
    return milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 26])
    layer_counts = parser.parse_args().layers
    if device.KIND != "xla":
        raise ValueError(f"TUNIX_DEVICE={device.KIND!r}: only on XLA is a step compiled; set TUNIX_DEVICE=xla")
    for layers in layer_counts:
        found = measure(layers)
        spread = f"min {min(found):.2f}, median {statistics.median(found):.2f}, max {max(found):.2f}"
        print(f"{layers} layers: {spread} ms of the host a step, on {mesh.describe()}", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
