"""A resumed run has its own intervals, a finished one stays finished, and settings that matter must not change."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from runs import SMALL, files, run
from safetensors.torch import load_file
from trainers import digits_reward
from transformers import EarlyStoppingCallback

from tunix_torch import DataConfig, GRPOConfig, ModelConfig, TunixTrainer, train
from tunix_torch.checkpoints.files import is_finished
from tunix_torch.config.saved import MAY_CHANGE, check_same_run, save_config, settings_of
from tunix_torch.model import tiny
from tunix_torch.model.loading import lora_config


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def has_weights_of(trainer, folder):
    """Return whether the trainer's adapter is, bit for bit, the one in a folder."""
    kept = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters() if p.requires_grad}
    saved = load_file(folder / "adapter_model.safetensors")
    return set(kept) == set(saved) and all(torch.equal(kept[name], saved[name]) for name in saved)


def saved_steps(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


# ---- intervals ----


def test_a_resumed_run_logs_evaluates_and_saves_as_often_as_it_is_told(model_folder, tmp_path):
    """By itself, transformers.Trainer would take the intervals from the checkpoint."""
    run(model_folder, tmp_path, max_steps=2)
    more = {"save_steps": 1, "eval_steps": 3, "logging_steps": 2}
    run(model_folder, tmp_path, max_steps=6, resume_from_checkpoint="latest", **more)
    assert saved_steps(tmp_path) == [2, 3, 4, 5, 6]
    assert [row["step"] for row in rows(tmp_path) if "eval_accuracy" in row] == [2, 3, 6]
    assert [row["step"] for row in rows(tmp_path) if "loss" in row] == [1, 2, 4, 6]


def test_a_resumed_run_has_the_patience_that_it_is_told(model_folder, tmp_path, judges):
    """The restored state of the callback holds the earlier patience, which must not be used."""
    settings = {"judge": f"{judges}.none", "eval_steps": 1, "save_steps": 1, "max_steps": 6}
    first = run(model_folder, tmp_path, early_stopping_patience=2, **settings)
    assert first.state.global_step == 3  # the first evaluation stays the best
    again = run(model_folder, tmp_path, early_stopping_patience=4, resume_from_checkpoint="latest", **settings)
    assert again.state.global_step == 5


# ---- a finished run ----


@pytest.fixture
def judges(tmp_path_factory, monkeypatch):
    """Write a module of judges, and return its name."""
    folder = tmp_path_factory.mktemp("judges")
    (folder / "judges_of_resume.py").write_text(
        "def none(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    return "judges_of_resume"


@pytest.mark.parametrize("how", ["latest", "auto", "folder"])
def test_a_finished_run_takes_no_step_more(model_folder, finished_run, tmp_path, how, caplog, capsys):
    """Regression: a resumed one took a step more each time ("step 5/4"), changed its adapter and evaluated again.

    With "auto" the run began anew.
    """
    out = tmp_path / "out"
    shutil.copytree(finished_run, out)
    before = files(out)
    again = run(model_folder, out, resume_from_checkpoint=str(out / "checkpoint-4") if how == "folder" else how)
    assert files(out) == before, "something was written"
    assert "4. Nothing is trained" in caplog.text and f"curves: {out}" in capsys.readouterr().out
    assert again.state.global_step == 4
    assert has_weights_of(again, out)


@pytest.mark.parametrize(
    "how, settings",
    [
        ("latest", {"max_steps": -1, "num_train_epochs": 1}),
        ("latest", {"max_steps": -1, "num_train_epochs": 0.4}),
        ("folder", {"load_best_model_at_end": True}),
        ("latest", {"max_steps": 9, "eval_steps": 1, "save_steps": 2, "early_stopping_patience": 2}),
    ],
)
@pytest.mark.thorough
def test_a_run_that_finished_otherwise_takes_no_step_more(model_folder, tmp_path, how, settings, judges):
    """The run may have finished after an epoch or a part of one, with its best model loaded, or by early stopping."""
    out = tmp_path / "out"
    first = run(model_folder, out, judge=f"{judges}.none", **settings)
    before, num_steps = files(out), first.state.global_step
    wanted = str(out / f"checkpoint-{num_steps}") if how == "folder" else how
    again = run(model_folder, out, judge=f"{judges}.none", **settings, resume_from_checkpoint=wanted)
    assert files(out) == before, "something was written"
    assert again.state.global_step == num_steps
    assert has_weights_of(again, out)


def test_final_files_that_are_missing_are_written(model_folder, finished_run, tmp_path):
    """Final files are missing when a run was killed between its last checkpoint and its end."""
    whole = tmp_path / "whole"
    shutil.copytree(finished_run, whole)
    weights = ["adapter_model.safetensors", "trainer_state.json"]
    for names in (["training_curves.png"], ["report.html"], [*weights, "training_curves.png", "report.html"]):
        for name in names:
            (whole / name).unlink()
        kept = files(whole)
        run(model_folder, whole, resume_from_checkpoint="latest")
        assert all((whole / name).is_file() for name in names)
        assert adapter(whole) == adapter(whole / "checkpoint-4")
        assert (whole / "metrics.jsonl").read_bytes() == kept[whole / "metrics.jsonl"][1]
    assert not (whole / "previous").exists()


def test_a_finished_run_goes_on_with_more_steps(model_folder, finished_run, tmp_path):
    run(model_folder, tmp_path / "parts", max_steps=2)
    stale = {
        name: (tmp_path / "parts" / name).read_bytes() for name in ("adapter_model.safetensors", "trainer_state.json")
    }
    # The second time, the folder looks as if the run was killed before it wrote its final files.
    for how in ("latest", "auto"):
        run(model_folder, tmp_path / "parts", resume_from_checkpoint=how)
        assert adapter(tmp_path / "parts") == adapter(finished_run) != stale["adapter_model.safetensors"]
        for name, content in stale.items():
            (tmp_path / "parts" / name).write_bytes(content)


def test_a_run_that_left_no_checkpoint_after_its_last_step_is_known_to_be_finished(
    model_folder, finished_run, tmp_path
):
    shutil.copytree(finished_run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-4")
    before = files(tmp_path)
    again = run(model_folder, tmp_path, resume_from_checkpoint="latest")
    assert files(tmp_path) == before and has_weights_of(again, tmp_path)
    # A checkpoint that the user names is resumed, although the run is finished.
    run(model_folder, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert adapter(tmp_path) == before[tmp_path / "adapter_model.safetensors"][1]
    assert saved_steps(tmp_path) == [2, 4]


def test_a_run_that_kept_no_checkpoint_is_known_to_be_finished(model_folder, tmp_path):
    """Regression: with `save_strategy="no"` the same command moved the finished run away, and trained anew."""
    run(model_folder, tmp_path, save_strategy="no")
    before = files(tmp_path)
    again = run(model_folder, tmp_path, save_strategy="no", resume_from_checkpoint="auto")
    assert files(tmp_path) == before and has_weights_of(again, tmp_path)
    with pytest.raises(ValueError, match="learning_rate=0.5"):
        run(model_folder, tmp_path, save_strategy="no", resume_from_checkpoint="auto", learning_rate=0.5)


def test_a_finished_run_that_is_resumed_elsewhere_spares_what_is_there(model_folder, finished_run, tmp_path):
    run(model_folder, tmp_path / "b", max_steps=2, seed=7)
    kept = adapter(tmp_path / "b")
    run(model_folder, tmp_path / "b", resume_from_checkpoint=str(finished_run / "checkpoint-4"))
    (previous,) = (tmp_path / "b" / "previous").iterdir()
    assert adapter(previous) == kept and adapter(tmp_path / "b") == adapter(finished_run)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["seed"] == 42


def make_trainer(model, output_dir, alpha=32.0, **settings):
    args = GRPOConfig(output_dir=str(output_dir), **(SMALL | settings))
    data = tiny.arithmetic_rows("train", 16), tiny.arithmetic_rows("test", 4)
    return TunixTrainer(model, digits_reward, args, *data, peft_config=lora_config(ModelConfig(lora_alpha=alpha)))


def test_who_uses_the_library_is_spared_too(model_folder, tmp_path):
    make_trainer(model_folder, tmp_path).train()
    before = files(tmp_path)
    for checkpoint in (True, str(tmp_path / "checkpoint-4")):
        again = make_trainer(model_folder, tmp_path)
        result = again.train(resume_from_checkpoint=checkpoint)
        assert result.global_step == again.state.global_step == 4 and files(tmp_path) == before, checkpoint
    more = make_trainer(model_folder, tmp_path, max_steps=5)
    assert more.train(resume_from_checkpoint=True).global_step == 5


def test_a_checkpoint_of_a_lora_with_another_scale_is_refused(model_folder, tmp_path):
    """With another scale, the checkpoint's weights would mean something else."""
    make_trainer(model_folder, tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match=r"lora_alpha=8.0: the LoRA in .* has 32.0"):
        make_trainer(model_folder, tmp_path, alpha=8.0).train(resume_from_checkpoint=True)


def test_a_run_is_finished_at_its_last_step_or_where_it_stopped(tmp_path):
    stopping = EarlyStoppingCallback(3)
    stopping.early_stopping_patience_counter = 2
    for callbacks in (stopping.state(), [stopping.state()] * 2):
        state = {"global_step": 4, "stateful_callbacks": {"EarlyStoppingCallback": callbacks}}
        (tmp_path / "trainer_state.json").write_text(json.dumps(state))
        assert [is_finished(tmp_path, steps) for steps in (3, 4, 5)] == [True, True, False]
        assert [is_finished(tmp_path, 5, patience) for patience in (1, 2, 3, None)] == [True, True, False, False]


# ---- settings ----


def checkpoint_of(folder, settings):
    save_config(settings, folder / "config.json")
    return folder / "checkpoint-2"


MATTERS = {
    "data_seed": 7,
    "lr_scheduler_kwargs": {"num_cycles": 3},
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "optim_args": "foreach=False",
    "weight_decay": 0.1,
    "warmup_steps": 3,
    "max_grad_norm": 0.5,
    "ignore_data_skip": True,
    "full_determinism": True,
    "train_sampling_strategy": "sequential",
    "accelerator_config": {"use_seedable_sampler": False},
    "dataloader_drop_last": False,
    "epsilon": 0.3,
}


def test_a_setting_that_changes_the_run_may_be_neither_left_out_nor_added(tmp_path, subtests):
    """Regression: only settings that both runs had written were compared, and defaults are not written."""
    for name in MATTERS:
        with subtests.test(name=name):
            plain, other = (
                settings_of(ModelConfig(), DataConfig(), GRPOConfig(**given)) for given in ({}, {name: MATTERS[name]})
            )
            check_same_run(other, checkpoint_of(tmp_path, other))
            for now, earlier in ((plain, other), (other, plain)):
                with pytest.raises(ValueError, match=f"^{name}=.*would be resumed"):
                    check_same_run(now, checkpoint_of(tmp_path, earlier))


def test_where_and_how_often_may_change(tmp_path):
    now = {"run_name": "x", "dataloader_num_workers": 2, "push_to_hub": True, "logging_first_step": True}
    now |= {"early_stopping_patience": 3, "eval_steps": 5, "max_length": 512, "hub_model_id": "me/x"}
    plain, other = (settings_of(ModelConfig(), DataConfig(), GRPOConfig(**given)) for given in ({}, now))
    assert other["metric_for_best_model"] == "accuracy"  # the patience sets this metric
    check_same_run(other, checkpoint_of(tmp_path, plain))
    check_same_run(plain, checkpoint_of(tmp_path, other))
    with pytest.raises(ValueError, match="metric_for_best_model='runtime'"):
        check_same_run(other | {"metric_for_best_model": "runtime"}, checkpoint_of(tmp_path, other))


def test_names_that_may_change_are_fields():
    configs = (ModelConfig, DataConfig, GRPOConfig)
    assert set(MAY_CHANGE) <= {field.name for config in configs for field in dataclasses.fields(config)}


def test_a_config_file_from_before_a_setting_existed_has_its_default(tmp_path):
    now = settings_of(ModelConfig(), DataConfig(), GRPOConfig())
    old = {name: value for name, value in now.items() if name not in ("kl_clamp_value", "judge", "model_dtype")}
    check_same_run(now, checkpoint_of(tmp_path, old | {"of_another_version": 1}))
    with pytest.raises(ValueError, match="kl_clamp_value=2.0: .* has None"):
        check_same_run(now | {"kl_clamp_value": 2.0}, checkpoint_of(tmp_path, old))


def test_the_lora_of_an_adapter_that_is_trained_further_is_the_adapters(model_folder, tmp_path):
    """Regression: other LoRA settings were ignored without a warning, at the start and when the run was resumed."""
    trainer = make_trainer(model_folder, tmp_path / "adapter", max_steps=1, alpha=8.0)
    trainer.train()
    trainer.save_model()
    for name, value, there in (("lora_alpha", 4.0, "8.0"), ("lora_rank", 2, "16"), ("lora_dropout", 0.1, "0.0")):
        config = ModelConfig(str(tmp_path / "adapter"), **{name: value})
        with pytest.raises(
            ValueError, match=re.escape(f"{name}={value}: the adapter that is trained further") + f".*{there}"
        ):
            train(config, DataConfig(), GRPOConfig(output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    run(str(tmp_path / "adapter"), tmp_path / "out", max_steps=1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["lora_alpha"] == 8.0


def test_answers_that_a_resumed_run_has_not_seen_before_training_are_not_called_so(model_folder, tmp_path, capsys):
    run(model_folder, tmp_path / "out", max_steps=2, eval_on_start=True)
    assert re.findall(r"^  (before|after|step \d+) ", capsys.readouterr().out, re.MULTILINE)[:2] == ["before", "after"]
    run(model_folder, tmp_path / "out", max_steps=6, eval_on_start=True, resume_from_checkpoint="auto")
    assert re.findall(r"^  (before|after|step \d+) ", capsys.readouterr().out, re.MULTILINE)[:2] == ["step 4", "after"]
