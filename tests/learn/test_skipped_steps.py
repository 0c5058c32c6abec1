"""A step whose loss or gradient is not finite changes nothing, is counted, and its batch says which row it was."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from runs import run
from trainers import make_trainer
from transformers import TrainerCallback

from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.checkpoints.files import newest_checkpoint
from tunix_torch.cli import replay as command
from tunix_torch.cli.script import run_script
from tunix_torch.learn.bad_batches import FOLDER, MAX_FILES, load_bad_batch
from tunix_torch.learn.first_bad import look_at_rows
from tunix_torch.learn.logprobs import token_logps
from tunix_torch.run.replay import replay

STEP = 3  # the step whose gradient is spoiled


class Watch(TrainerCallback):
    """Keeps what a run has at the begin and at the end of each step."""

    def __init__(self):
        self.trainer, self.begins, self.ends = None, {}, {}

    def look(self):
        trainer = self.trainer
        weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        state = trainer.optimizer.state_dict()
        moments = {
            (i, k): v.clone() if isinstance(v, torch.Tensor) else v
            for i, s in state["state"].items()
            for k, v in s.items()
        }
        options = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
        schedule = dict(trainer.lr_scheduler.state_dict())
        return weights, moments, options, schedule, torch.get_rng_state(), trainer.entropy.kept()

    def on_step_begin(self, args, state, control, **kwargs):
        self.begins[state.global_step + 1] = self.look()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.begins[state.global_step + 1] = self.look()


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def spoil(trainer, value, steps, every_pass=True):
    """Put a number into a gradient of these steps. It is the hook of one weight that does so."""
    weight = [p for p in trainer.model.parameters() if p.requires_grad][-1]
    seen = []

    def hook(gradient):
        step = trainer.state.global_step + 1
        seen.append(step)
        if step in steps and (every_pass or seen.count(step) == 1):
            gradient = gradient.contiguous().clone()
            gradient.view(-1)[-1] = value
        return gradient

    weight.register_hook(hook)


THOROUGH = ("accumulated", "without clipping")
KINDS = {
    "grpo": {},
    "sft": {"use_grpo": False, "generation_max_length": 64},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "several passes": {"num_iterations": 2},
    "shared rollout": {"steps_per_generation": 2, "per_device_train_batch_size": 2},
    "without clipping": {"max_grad_norm": 0.0},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 100.0},
}


@pytest.mark.parametrize(
    "kind, value",
    [
        pytest.param(kind, value, marks=[pytest.mark.thorough] if kind in THOROUGH or value == math.inf else [])
        for kind in KINDS
        for value in (math.nan, math.inf)
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(model_folder, tmp_path, kind, value, caplog):
    """Regression: one NaN in one gradient reached the weights and was saved; SFT even ended with exit code 0."""
    watch = Watch()
    dropout = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1} | KINDS[kind]
    trainer = make_trainer(model_folder, tmp_path, callbacks=[watch], peft_config=dropout, **settings)
    watch.trainer = trainer
    spoil(trainer, value, {STEP})
    trainer.train()
    before, after = watch.begins[STEP], watch.begins[STEP + 1]
    names = ("weights", "moments", "options", "schedule", "random numbers", "entropy")
    assert [name for name, one, other in zip(names, before, after, strict=True) if not same(one, other)] == []
    assert not same(watch.begins[2][0], watch.begins[3][0]) and not same(watch.begins[4][0], watch.begins[5][0])
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    rows = [row for row in trainer.state.log_history if "learning_rate" in row]
    assert [row.get("skipped_steps") for row in rows] == [None, None, *[1 + (kind == "several passes")] * 3]
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert "Step 3 is skipped, and nothing has changed" in caplog.text and "lora_" in caplog.text
    assert load_bad_batch(next((tmp_path / FOLDER).iterdir())).step == STEP
    steps = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert steps == [f"checkpoint-{n}" for n in range(1, 6)]
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in steps]
    assert adapters[1] == adapters[2] != adapters[3]


def test_pairs_whose_gradient_is_not_finite_change_nothing(model_folder, tmp_path):
    watch = Watch()
    rows = [{"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": "no"} for i in range(16)]
    args = GRPOConfig(str(tmp_path), use_grpo=False, preference_loss="dpo", max_steps=3, report_to="none")
    trainer = TunixTrainer(model_folder, None, args, rows, callbacks=[watch])
    watch.trainer = trainer
    spoil(trainer, math.nan, {2})
    trainer.train()
    assert same(watch.begins[2][:4], watch.begins[3][:4])
    assert load_bad_batch(tmp_path / FOLDER / "step-0002.safetensors").kind == "pairs"


def test_a_run_that_skipped_a_step_resumes_with_its_count(model_folder, tmp_path):
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "logging_steps": 2}
    trainer = make_trainer(model_folder, tmp_path, **settings)
    spoil(trainer, math.nan, {STEP})
    trainer.train()
    resumed = make_trainer(model_folder, tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    counts = [[row.get("skipped_steps") for row in t.state.log_history] for t in (trainer, resumed)]
    assert counts == [[None, 1, 1]] * 2


@pytest.mark.parametrize("steps, stopped", [({2, 3, 4}, 4), ({5, 6}, 6)])
def test_many_steps_in_a_row_stop_the_run_with_a_checkpoint(model_folder, tmp_path, steps, stopped):
    """At the end of a run two are enough, since nothing says that the next one would be better."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "max_skipped_steps": 3}
    trainer = make_trainer(model_folder, tmp_path, **settings)
    spoil(trainer, math.nan, steps)
    with pytest.raises(FloatingPointError, match=f"step {stopped}: .* in a row .*checkpoint-{stopped} holds"):
        trainer.train()
    resumed = make_trainer(model_folder, tmp_path, **settings | {"max_steps": 8})
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stopped}"))
    assert resumed.state.global_step == 8


def test_a_run_that_only_skips_never_counts_as_finished(model_folder, tmp_path):
    """Regression: each start skipped some steps more, until the last one was "finished" with exit code 0."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "max_skipped_steps": 2}
    ends = []
    for start in range(5):
        trainer = make_trainer(model_folder, tmp_path, **settings)
        spoil(trainer, math.nan, set(range(1, 5)))
        checkpoint = newest_checkpoint(tmp_path)
        with pytest.raises(FloatingPointError) as raised:
            trainer.train(resume_from_checkpoint=None if start == 0 else str(checkpoint))
        ends.append(str(raised.value).split(":")[0])
    assert ends == ["step 2", "step 3", "step 4", "step 4", "step 4"]


@pytest.mark.parametrize("settings", [{"num_iterations": 5}, {"gradient_accumulation_steps": 2}])
def test_steps_are_counted_not_passes_and_the_message_names_a_file(model_folder, tmp_path, settings):
    settings = {"max_steps": 4, "max_skipped_steps": 2, "per_device_train_batch_size": 2} | settings
    trainer = make_trainer(model_folder, tmp_path, **settings)
    spoil(trainer, math.nan, {2})
    trainer.train()
    trainer = make_trainer(model_folder, tmp_path, **settings)
    spoil(trainer, math.nan, {2, 3})
    with pytest.raises(FloatingPointError, match="step 3: .* 2 steps in a row") as raised:
        trainer.train()
    (file,) = [word for word in str(raised.value).split() if word.endswith(".safetensors")]
    assert load_bad_batch(Path(file)).step == 3


def test_the_command_ends_with_exit_code_1_and_one_line(model_folder, tmp_path, monkeypatch, capsys):

    learning_pass = TunixTrainer.learning_pass

    def spoiled(self, batch):
        parts = learning_pass(self, batch)
        next(p for p in self.model.parameters() if p.grad is not None).grad.fill_(math.nan)
        return parts

    monkeypatch.setattr(TunixTrainer, "learning_pass", spoiled)
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: run(model_folder, tmp_path / "run", max_skipped_steps=2))
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "step 2: the loss or the gradient of 2 steps in a row" in line
    assert (tmp_path / "run" / "checkpoint-2").is_dir() and not (
        tmp_path / "run" / "adapter_model.safetensors"
    ).exists()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped_steps") for row in rows if "learning_rate" in row] == [1, 2]


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean(model_folder, tmp_path, monkeypatch):
    settings = {"use_grpo": False, "generation_max_length": 64, "learning_rate": 0.0}
    plain = make_trainer(model_folder, tmp_path, **settings)
    plain.train()
    first, _, third = (row["loss"] for row in plain.state.log_history if "loss" in row)
    trainer = make_trainer(model_folder, tmp_path, logging_steps=3, **settings)

    def spoiled(*args, **kwargs):
        logps, entropy = token_logps(*args, **kwargs)
        return logps * (math.nan if trainer.state.global_step == 1 else 1.0), entropy

    monkeypatch.setattr("tunix_torch.learn.sft.token_logps", spoiled)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert row["loss"] == pytest.approx((first + third) / 2) and row["skipped_steps"] == 1


@pytest.mark.thorough
def test_only_the_newest_bad_batches_are_kept(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=MAX_FILES + 4, max_skipped_steps=100, rows=200)
    spoil(trainer, math.nan, set(range(1, MAX_FILES + 3)))
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert kept == [f"step-{n:04}.safetensors" for n in range(3, MAX_FILES + 3)]


# ---- replay ----


@pytest.fixture(scope="module")
def bad(model_folder, tmp_path_factory):
    """The files of a bad batch of each kind, with the trainers of their runs."""
    found = {}
    for kind in ("grpo", "sft", "packs", "pairs"):
        folder = tmp_path_factory.mktemp(kind)
        settings = {"use_grpo": kind == "grpo", "packing": kind == "packs", "generation_max_length": 64}
        if kind == "pairs":
            rows = [{"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": "no"} for i in range(16)]
            args = GRPOConfig(str(folder), use_grpo=False, preference_loss="dpo", max_steps=1, report_to="none")
            trainer = TunixTrainer(model_folder, None, args, rows)
        else:
            trainer = make_trainer(model_folder, folder, max_steps=1, **settings)
        spoil(trainer, math.nan, {1})
        trainer.train()
        found[kind] = folder / FOLDER / "step-0001.safetensors", trainer
    return found


@pytest.mark.parametrize("kind", ["grpo", "sft", "packs", "pairs"])
def test_a_batch_that_is_finite_here_is_said_to_be(bad, kind, capsys):
    """The gradient was spoiled by a hook, of which the replay knows nothing."""
    file, _ = bad[kind]
    assert replay(file) is None
    said = capsys.readouterr().out
    assert "Everything is finite when it is computed again here" in said
    rows = [line.split() for line in said.splitlines() if line.strip()[:1].isdigit()]
    assert rows and all(row[3] == "-" for row in rows)
    assert any(float(row[2]) > 0 for row in rows)


@pytest.mark.parametrize("kind", ["grpo", "sft", "pairs"])
def test_the_row_and_the_module_that_are_not_finite_first_are_found(bad, kind):
    """A module that fails at one token: only rows with this token are named, by this module."""
    file, trainer = bad[kind]
    record = load_bad_batch(file)
    ids, mask = record.batch.completion_ids, record.batch.completion_mask
    each = 2 if kind == "pairs" else 1
    token = int(ids[each][mask[each]][0])  # the first token of the second row or pair
    having = {
        row
        for row in range(len(ids) // each)
        if (ids[row * each : (row + 1) * each][:, :-1] == token).any() or (token in prompt_of(record, row * each))
    }
    seen = []
    text = trainer.model.get_base_model().model
    hooks = [
        text.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"] == token), with_kwargs=True),
        text.layers[1].mlp.register_forward_hook(
            lambda m, a, output: torch.where(seen[-1][..., None], math.nan, output)
        ),
    ]
    rows = list(look_at_rows(trainer.model, record, trainer.args, None, torch.device("cpu")))
    for hook in hooks:
        hook.remove()
    assert {row.number for row in rows if row.first is not None} == having
    assert {row.first for row in rows if row.first is not None} == {"the output of base_model.model.model.layers.1.mlp"}


def prompt_of(record, row):
    group = len(record.batch.completion_ids) // len(record.batch.prompt_ids)
    return record.batch.prompt_ids[row // group].tolist()


@pytest.mark.parametrize("name", ["advantages", "token_weights"])
def test_a_number_that_was_given_is_found_with_its_texts(bad, name, tmp_path, monkeypatch, capsys):
    record = load_bad_batch(bad["grpo"][0])
    getattr(record.batch, name)[3] = math.inf
    record.save(tmp_path / "bad.safetensors")
    command.main([str(tmp_path / "bad.safetensors")])
    said = capsys.readouterr().out
    assert f"First in row 3: {name}, as given is not finite." in said
    assert "  prompt: '" in said and "  completion: '" in said


def test_a_file_that_is_no_bad_batch_is_one_line(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"no")
    for name, words in (("missing", "no such file"), ("other", "not a safetensors file")):
        with pytest.raises(ValueError, match=words):
            command.main([str(tmp_path / f"{name}.safetensors")])
