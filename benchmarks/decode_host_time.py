"""Measure the time that the host needs for a token on XLA, which must be less than the time of the device.

Run it as `TUNIX_DEVICE=xla python -m benchmarks.decode_host_time`. Models of 6 and of 26 layers, which are so narrow
that computing takes almost no time, decode 64 tokens: with a call of the step for each token, and for 16 of them, in
turns. The time until a call returns is measured, by the token; its result is not waited for.
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
from tunix_torch.rollout.ladders import FewShapes
from tunix_torch.rollout.sampler import Sampler
from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms
from tunix_torch.runtime import compiled, device, mesh

ROWS, TOKENS, AT_ONCE, ROUNDS = 4, 65, (1, 16), 5  # the first token of a completion is the prefill's


def measure(num_layers: int) -> dict[int, list[float]]:
    """Return the milliseconds a token of each call of the decode step, by the tokens of a call."""
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
    found: dict[int, list[float]] = {at_once: [] for at_once in AT_ONCE}
    compile_step = compiled.compile_step

    def timed(*args: object) -> object:
        step = compile_step(*args)

        def call(*args: object, runs: int) -> object:
            started = time.perf_counter()
            result = step(*args, runs=runs)
            found[runs].append(1e3 * (time.perf_counter() - started) / runs)
            return result

        return call

    with mock.patch.object(compiled, "compile_step", timed):
        sampler = Sampler(model, [64], 0, stop_check_interval=TOKENS)  # no token ends a completion
        prompt = torch.ones(ROWS, 8, dtype=torch.int64, device=device.torch_device())
        for number in range(1 + ROUNDS):
            for at_once in AT_ONCE:
                uniforms = draw_uniforms((0, number), range(ROWS), TOKENS)
                with mock.patch.object(FewShapes, "until_look", lambda *_, at_once=at_once: at_once):
                    rollout = sampler.sample(prompt, prompt.bool(), 1, SamplingParams(TOKENS), uniforms)
                rollout.completion_ids.cpu()
                if number == 0:  # compiled in it
                    found[at_once].clear()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 26])
    layer_counts = parser.parse_args().layers
    if device.KIND != "xla":
        raise ValueError(f"TUNIX_DEVICE={device.KIND!r}: only on XLA is a step compiled; set TUNIX_DEVICE=xla")
    for layers in layer_counts:
        for at_once, found in measure(layers).items():
            spread = f"min {min(found):.2f}, median {statistics.median(found):.2f}, max {max(found):.2f}"
            what = f"{layers} layers, {at_once} token{'s' * (at_once > 1)} a call"
            print(f"{what}: {spread} ms of the host a token, on {mesh.describe()}", flush=True)


if __name__ == "__main__":
    utils.run_script(main)
