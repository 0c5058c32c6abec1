"""With `sync_ref_model` the reference policy follows the policy, and a resumed run knows where it was."""

import pytest
import torch
from safetensors.torch import load_file
from trainers import lora_weights, make_trainer
from transformers import TrainerCallback

from tunix_torch import GRPOConfig
from tunix_torch.model.adapter import REFERENCE_FILE

pytestmark = pytest.mark.thorough  # whole runs, each of many steps

SYNC = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 2, "max_steps": 5}
SAVING = {"save_strategy": "steps", "save_steps": 2}


class Recorder(TrainerCallback):
    """Keeps the weights that learn and the reference before the first step, and after each."""

    def __init__(self):
        self.policies, self.references = [], []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.record()

    def on_step_end(self, args, state, control, **kwargs):
        self.record()

    def record(self):
        self.policies.append(lora_weights(self.trainer))
        self.trainer.begin_run_if_needed()
        self.references.append({name: weight.clone() for name, weight in self.trainer.reference.items()})


def kls(trainer):
    return [row["kl"] for row in trainer.state.log_history if "kl" in row]


@pytest.mark.parametrize("full", [False, True])
def test_the_reference_is_the_mean_of_itself_and_the_policy(model_folder, tmp_path, full):
    """Regression for a new LoRA: its reference is the model without it, so there was nothing that could follow."""
    recorder = Recorder()
    trainer = make_trainer(model_folder, tmp_path, full=full, callbacks=[recorder], **SYNC)
    recorder.trainer = trainer
    trainer.train()
    assert len(recorder.policies) == 6
    expected = recorder.policies[0]
    for step, (policy, reference) in enumerate(zip(recorder.policies, recorder.references, strict=True)):
        if step in (2, 4):
            expected = {name: 0.25 * policy[name] + 0.75 * weight for name, weight in expected.items()}
        assert expected.keys() == reference.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(reference[name], weight, rtol=1e-6, atol=1e-8)
    assert kls(trainer)[0] == pytest.approx(0, abs=1e-9)


def test_with_a_share_of_one_the_reference_is_the_policy(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, **SYNC | {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1})
    trainer.train()
    assert max(kls(trainer)) < 1e-9


@pytest.mark.parametrize("full", [False, True])
def test_a_resumed_run_goes_on_with_the_reference_where_it_was(model_folder, tmp_path, full):
    whole = make_trainer(model_folder, tmp_path / "whole", full=full, **SYNC, **SAVING)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / REFERENCE_FILE).is_file()
    resumed = make_trainer(model_folder, tmp_path / "resumed", full=full, **SYNC, **SAVING)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert kls(resumed) == kls(whole)
    for mine, other in ((lora_weights(resumed), lora_weights(whole)), (resumed.reference, whole.reference)):
        assert mine.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in mine.items())
    # the checkpoint of a step holds the reference as this step has left it
    synced = load_file(tmp_path / "whole" / "checkpoint-4" / REFERENCE_FILE)
    assert all(torch.equal(weight, synced[name]) for name, weight in whole.reference.items())


def test_the_reference_of_an_adapter_that_is_trained_further_moves_too(model_folder, tmp_path):
    first = make_trainer(model_folder, tmp_path / "first")
    first.train()
    first.save_model()
    start = lora_weights(first)
    trainer = make_trainer(str(tmp_path / "first"), tmp_path / "second", **SYNC | {"max_steps": 2})
    trainer.train()
    after = lora_weights(trainer)
    for name, weight in trainer.reference.items():
        torch.testing.assert_close(weight, 0.25 * after[name] + 0.75 * start[name], rtol=1e-6, atol=1e-8)


def test_settings_that_could_have_no_effect_are_refused():
    for settings, words in (
        ({"sync_ref_model": True, "beta": 0.0}, "sync_ref_model=True: there is no reference"),
        ({"sync_ref_model": True, "use_grpo": False}, "sync_ref_model=True: there is no reference"),
        ({"sync_ref_model": True, "reference": "base"}, "sync_ref_model=True: .*leave reference out"),
        ({"sync_ref_model": True, "save_batches": 1}, "sync_ref_model=True: .*leave save_batches out"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha=0.5: .*sync_ref_model=True only"),
        ({"ref_model_sync_steps": 5}, "ref_model_sync_steps=5: .*sync_ref_model=True only"),
        ({"sync_ref_model": True, "ref_model_mixup_alpha": 1.5}, r"ref_model_mixup_alpha=1.5: must be in \[0, 1\]"),
        ({"sync_ref_model": True, "ref_model_sync_steps": 0}, "ref_model_sync_steps=0: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            GRPOConfig(**settings)
