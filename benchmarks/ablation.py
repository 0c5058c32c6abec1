"""What each optimisation of a step is worth: the step without it, in turns with the step as it is.

    python -m benchmarks.ablation                   # preset small, on the CPU
    python -m benchmarks.ablation --preset long --rounds 1
    python -m benchmarks.ablation --equal_groups 0.5   # half of the groups teach nothing, and there is no KL penalty

Each variant trains the same model on the same rows with completions of the same lengths. A ratio above 1 says how much
longer a step takes without the optimisation. Results differ by rounding only.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import tunix_torch  # noqa: F401  # first: it decides for or against XLA

# isort: split

import torch
from transformers import TrainerCallback

from tunix_torch import trainer as trainer_module
from tunix_torch.learn import equal_rewards, passes
from tunix_torch.model import decoding
from tunix_torch.rewarding.scoring import RewardFunc
from tunix_torch.rollout import ladders, rows
from tunix_torch.runtime import device, mesh

from . import peer_ours
from .peer_ours import force_lengths, make_trainer
from .workload import PRESETS, Spec, make_inputs, share_of_even_words

# What is left out -> the name to replace, and what stands in its place.
VARIANTS = {
    "as it is": (),
    "layers of Gemma in oneDNN's operations": ((device, "has_onednn", lambda: False),),
    "LoRA layers that multiply once": ((mesh, "merges_lora", lambda: False),),
    "both of these": ((decoding, "_faster_class", lambda module: None),),
    "one prompt for its group in learning": ((passes, "bucketed_rows", passes.plain_rows),),
    "buckets of similar length in learning": ((passes, "bucketed_rows", passes.padded_rows),),
    "equal rewards without a gradient": ((equal_rewards, "groups_without_gradient", lambda batch, args: None),),
    "rows that leave when they have ended": ((rows, "make_ladder", lambda n, g, t, i: ladders.FewShapes(n, g, t, i)),),
}


class StepTimes(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)


@contextlib.contextmanager
def without(variant: str) -> Iterator[None]:
    """Leave an optimisation out within this context."""
    with contextlib.ExitStack() as stack:
        for where, name, instead in VARIANTS[variant]:
            stack.enter_context(mock.patch.object(where, name, instead))
        yield


def rewarded_equally(spec: Spec, share: float) -> RewardFunc:
    """The reward of the benchmark, but the first groups of a step, this share of them, get 0."""

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
        first = round(share * spec.num_prompts) * spec.num_completions
        return [0.0] * first + share_of_even_words(prompts[first:], completions[first:], **columns)

    return reward


def seconds_of_a_step(spec: Spec, folder: Path, variant: str, reward: RewardFunc) -> float:
    """The median of the steps that count."""
    times = StepTimes()
    drawn = force_lengths(trainer_module.draw_uniforms, spec)
    rewarded = mock.patch.object(peer_ours, "share_of_even_words", reward)
    with without(variant), rewarded, mock.patch.object(trainer_module, "draw_uniforms", drawn):
        make_trainer(spec, folder, [times]).train()
    return statistics.median(times.seconds[spec.warmup :])


def main() -> None:
    """Print a line for each variant: the median ratio over the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("small", "long"), default="small")
    parser.add_argument("--rounds", type=int, default=3, help="how often all variants are measured")
    parser.add_argument("--equal_groups", type=float, default=0.0, help="share of the groups whose rewards are equal")
    args = parser.parse_args()
    spec = replace(PRESETS[args.preset], warmup=1, steps=3)
    if args.equal_groups:
        spec = replace(spec, beta=0.0)
    torch.set_num_threads(spec.threads)
    ratios: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        make_inputs(spec, Path(name))
        for _ in range(args.rounds):
            usual = None
            for variant in VARIANTS:
                seconds = seconds_of_a_step(spec, Path(name), variant, rewarded_equally(spec, args.equal_groups))
                usual = usual or seconds
                ratios[variant].append(seconds / usual)
    print(f"{'without':<42}{'a step takes':>14}  ({args.preset}, {args.rounds} rounds in turns)")
    for variant, values in ratios.items():
        print(f"{variant:<42}{statistics.median(values):>13.2f}x  ({min(values):.2f} to {max(values):.2f})")


if __name__ == "__main__":
    main()
