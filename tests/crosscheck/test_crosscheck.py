"""The cross-check with Google's Tunix passes on what is right, and names the quantity when our side has a defect."""

import importlib
import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from trainers import digits_reward

import tunix_torch.grpo
import tunix_torch.learn.distillation
import tunix_torch.learn.logprobs
import tunix_torch.learn.step
import tunix_torch.model.forward
import tunix_torch.trainer
import utils
from tunix_torch import DataConfig, GRPOConfig, ModelConfig, TunixTrainer, crosscheck
from tunix_torch.cli import crosscheck as command
from tunix_torch.crosscheck.cases import CASES, FAMILIES, make_rollout
from tunix_torch.crosscheck.compare import Row
from tunix_torch.crosscheck.ours import ALPHA, RANK, lora_of, make_trainer, record_steps, saved_model
from tunix_torch.crosscheck.replay import judged_by_rounding
from tunix_torch.learn.record import StepRecord
from tunix_torch.model import tiny
from tunix_torch.model.loading import load_base_model

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "tunix")), reason="JAX or Tunix is not installed"
)


@pytest.fixture(scope="module", autouse=True)
def peers():
    """Import the modules that need JAX and Tunix only when the first of these tests runs, since that takes seconds."""
    for name in ("compare", "differences", "replay", "run", "tunix_lora", "tunix_side"):
        importlib.import_module(f"tunix_torch.crosscheck.{name}")


CASE = {case.name: case for case in CASES}
IN_TUNIX = [case.name for case in CASES if case.in_tunix]
FAMILY = "gemma3-2"


@pytest.fixture(scope="module")
def policy():
    """The model folder and Tunix's policy of one family, shared so that its graphs are compiled once for all tests."""
    with saved_model(FAMILY) as folder:
        trainer = make_trainer(folder, CASE["defaults"])
        shapes = {name: tuple(weights.shape) for name, weights in lora_of(trainer).items()}
        yield (
            folder,
            crosscheck.tunix_lora.TunixPolicy(folder, load_base_model(str(folder)).config, shapes, RANK, ALPHA),
        )


def failures(rows):
    return [row.quantity for row in rows if row.verdict == "fail"]


def compare(policy, case, damage=lambda trainer: None, folder=None):
    trainer = make_trainer(folder or policy[0], case)
    damage(trainer)
    (record,) = record_steps(trainer, case, 1)
    base = load_base_model(str(folder or policy[0]))
    return list(crosscheck.compare.compare_step(case.name, record, trainer.args, policy[1], base))


@pytest.mark.parametrize(
    "name", ["defaults", *(pytest.param(name, marks=pytest.mark.thorough) for name in IN_TUNIX if name != "defaults")]
)
def test_every_case_agrees_with_tunix(policy, name):
    assert failures(compare(policy, CASE[name])) == []


def test_parameters_stay_together_over_optimizer_steps(policy):
    trainer = make_trainer(policy[0], CASE["old"])
    records = record_steps(trainer, CASE["old"], 3)
    loras = [record.lora for record in records[1:]] + [lora_of(trainer)]
    for ours, theirs in zip(loras, crosscheck.compare.tunix_updates(records, trainer.args, policy[1]), strict=True):
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
    moved = max(float((records[0].lora[name] - last).abs().max()) for name, last in loras[-1].items())
    assert moved > 1e-4, "nothing was learned, so nothing was compared"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_tunix(family):
    assert failures(crosscheck.run.rows_of_family(family, [CASE["old"]], 20)) == []


def test_the_batches_hold_every_awkward_row():
    prompts, rollout, rewards = make_rollout(0)
    lengths = rollout.completion_mask.sum(1)
    assert lengths.min() == 0 and lengths.max() == rollout.completion_ids.shape[1] and len(lengths.unique()) > 4
    assert (~prompts.prompt_mask[:, 0]).any() and not prompts.prompt_mask[:, 0].all()
    assert rewards.view(3, 4)[0].unique().numel() == 1


def test_lora_map_is_exact_both_ways(policy):
    trainer = make_trainer(policy[0], CASE["defaults"])
    lora = {name: weights.numpy() for name, weights in lora_of(trainer).items()}
    back = policy[1].lora_of(policy[1].state_of(lora))
    assert all((back[name] == lora[name]).all() for name in lora)


@pytest.mark.thorough
def test_trl_agrees_where_it_shares_a_mode():
    rows = list(crosscheck.run.rows_of_trl(FAMILY))
    assert failures(rows) == []
    compared = {row.case.partition(f"{FAMILY}, ")[2] for row in rows}
    assert compared >= {name for name in CASE if name not in IN_TUNIX} | {"old", "gspo", "dapo", "batch"}


@pytest.mark.parametrize("name", ["bnpo", "cispo", "sapo", "luspo", "vespo", "entropy bonus", "token_mask"])
@pytest.mark.thorough
def test_another_loss_is_told_from_that_of_trl(name, monkeypatch):
    """Each case gets TRL's result for the plain loss, and all of them differ from it."""
    side = importlib.import_module("tunix_torch.crosscheck.trl_side")
    right = side.compare_with_trl

    def plain(case, folder, record, args):
        args = replace(args, loss_type="grpo", entropy_coef=0.0, sampler_correction="none")
        return right(case, folder, record, args)

    monkeypatch.setattr(side, "compare_with_trl", plain)
    assert {"loss", "LoRA gradients"} & set(failures(crosscheck.run.rows_of_trl(FAMILY, cases=[name])))


@pytest.mark.thorough
def test_where_tunix_differs_ours_is_right():
    for difference in crosscheck.differences.DIFFERENCES:
        rows = list(difference())
        assert rows and failures(rows) == [], difference.__name__


# ---- it can fail ----


def test_what_is_not_a_number_fails():
    right = {"a": np.ones(3), "b": np.ones(3)}
    wrong = {"a": torch.full((3,), float("nan")), "b": torch.ones(3)}
    assert crosscheck.compare.gradient_row("case", wrong, right, True).verdict == "fail"
    assert (
        crosscheck.compare.gradient_row("case", {"a": torch.ones(3), "b": torch.ones(3)}, right, True).verdict == "pass"
    )


def plant_advantages(divisor):
    def wrong(rewards, group_size, algorithm="grpo", normalize=True, epsilon=1e-8, std=None):
        grouped = rewards.double().view(-1, group_size)
        centred = grouped - grouped.mean(dim=1, keepdim=True)
        return (centred / divisor(grouped, epsilon)).flatten().float()

    return wrong


def population_std(monkeypatch, trainer):
    wrong = plant_advantages(lambda r, epsilon: r.std(dim=1, keepdim=True, correction=0) + epsilon)
    monkeypatch.setattr(tunix_torch.rewarding.advantages, "compute_group_advantages", wrong)


def epsilon_inside_the_root(monkeypatch, trainer):
    wrong = plant_advantages(lambda r, epsilon: (r.var(dim=1, keepdim=True) + epsilon).sqrt())
    monkeypatch.setattr(tunix_torch.rewarding.advantages, "compute_group_advantages", wrong)


def k1_for_k3(monkeypatch, trainer):
    right = tunix_torch.grpo.per_token_kl
    monkeypatch.setattr(tunix_torch.grpo, "per_token_kl", lambda logps, ref, _, clamp: right(logps, ref, "k1", clamp))


def mask_off_by_one(monkeypatch, trainer):
    right = tunix_torch.learn.weights.aggregation_weights

    def shifted(mask, *settings, **counts):
        return right(torch.nn.functional.pad(mask[:, 1:], (0, 1)), *settings, **counts)

    monkeypatch.setattr(tunix_torch.learn.weights, "aggregation_weights", shifted)


def temperature_forgotten(monkeypatch, trainer):
    right = tunix_torch.learn.step.token_logps

    def forgetful(model, rows, temperature=1.0, *others):
        return right(model, rows, 1.0 if torch.is_grad_enabled() else temperature, *others)

    for module in (tunix_torch.learn.step, tunix_torch.learn.distillation):  # of the reference, and of the policy
        monkeypatch.setattr(module, "token_logps", forgetful)


def temperature_forgotten_in_old_ones(monkeypatch, trainer):
    right = tunix_torch.trainer.logps_without_gradient

    def forgetful(model, batch, args):
        if batch.ref_per_token_logps is None:
            return right(model, batch, args)
        args.generation_temperature, kept = 1.0, args.generation_temperature
        try:
            return right(model, batch, args)
        finally:
            args.generation_temperature = kept

    monkeypatch.setattr(tunix_torch.trainer, "logps_without_gradient", forgetful)


def aggregation_swapped(monkeypatch, trainer):
    right = tunix_torch.learn.weights.aggregation_weights

    def swapped(mask, mode, width, **counts):
        return right(mask, "token-mean", width, **counts)

    monkeypatch.setattr(tunix_torch.learn.weights, "aggregation_weights", swapped)


def alpha_over_rank_forgotten(monkeypatch, trainer):
    for module in trainer.model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 1.0 for name in module.scaling}


def window_off_by_one(monkeypatch, trainer):
    right = tunix_torch.model.forward.attention_masks

    def wider(config, *rest):
        config = type(config)(**(config.to_dict() | {"sliding_window": config.sliding_window + 1}))
        config._attn_implementation = "sdpa"
        return right(config, *rest)

    for module in (tunix_torch.model.forward, tunix_torch.learn.logprobs):
        monkeypatch.setattr(module, "attention_masks", wider)


def positions_not_reset_for_padding(monkeypatch, trainer):
    monkeypatch.setattr(
        tunix_torch.model.forward, "prompt_positions", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape)
    )


@pytest.mark.parametrize(
    "defect, case, quantity",
    [
        (population_std, "defaults", "advantages"),
        (epsilon_inside_the_root, "defaults", "advantages"),
        (k1_for_k3, "defaults", "KL"),
        (mask_off_by_one, "old", "policy loss"),
        (temperature_forgotten, "temperature 0.9", "policy log-probabilities"),
        (temperature_forgotten_in_old_ones, "two passes", "old log-probabilities"),
        (aggregation_swapped, "old", "policy loss"),
        (alpha_over_rank_forgotten, "defaults", "policy log-probabilities"),
        (window_off_by_one, "defaults", "base log-probabilities"),
        (positions_not_reset_for_padding, "defaults", "base log-probabilities"),
    ],
)
@pytest.mark.thorough
def test_a_planted_defect_is_reported_where_it_arises(policy, monkeypatch, defect, case, quantity):
    failed = failures(compare(policy, CASE[case], lambda trainer: defect(monkeypatch, trainer)))
    assert failed and failed[0] == quantity, failed


@pytest.mark.thorough
def test_a_wrong_rope_theta_is_reported(policy, tmp_path):
    for file in policy[0].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = 20_000.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert failures(compare(policy, CASE["defaults"], folder=tmp_path))[0] == "base log-probabilities"


# ---- the command ----


def run_command(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["crosscheck", *map(str, flags)])
    monkeypatch.setattr(command, "CHAIN", 2)
    code = 0
    try:
        command.main()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out


@pytest.mark.thorough
def test_the_command_prints_a_table_and_writes_it(monkeypatch, capsys, tmp_path):
    flags = ["--families", FAMILY, "--cases", "k1", "--json", tmp_path / "table.json"]
    code, out = run_command(monkeypatch, capsys, *flags)
    assert code == 0 and "all within tolerance" in out, out
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {"case", "quantity", "difference", "tolerance", "verdict"} <= set(rows[0])
    assert {row["verdict"] for row in rows} == {"pass"} and f"{FAMILY}, k1" in out


@pytest.mark.thorough
def test_the_command_compares_with_trl_what_tunix_does_not_have(monkeypatch, capsys):
    code, out = run_command(monkeypatch, capsys, "--families", FAMILY, "--cases", "sapo")
    assert code == 0 and f"TRL, {FAMILY}, sapo" in out and "parameters after" not in out, out


def test_the_command_names_the_worst_offender_and_fails(monkeypatch, capsys):
    k1_for_k3(monkeypatch, None)
    code, out = run_command(monkeypatch, capsys, "--families", FAMILY, "--cases", "defaults")
    assert code == 1 and "First to differ: KL of" in out and "Worst: " in out, out


def test_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install jax==.* google-tunix=="):
        command.check_installed()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--families", "gemma9"], "families='gemma9'.*gemma3-1"),
        (["--cases", "k9"], "cases='k9'.*defaults"),
        (["--from-run", "nowhere"], "from_run='nowhere'.*config.json"),
        (["--json", "nowhere/a.json"], "json='nowhere/a.json'.*folder"),
    ],
)
def test_the_command_refuses_wrong_input(monkeypatch, capsys, flags, message):
    with pytest.raises(ValueError, match=message):
        run_command(monkeypatch, capsys, *flags)


# ---- a run ----


def record_run(model_folder, output_dir, **settings):
    settings = {"max_steps": 4, "per_device_train_batch_size": 3, "max_prompt_length": 40, "save_batches": 3} | settings
    common = {"generation_max_length": 12, "system_message": "", "learning_rate": 1e-2, "report_to": "none"}
    args = GRPOConfig(output_dir=str(output_dir), save_strategy="no", disable_tqdm=True, **common, **settings)
    TunixTrainer(model_folder, digits_reward, args, tiny.arithmetic_rows("train", 64)).train()
    configs = ModelConfig(model_name=model_folder), DataConfig(), args
    utils.save_config(utils.settings_of(*configs), Path(output_dir) / "config.json")


@pytest.fixture(scope="module")
def recorded(model_folder, tmp_path_factory):
    """The folder of a recorded run, whose replays share one of Tunix's models, so that its graphs are compiled once."""
    folder, made = tmp_path_factory.mktemp("run"), []

    def make_once(*args):
        return made[0] if made else made.append(crosscheck.tunix_lora.TunixPolicy(*args)) or made[0]

    record_run(model_folder, folder)
    with mock.patch.object(crosscheck.replay, "TunixPolicy", make_once):
        yield folder


def test_a_recorded_run_is_replayed(recorded):
    rows = list(crosscheck.replay.replay(recorded))
    assert failures(rows) == []
    expected = {"advantages", "completion mask", "policy log-probabilities", "KL", "LoRA gradients"}
    assert expected | {"parameters after 1 step", "parameters after 2 steps"} <= {row.quantity for row in rows}


@pytest.mark.slow
def test_a_recorded_run_with_several_passes_is_replayed(model_folder, tmp_path):
    record_run(model_folder, tmp_path, algorithm="gspo", num_iterations=2, generation_temperature=0.9)
    rows = list(crosscheck.replay.replay(tmp_path))
    assert failures(rows) == []
    assert "old log-probabilities" in {row.quantity for row in rows}


@pytest.mark.parametrize(
    "damage, quantity",
    [
        (lambda r: {"gradients": {name: g * 1.01 for name, g in r.gradients.items()}}, "LoRA gradients"),
        (lambda r: {"lora": {name: w + 1e-3 for name, w in r.lora.items()}}, "parameters after 1 step"),
        (lambda r: {"kl_loss": r.kl_loss * 0}, "KL"),
        (lambda r: {"logps": r.logps * 1.001}, "policy log-probabilities"),
        (
            lambda r: {"batch": replace(r.batch, completion_mask=r.batch.completion_mask.roll(1, dims=1))},
            "completion mask",
        ),
    ],
)
@pytest.mark.thorough
def test_a_run_that_went_wrong_is_found_out(recorded, tmp_path, damage, quantity):
    shutil.copytree(recorded, tmp_path / "run")
    file = tmp_path / "run" / "batches" / "step-0002.safetensors"
    record = StepRecord.load(file)
    replace(record, **damage(record)).save(file)
    assert quantity in failures(crosscheck.replay.replay(tmp_path / "run"))


@pytest.mark.parametrize("sharp", [False, True], ids=["well-conditioned", "ill-conditioned"])
def test_more_than_the_usual_tolerance_is_allowed_only_where_float32_itself_is_off(recorded, model_folder, sharp):
    record = StepRecord.load(recorded / "batches" / "step-0002.safetensors")
    base = load_base_model(model_folder)
    if sharp:  # logits of some thousands, whose float32 has steps of 2e-4
        base.lm_head.weight.data *= 300
    lora = {name: w.requires_grad_(False) for name, w in record.lora.items()}
    scaling = ModelConfig().lora_alpha / ModelConfig().lora_rank

    def judged(difference, quantity="policy log-probabilities"):
        row = Row("step 2", quantity, difference, 1e-5)
        return judged_by_rounding(row, replace(record, lora=lora), base, scaling, 1.0)

    assert judged(5e-5).verdict == ("pass" if sharp else "fail")
    assert judged(0.5).verdict == judged(float("nan")).verdict == "fail"
    assert judged(5e-5, "KL").verdict == "fail", "only log-probabilities"
    assert "float64" in judged(5e-5).note and judged(1e-6).note == ""


@pytest.mark.thorough
def test_a_step_with_equal_rewards_and_a_run_that_began_elsewhere_are_told(recorded, tmp_path, capsys):
    shutil.copytree(recorded, tmp_path / "run")
    for name in ("step-0001", "step-0003"):
        (tmp_path / "run" / "batches" / f"{name}.safetensors").unlink()
    file = tmp_path / "run" / "batches" / "step-0002.safetensors"
    record = StepRecord.load(file)
    nothing = replace(record.batch, advantages=record.batch.advantages * 0, rewards=record.batch.rewards * 0)
    replace(record, batch=nothing).save(file)
    quantities = {row.quantity for row in crosscheck.replay.replay(tmp_path / "run")}
    assert "LoRA gradients" not in quantities and not any("parameters" in name for name in quantities)
    out = capsys.readouterr().out
    assert "all rewards are equal" in out and "the first step of the run is not recorded" in out


def test_a_run_without_records_says_how_to_make_them(model_folder, tmp_path):
    record_run(model_folder, tmp_path, max_steps=1, save_batches=0)
    with pytest.raises(ValueError, match="--save_batches"):
        list(crosscheck.replay.replay(tmp_path))
