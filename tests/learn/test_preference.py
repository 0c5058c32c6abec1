"""Preference losses equal their definitions, add up over any cut into batches, and pairs are learned from exactly."""

import json
import math

import numpy as np
import pytest
import torch
from models import hugging_face_logps
from safetensors import safe_open
from torch.utils.data import SequentialSampler
from trainers import lora_weights

from tunix_torch import GRPOConfig, ModelConfig, TunixTrainer
from tunix_torch.batch import TrainBatch
from tunix_torch.checkpoints.files import newest_checkpoint
from tunix_torch.cli.train import main
from tunix_torch.config.best_metric import evaluation_metrics
from tunix_torch.learn.pairs import pair_batch
from tunix_torch.learn.passes import lay_out
from tunix_torch.learn.preference import dpo_loss, log_odds, orpo_loss, preference_terms
from tunix_torch.model.loading import load_model, lora_config

KINDS = ("dpo", "ipo", "simpo", "orpo")
BETA, GAMMA = 0.3, 0.4
PAIRS = [
    {"prompt": f"{n} + 1?", "chosen": f"It is {n + 1}." + " So it is." * (n % 4), "rejected": "No idea" + "!" * (n % 3)}
    for n in range(16)
]


def numpy_losses(kind, logps, ref_logps, mask, smoothing=0.0, beta=BETA, gamma=GAMMA):
    """Return the loss of each pair, and both rewards, by the formulas of the papers, one pair at a time."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def softly(margin):
        return -(1 - smoothing) * np.log(sigmoid(margin)) - smoothing * np.log(sigmoid(-margin))

    losses, rewards = [], []
    for pair in range(len(logps) // 2):
        own = [logps[2 * pair + side][mask[2 * pair + side]].astype(np.float64) for side in (0, 1)]
        ref = [ref_logps[2 * pair + side][mask[2 * pair + side]].astype(np.float64) for side in (0, 1)]
        ratios = [a.sum() - b.sum() for a, b in zip(own, ref, strict=True)]
        means = [a.mean() for a in own]
        if kind == "dpo":
            losses.append(softly(beta * ratios[0] - beta * ratios[1]))
        elif kind == "ipo":
            distance = ratios[0] / len(own[0]) - ratios[1] / len(own[1])
            losses.append((distance - 1 / (2 * beta)) ** 2)
        elif kind == "simpo":
            losses.append(softly(beta * means[0] - beta * means[1] - gamma))
        else:
            odds = [np.exp(m) / (1 - np.exp(m)) for m in means]
            losses.append(-means[0] + beta * softly(np.log(odds[0] / odds[1])))
        rewards.append([beta * r for r in (ratios if kind in ("dpo", "ipo") else means)])
    return np.array(losses), *np.array(rewards).T


def random_pairs(seed=0, num_pairs=5, width=7):
    random = np.random.default_rng(seed)
    mask = np.arange(width) < random.integers(1, width + 1, (2 * num_pairs, 1))
    logps, ref = (-random.exponential(1.0, mask.shape).astype(np.float32) * mask for _ in range(2))
    return logps, ref, mask


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_rewards_equal_their_definitions(kind, smoothing):
    logps, ref, mask = random_pairs()
    given = torch.tensor(ref) if kind in ("dpo", "ipo") else None
    smoothing = 0.0 if kind == "ipo" else smoothing
    terms = preference_terms(
        kind, torch.tensor(logps), given, torch.tensor(mask), beta=BETA, gamma=GAMMA, label_smoothing=smoothing
    )
    loss, chosen, rejected = numpy_losses(kind, logps, ref, mask, smoothing)
    np.testing.assert_allclose(terms.loss, loss, rtol=1e-5)
    np.testing.assert_allclose(terms.chosen_rewards, chosen, rtol=1e-5)
    np.testing.assert_allclose(terms.rejected_rewards, rejected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_against_the_gradient_prefers_the_chosen_more(kind):
    logps, ref, mask = map(torch.tensor, random_pairs())
    logps.requires_grad_()

    def margins(logps):
        terms = preference_terms(kind, logps, ref if kind in ("dpo", "ipo") else None, mask, beta=BETA, gamma=GAMMA)
        return terms.loss, terms.chosen_rewards - terms.rejected_rewards

    loss, before = margins(logps)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    small = before < 0.4 if kind == "ipo" else before < math.inf  # beyond its margin IPO goes back
    assert (margins(logps - 1e-2 * gradient)[1] > before)[small].all() and small.any()


def test_where_policy_and_reference_are_one_the_loss_of_dpo_is_log_2():
    logps, _, mask = map(torch.tensor, random_pairs())
    terms = preference_terms("dpo", logps, logps, mask, beta=BETA)
    assert torch.equal(terms.loss, torch.full((5,), math.log(2.0)))
    assert not terms.chosen_rewards.any() and not terms.rejected_rewards.any()


def test_losses_are_finite_where_a_completion_is_certain_or_impossible():
    certain, impossible = torch.zeros(1, requires_grad=True), torch.full((1,), -1e4, requires_grad=True)
    for loss in (
        dpo_loss(impossible, certain, 1.0),
        orpo_loss(impossible, certain, 1.0),
        orpo_loss(certain, impossible, 1.0),
    ):
        assert loss.isfinite()
        assert all(
            g.isfinite()
            for g in torch.autograd.grad(loss.sum(), (certain, impossible), allow_unused=True)
            if g is not None
        )
    assert log_odds(torch.tensor(math.log(0.5))).item() == pytest.approx(0.0, abs=1e-6)


# ---- the trainer ----


def make_trainer(model, output_dir, rows=PAIRS, evaluation=None, **settings):
    settings = {
        "use_grpo": False,
        "preference_loss": "dpo",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "generation_max_length": 48,
        "max_prompt_length": 40,
        "system_message": "",
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | settings
    lora = (
        lora_config(ModelConfig(lora_rank=4, lora_alpha=8))
        if isinstance(model, str) and "adapter" not in model
        else None
    )
    return TunixTrainer(
        model, None, GRPOConfig(output_dir=str(output_dir), **settings), rows, evaluation, peft_config=lora
    )


def first_inputs(trainer):
    trainer.current_gradient_accumulation_steps = 1
    return next(iter(trainer.get_train_dataloader()))


def moved(trainer):
    """Give the LoRA random B matrices, so that the policy is not the reference."""
    random = torch.Generator().manual_seed(1)
    for name, p in trainer.model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=random))
    return trainer


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_learns_from_the_log_probabilities_of_hugging_faces_own_forward(
    model_folder, tmp_path, kind, checkpointing
):
    """Also that the temperature of sampling has no part in it, and that metrics have TRL's names."""
    trainer = make_trainer(model_folder, tmp_path, preference_loss=kind, gradient_checkpointing=checkpointing)
    trainer.begin_run()  # now, so that the reference is the base model
    inputs = first_inputs(moved(trainer))
    loss = trainer.training_step(trainer.model, inputs)
    mask = inputs["completion_mask"]
    tensors = {name: value for name, value in inputs.items() if name != "rows"}
    del tensors["learned_mask"]
    batch = TrainBatch(**tensors, advantages=torch.zeros(8), token_weights=mask.float(), lengths=mask.sum(1))
    with torch.no_grad():
        logps = hugging_face_logps(trainer.model, batch)[0].numpy()
        ref = hugging_face_logps(load_model(model_folder), batch)[0].numpy()
    defaults = {"beta": 2.0 if kind == "simpo" else 0.1, "gamma": 0.5}
    losses, chosen, rejected = numpy_losses(kind, logps, ref, mask.numpy(), **defaults)
    assert loss.item() == pytest.approx(losses.mean(), rel=1e-4)
    metrics = {name: values[-1] for name, values in trainer._metrics.items()}
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert {"logps/chosen", "logps/rejected", "learning_tokens_per_second"} < metrics.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_accumulated_batches_give_what_one_batch_gives(model_folder, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(TunixTrainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset))
    changes, logs = [], []
    for size, times, micro in ((8, 1, None), (8, 1, 2), (2, 4, None), (4, 2, 6)):
        trainer = make_trainer(
            model_folder,
            tmp_path / f"{size} {micro}",
            preference_loss=kind,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            micro_batch_size=micro,
            max_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
        )
        before = lora_weights(trainer)
        trainer.train()
        changes.append({name: weight - before[name] for name, weight in lora_weights(trainer).items()})
        logs.append(trainer.state.log_history[0])
    for change, log in zip(changes[1:], logs[1:], strict=True):
        for name in changes[0]:
            torch.testing.assert_close(change[name], changes[0][name], rtol=1e-4, atol=1e-7)
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            assert log[name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_learned_and_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(model_folder, tmp_path, kind):
    settings = {
        "preference_loss": kind,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "constant",
    }
    whole = make_trainer(model_folder, tmp_path / "whole", evaluation=PAIRS[:6], **settings)
    before = whole.evaluate()
    whole.train()
    after = whole.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert after["eval_rewards/accuracies"] == 1.0
    resumed = make_trainer(model_folder, tmp_path / "resumed", evaluation=PAIRS[:6], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected = lora_weights(whole)
    assert all(torch.equal(weights, expected[name]) for name, weights in lora_weights(resumed).items())
    assert resumed.evaluate()["eval_loss"] == after["eval_loss"]


def test_the_reference_is_the_adapter_that_the_run_began_with(model_folder, tmp_path):
    """DPO of an adapter begins at log 2, and a resumed run finds the reference in its checkpoint, whatever beta is."""
    first = make_trainer(model_folder, tmp_path / "adapter", preference_loss="orpo")
    first.train()
    first.save_model()
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "use_kl_penalty": False}
    second = make_trainer(str(tmp_path / "adapter"), tmp_path / "second", **settings)
    second.train()
    log = second.state.log_history[0]
    assert log["loss"] == pytest.approx(math.log(2.0), abs=1e-6) and log["rewards/margins"] == 0.0
    checkpoint = tmp_path / "second" / "checkpoint-1"
    with safe_open(checkpoint / "reference.safetensors", "pt") as kept:
        expected = lora_weights(first)
        assert all(torch.equal(kept.get_tensor(name), expected[name]) for name in kept.keys())
    resumed = make_trainer(str(tmp_path / "adapter"), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = lora_weights(second)
    assert all(torch.equal(weights, expected[name]) for name, weights in lora_weights(resumed).items())
    for kind in ("simpo", "orpo"):
        trainer = make_trainer(str(tmp_path / "adapter"), tmp_path / kind, preference_loss=kind, **settings)
        trainer.train()
        assert not (newest_checkpoint(tmp_path / kind) / "reference.safetensors").exists()


def test_an_evaluation_of_any_batch_size_is_the_mean_over_its_pairs(model_folder, tmp_path):
    trainer = moved(make_trainer(model_folder, tmp_path, evaluation=PAIRS[:5], per_device_eval_batch_size=2))
    several = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 5
    once = trainer.evaluate()
    promised = {f"eval_{name}" for name in evaluation_metrics(trainer.args, judged=False)}
    assert once.keys() - {"epoch"} == promised
    for name in promised - {"eval_runtime"}:
        assert several[name] == pytest.approx(once[name], rel=1e-5, abs=1e-6)


def test_wrong_rows_are_named_before_anything_else_happens(model_folder, tmp_path):
    wrong = [*PAIRS[:4], {"prompt": "q", "chosen": "a", "rejected": "a"}]
    with pytest.raises(ValueError, match="data set, row 5: chosen and rejected are equal, so neither is preferred"):
        make_trainer(model_folder, tmp_path, wrong)
    with pytest.raises(ValueError, match="data set, row 5: chosen and rejected are equal"):
        make_trainer(model_folder, tmp_path, PAIRS, wrong)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_grpo": True}, "preference_loss='dpo': learns from given completions: set use_grpo to False"),
        ({"preference_loss": "dopo"}, "preference_loss='dopo': choose one of dpo, ipo, simpo, orpo"),
        (
            {"beta": 0.1},
            r"kl_penalty_coef \(beta\)=0.1: the KL penalty of GRPO .*; preference losses take preference_b",
        ),
        ({"micro_batch_size": 3}, "micro_batch_size=3: counts completions, two a pair: give a multiple of 2"),
        ({"simpo_gamma": 1.0}, "simpo_gamma=1.0: it belongs to preference_loss simpo; leave it out"),
        (
            {"preference_loss": "ipo", "label_smoothing": 0.1},
            "label_smoothing=0.1: it belongs to preference_loss dpo, s",
        ),
        (
            {"preference_loss": None, "preference_beta": 1.0},
            "preference_beta=1.0: it belongs to preference_loss dpo, ip",
        ),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5: must be in \[0, 0.5\)"),
        ({"preference_beta": 0.0}, "preference_beta=0.0: must be above 0"),
    ],
)
def test_settings_that_can_not_work_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**({"use_grpo": False, "preference_loss": "dpo"} | settings))


def test_the_command_line_learns_from_a_file_of_pairs(model_folder, tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = f"--model_name {model_folder} --preference_loss simpo --data_path {tmp_path}/pairs.jsonl --max_steps 2 "
    words += f"--output_dir {tmp_path}/out --val_data_path {tmp_path}/pairs.jsonl --eval_steps 2 --report_to none "
    words += "--per_device_train_batch_size 4 --generation_max_length 48 --disable_tqdm true --save_strategy no"
    main(words.split())
    assert f"SimPO of {model_folder}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "rewards/margins" in row] == [1, 2]
    assert [row["step"] for row in rows if "eval_rewards/accuracies" in row] == [0, 2]


def test_chosen_and_rejected_share_their_prompt_which_is_computed_once(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path)
    (part,) = lay_out(pair_batch(first_inputs(trainer), 4), trainer.args)
    assert part.shares_prompts and part.batch.prompt_ids.shape[0] == 4 and part.batch.completion_ids.shape[0] == 8
