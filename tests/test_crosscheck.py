"""The cross-check with Google's Tunix passes on what is right, and names the quantity when our side has a defect."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("jax")
pytest.importorskip("tunix")

import tunix_torch.grpo
import tunix_torch.logprobs
import tunix_torch.model
import tunix_torch.trainer
import utils
from crosscheck import __main__ as command
from crosscheck import ours
from crosscheck.cases import CASES, FAMILIES, make_rollout
from crosscheck.compare import compare_step, compare_updates
from crosscheck.differences import DIFFERENCES
from crosscheck.ours import ALPHA, RANK, lora_of, make_trainer, record_steps, saved_model
from crosscheck.replay import replay
from crosscheck.run import rows_of_family, rows_of_trl
from crosscheck.tunix_side import TunixPolicy
from tunix_torch import DataConfig, GRPOConfig, ModelConfig, TunixTrainer, tiny
from tunix_torch.model import load_base_model

CASE = {case.name: case for case in CASES}
FAMILY = "gemma3-2"


@pytest.fixture(scope="module")
def policy():
    """(folder, Tunix's policy) of one family: its graphs are compiled once for all tests."""
    with saved_model(FAMILY) as folder:
        trainer = make_trainer(folder, CASE["defaults"])
        shapes = {name: tuple(weights.shape) for name, weights in lora_of(trainer).items()}
        yield folder, TunixPolicy(folder, load_base_model(str(folder)).config, shapes, RANK, ALPHA)


def failures(rows):
    return [row.quantity for row in rows if row.verdict == "fail"]


def compare(policy, case, damage=lambda trainer: None, folder=None):
    trainer = make_trainer(folder or policy[0], case)
    damage(trainer)
    (record,) = record_steps(trainer, case, 1)
    base = load_base_model(str(folder or policy[0]))
    return list(compare_step(case.name, record, trainer.args, policy[1], base))


@pytest.mark.parametrize("name", CASE)
def test_every_case_agrees_with_tunix(policy, name):
    assert failures(compare(policy, CASE[name])) == []


def test_parameters_stay_together_over_optimizer_steps(policy):
    trainer = make_trainer(policy[0], CASE["old"])
    records = record_steps(trainer, CASE["old"], 3)
    rows = list(compare_updates("old", records, lora_of(trainer), trainer.args, policy[1], (1, 3)))
    assert [row.quantity for row in rows] == ["parameters after 1 step", "parameters after 3 steps"]
    assert failures(rows) == []
    moved = max(float((records[0].lora[name] - last).abs().max()) for name, last in lora_of(trainer).items())
    assert moved > 10 * rows[0].tolerance, "nothing was learned, so nothing was compared"


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_tunix(family):
    assert failures(rows_of_family(family, [CASE["old"]], 20)) == []


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


def test_trl_agrees_where_it_shares_a_mode():
    assert failures(rows_of_trl(cases=["old", "gspo", "dapo"])) == []


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_where_tunix_differs_ours_is_right(difference):
    rows = list(difference())
    assert rows and failures(rows) == []


# ---- it can fail ----


def plant_advantages(divisor):
    def wrong(rewards, group_size, algorithm="grpo", normalize=True, epsilon=1e-8):
        grouped = rewards.double().view(-1, group_size)
        centred = grouped - grouped.mean(dim=1, keepdim=True)
        return (centred / divisor(grouped, epsilon)).flatten().float()

    return wrong


def population_std(monkeypatch, trainer):
    wrong = plant_advantages(lambda r, epsilon: r.std(dim=1, keepdim=True, correction=0) + epsilon)
    monkeypatch.setattr(tunix_torch.trainer, "compute_group_advantages", wrong)


def epsilon_inside_the_root(monkeypatch, trainer):
    wrong = plant_advantages(lambda r, epsilon: (r.var(dim=1, keepdim=True) + epsilon).sqrt())
    monkeypatch.setattr(tunix_torch.trainer, "compute_group_advantages", wrong)


def k1_for_k3(monkeypatch, trainer):
    right = tunix_torch.grpo.per_token_kl
    monkeypatch.setattr(tunix_torch.grpo, "per_token_kl", lambda logps, ref, _, clamp: right(logps, ref, "k1", clamp))


def mask_off_by_one(monkeypatch, trainer):
    right = tunix_torch.trainer.aggregation_weights
    shifted = lambda mask, *rest: right(torch.nn.functional.pad(mask[:, 1:], (0, 1)), *rest)  # noqa: E731
    monkeypatch.setattr(tunix_torch.trainer, "aggregation_weights", shifted)


def temperature_forgotten(monkeypatch, trainer):
    right = tunix_torch.trainer.token_logps

    def forgetful(model, batch, temperature=1.0, share_prefix=True):
        return right(model, batch, 1.0 if torch.is_grad_enabled() else temperature, share_prefix)

    monkeypatch.setattr(tunix_torch.trainer, "token_logps", forgetful)


def aggregation_swapped(monkeypatch, trainer):
    right = tunix_torch.trainer.aggregation_weights
    monkeypatch.setattr(
        tunix_torch.trainer, "aggregation_weights", lambda mask, mode, width: right(mask, "token-mean", width)
    )


def alpha_over_rank_forgotten(monkeypatch, trainer):
    for module in trainer.model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: 1.0 for name in module.scaling}


def window_off_by_one(monkeypatch, trainer):
    right = tunix_torch.model.attention_masks

    def wider(config, *rest):
        config = type(config)(**(config.to_dict() | {"sliding_window": config.sliding_window + 1}))
        config._attn_implementation = "sdpa"
        return right(config, *rest)

    for module in (tunix_torch.model, tunix_torch.logprobs):
        monkeypatch.setattr(module, "attention_masks", wider)


def positions_not_reset_for_padding(monkeypatch, trainer):
    monkeypatch.setattr(
        tunix_torch.model, "prompt_positions", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape)
    )


@pytest.mark.parametrize(
    "defect, case, quantity",
    [
        (population_std, "defaults", "advantages"),
        (epsilon_inside_the_root, "defaults", "advantages"),
        (k1_for_k3, "defaults", "KL"),
        (mask_off_by_one, "old", "policy loss"),
        (temperature_forgotten, "temperature 0.9", "policy log-probabilities"),
        (aggregation_swapped, "old", "policy loss"),
        (alpha_over_rank_forgotten, "defaults", "policy log-probabilities"),
        (window_off_by_one, "defaults", "base log-probabilities"),
        (positions_not_reset_for_padding, "defaults", "base log-probabilities"),
    ],
)
def test_a_planted_defect_is_reported_where_it_arises(policy, monkeypatch, defect, case, quantity):
    failed = failures(compare(policy, CASE[case], lambda trainer: defect(monkeypatch, trainer)))
    assert quantity in failed
    before = {"policy loss": "KL"}.get(quantity)  # a wrong weight shows in both
    assert failed[0] in (quantity, before), failed


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


def test_the_command_prints_a_table_and_writes_it(monkeypatch, capsys, tmp_path):
    flags = ["--families", FAMILY, "--cases", "k1", "--json", tmp_path / "table.json"]
    code, out = run_command(monkeypatch, capsys, *flags)
    assert code == 0 and "all within tolerance" in out, out
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {"case", "quantity", "difference", "tolerance", "verdict"} <= set(rows[0])
    assert {row["verdict"] for row in rows} == {"pass"} and f"{FAMILY}, k1" in out


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


def digits_reward(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def record_run(model_folder, output_dir, **settings):
    settings = {"max_steps": 4, "per_device_train_batch_size": 3, "max_prompt_length": 40, "save_batches": 3} | settings
    common = {"generation_max_length": 12, "system_message": "", "learning_rate": 1e-3, "report_to": "none"}
    args = GRPOConfig(output_dir=str(output_dir), save_strategy="no", disable_tqdm=True, **common, **settings)
    TunixTrainer(model_folder, digits_reward, args, tiny.arithmetic_rows("train", 64)).train()
    configs = ModelConfig(model_name=model_folder), DataConfig(), args
    utils.save_config(utils.settings_of(*configs), Path(output_dir) / "config.json")


@pytest.mark.parametrize("settings", [{}, {"algorithm": "gspo", "num_iterations": 2, "generation_temperature": 0.9}])
def test_a_recorded_run_is_replayed(model_folder, tmp_path, settings):
    record_run(model_folder, tmp_path, **settings)
    rows = list(replay(tmp_path))
    assert failures(rows) == []
    quantities = {row.quantity for row in rows}
    assert {"advantages", "policy log-probabilities", "KL", "LoRA gradients"} <= quantities
    assert ("parameters after 2 steps" in quantities) == (not settings)


def test_a_run_whose_gradient_was_wrong_is_found_out(model_folder, tmp_path):
    record_run(model_folder, tmp_path, max_steps=1)
    (file,) = (tmp_path / "batches").iterdir()
    record = ours.StepRecord.load(file)
    name = next(name for name, gradient in record.gradients.items() if gradient.any())
    replace(record, gradients=record.gradients | {name: record.gradients[name] * 1.01}).save(file)
    assert failures(replay(tmp_path)) == ["LoRA gradients"]


def test_a_run_without_records_says_how_to_make_them(model_folder, tmp_path):
    record_run(model_folder, tmp_path, max_steps=1, save_batches=0)
    with pytest.raises(ValueError, match="--save_batches"):
        list(replay(tmp_path))
