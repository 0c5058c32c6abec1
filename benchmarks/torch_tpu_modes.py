"""Time a learning pass through torch_tpu in the ways in which it can run, the first two in turns.

    make bench-tpu

- fused: operations are deferred and run as graphs, as the library does it
- eager: each operation is launched by itself
- compiled: the forward pass is compiled by `torch.compile(backend="tpu")`, its gradient with it; the rest is fused

Behind torch_tpu stands a plugin for the CPU, so the times are those of Python, of dispatch and of XLA:CPU, not a TPU's.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TUNIX_DEVICE", "tpu")

import tunix_torch  # noqa: F401  (first: it chooses the device)

# isort: split

import torch

import utils
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.batch import PromptBatch
from tunix_torch.learn import distillation
from tunix_torch.model import tiny
from tunix_torch.rewards import correctness_reward, format_reward
from tunix_torch.runtime import device

IN_TURNS, COMPILED = ("fused", "eager"), "compiled"


def timed(trainer: TunixTrainer, batch: object, mode: str) -> tuple[float, int]:
    """Run one learning pass in a mode. Returns its seconds, and how many graphs were compiled for it."""
    token_logps, compiled = distillation.token_logps, device.num_compilations()
    if mode == COMPILED:
        distillation.token_logps = torch.compile(token_logps, backend="tpu", fullgraph=True, dynamic=False)
    torch.tpu.eager_mode = torch.tpu.EagerMode.DEFER_NEVER if mode == "eager" else torch.tpu.EagerMode.DEFER_AND_FUSE
    started = time.perf_counter()
    try:
        trainer.learning_pass(batch)
        device.wait()
    finally:
        distillation.token_logps = token_logps
        torch.tpu.eager_mode = torch.tpu.EagerMode.DEFER_AND_FUSE
    trainer.model.zero_grad()
    device.wait()
    return time.perf_counter() - started, device.num_compilations() - compiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    if device.KIND != "tpu":
        raise ValueError(f"TUNIX_DEVICE={device.KIND!r}: this is about torch_tpu; see make bench-tpu")
    args = GRPOConfig(output_dir="outputs/torch_tpu_modes", report_to="none", save_strategy="no", disable_tqdm=True)
    rows = tiny.arithmetic_rows("train", 64)
    trainer = TunixTrainer("tiny", [correctness_reward, format_reward], args, rows)
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.collect(PromptBatch(**next(iter(trainer.get_train_dataloader()))).to(args.device))
    first = {mode: timed(trainer, batch, mode) for mode in IN_TURNS}
    seconds = {mode: [] for mode in IN_TURNS}
    for _ in range(rounds):
        for mode in IN_TURNS:
            seconds[mode].append(timed(trainer, batch, mode)[0])
    try:  # last, since a graph that fails leaves its results unusable
        first[COMPILED] = timed(trainer, batch, COMPILED)
        seconds[COMPILED] = [timed(trainer, batch, COMPILED)[0] for _ in range(rounds)]
    except RuntimeError as error:
        print(f"{COMPILED}: {type(error).__name__}: {str(error).strip().splitlines()[0]:.200}")
        first.pop(COMPILED, None)
    print("| mode | first pass, s | compilations | later passes, s (median) |\n|---|---|---|---|")
    for mode, (took, compilations) in first.items():
        print(f"| {mode} | {took:.1f} | {compilations} | {statistics.median(seconds[mode]):.3f} |")


if __name__ == "__main__":
    utils.run_script(main)
