"""Through XLA the graph itself leaves a bad step out: nothing is compiled for it, and all is as before."""

import math

import pytest
import torch
from graphs import BY_TIMING
from trainers import make_trainer
from transformers import TrainerCallback

from tunix_torch.learn.bad_batches import FOLDER
from tunix_torch.runtime import device

pytestmark = pytest.mark.xla

STEP, STEPS = 4, 6


class Watch(TrainerCallback):
    """Keeps what a run has at the begin of each step, and how much was compiled by then."""

    def __init__(self):
        self.trainer, self.begins, self.compiled = None, {}, {}

    def on_step_begin(self, args, state, control, **kwargs):
        trainer, step = self.trainer, state.global_step + 1
        weights = [p.detach().cpu() for p in trainer.model.parameters() if p.requires_grad]
        moments = [v.cpu().clone() for s in trainer.optimizer.state.values() for v in s.values()]
        rate = torch.tensor([trainer.lr_scheduler.last_epoch, trainer.optimizer.param_groups[0]["lr"]])
        self.begins[step], self.compiled[step] = [*weights, *moments, rate], device.num_compilations()


SFT = pytest.param({"use_grpo": False, "generation_max_length": 64}, marks=pytest.mark.thorough)


@pytest.mark.parametrize("settings", [{"num_iterations": 2}, SFT])
def test_a_bad_step_changes_and_compiles_nothing(model_folder, tmp_path, settings):
    watch = Watch()
    trainer = make_trainer(model_folder, tmp_path, callbacks=[watch], max_steps=STEPS, **settings)
    watch.trainer = trainer
    summed = trainer.sum_gradients
    factor = {step: math.nan if step == STEP else 1.0 for step in range(1, STEPS + 1)}

    def spoiled():
        """Multiply one gradient by a number that is 1 in the other steps, so that all steps have the same graphs."""
        summed()
        weight = [p for p in trainer.model.parameters() if p.grad is not None][-1]
        weight.grad.mul_(device.scalar(factor[trainer.state.global_step + 1]))

    trainer.sum_gradients = spoiled
    trainer.train()
    before, after = watch.begins[STEP], watch.begins[STEP + 1]
    assert len(before) == len(after) and all(map(torch.equal, before, after))
    assert not all(map(torch.equal, watch.begins[3], watch.begins[4]))
    assert not all(map(torch.equal, watch.begins[5], watch.begins[6]))
    assert 0 <= watch.compiled[STEPS] - watch.compiled[STEP] <= BY_TIMING, watch.compiled
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    passes = settings.get("num_iterations", 1)
    assert [row.get("skipped_steps", 0) for row in rows] == [0, 0, 0, passes, passes, passes]
    assert (tmp_path / FOLDER / f"step-{STEP:04}.safetensors").is_file()


@pytest.mark.thorough
def test_a_bad_first_step_leaves_an_optimizer_that_has_not_begun(model_folder, tmp_path):
    """The moments are made in the first step, and a bad one must not leave them behind."""
    runs = {}
    for name, bad in (("spoiled", 1), ("plain", 0)):
        trainer = make_trainer(model_folder, tmp_path / name, max_steps=3, lr_scheduler_type="constant")
        summed = trainer.sum_gradients

        def spoiled(trainer=trainer, summed=summed, bad=bad):
            summed()
            weight = [p for p in trainer.model.parameters() if p.grad is not None][-1]
            weight.grad.mul_(device.scalar(math.nan if trainer.state.global_step + 1 == bad else 1.0))

        trainer.sum_gradients = spoiled
        trainer.train()
        runs[name] = [int(s["step"]) for s in trainer.optimizer.state.values()], trainer
    assert set(runs["spoiled"][0]) == {2} and set(runs["plain"][0]) == {3}
    assert all(torch.isfinite(p.detach().cpu()).all() for p in runs["spoiled"][1].model.parameters())
