"""`TunixTrainer` keeps its invariants on a random tiny Gemma, resumes exactly, and refuses what cannot work."""

import json
import logging
import math
import shutil
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.utils.data import SequentialSampler
from trainers import digits_reward, ends_early, first_batch, gradients, lora_weights, make_trainer
from transformers import Gemma3ForCausalLM

from tunix_torch import GRPOConfig, ModelConfig, TunixTrainer
from tunix_torch.checkpoints.files import is_whole, newest_checkpoint
from tunix_torch.learn.passes import lay_out
from tunix_torch.learn.record import StepRecord
from tunix_torch.model import tiny
from tunix_torch.model.forward import base_model
from tunix_torch.model.loading import load_model, load_tokenizer, lora_config
from tunix_torch.run.callbacks import MetricsFile
from tunix_torch.runtime.profiling import PARTS


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """Return a trainer after its three steps, all its weights before them, and the folder in which it is saved."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(model_folder, folder)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model()
    return trainer, before, folder


def test_training_changes_the_lora_and_only_the_lora(trained):
    trainer, before, _ = trained
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)


def test_same_command_twice_gives_the_same_result(trained, model_folder, tmp_path):
    again = make_trainer(model_folder, tmp_path)
    again.train()
    logs = [
        [
            {k: v for k, v in row.items() if "second" not in k and "runtime" not in k}
            for row in trainer.state.log_history
        ]
        for trainer in (trained[0], again)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "dr_grpo", "dapo", "rloo"])
def test_micro_batches_give_the_loss_and_gradient_of_the_whole_batch(model_folder, tmp_path, algorithm):
    trainer = make_trainer(model_folder, tmp_path, algorithm=algorithm, num_completions_per_prompt=4)
    batch = first_batch(trainer)
    loss, whole = gradients(trainer, batch)
    for size in (2, 8):
        trainer.args.micro_batch_size = size
        loss_in_parts, in_parts = gradients(trainer, batch)
        assert loss_in_parts.item() == pytest.approx(loss.item(), abs=1e-6)
        for name in whole:
            torch.testing.assert_close(in_parts[name], whole[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_grpo", [True, False])
def test_accumulated_batches_give_the_gradient_of_one_batch(model_folder, tmp_path, use_grpo, monkeypatch):
    """Regression: each batch was averaged by itself, so that tokens of short batches counted for more.

    The gradient of SFT was off by 205%.
    """
    texts = ["3", "the answer is found by counting up from one", "12", "so it is 4"]
    rows = [{"question": "How many?", "answer": "3", "completion": text} for text in texts]
    settings = {"algorithm": "dapo", "generation_max_length": 48, "max_grad_norm": 0.0, "optim": "sgd", "max_steps": 1}
    monkeypatch.setattr(TunixTrainer, "_get_train_sampler", lambda self, *_: SequentialSampler(self.train_dataset))
    monkeypatch.setattr(tiny, "arithmetic_rows", lambda *_: rows)
    changes, logs = [], []
    for size, times in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            model_folder,
            tmp_path / str(size),
            ends_early,
            use_grpo=use_grpo,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            generation_temperature=2.0,
            **settings,
        )
        before = lora_weights(trainer)
        trainer.train()
        changes.append({name: weight - before[name] for name, weight in lora_weights(trainer).items()})
        logs.append(trainer.state.log_history[-2])
    for change, log in zip(changes[1:], logs[1:], strict=True):
        for name in changes[0]:
            torch.testing.assert_close(change[name], changes[0][name], rtol=1e-4, atol=1e-7)
        for name in {"loss", "grad_norm", "entropy", "pg_loss"} & log.keys():
            assert log[name] == pytest.approx(logs[0][name], rel=1e-4, abs=1e-6), name


def test_layers_under_gradient_checkpointing_give_the_same_gradient(model_folder, tmp_path):
    plain = make_trainer(model_folder, tmp_path / "a")
    _, expected = gradients(plain, first_batch(plain))
    trainer = make_trainer(model_folder, tmp_path / "b", gradient_checkpointing=True)
    batch, computed = first_batch(trainer), []
    layer = base_model(trainer.model).get_decoder().layers[0].mlp
    layer.register_forward_hook(lambda *_: computed.append(torch.is_grad_enabled()))
    _, got = gradients(trainer, batch)
    assert computed == [True] * 2 * len(lay_out(batch, trainer.args)), "each layer is computed twice"
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)


def test_several_passes_step_the_optimizer_each_and_leave_the_ratio_of_one(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, num_iterations=3, learning_rate=0.1)
    trainer.train()
    log = trainer.state.log_history[-2]
    assert log["clip_ratio/region_mean"] > 0, "the last pass should have moved past the clip range"


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 2, "max_steps": 4}])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(model_folder, tmp_path, settings):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "rows": 20} | settings
    whole = make_trainer(model_folder, tmp_path / "whole", callbacks=[MetricsFile()], **settings)
    whole.train()
    resumed = make_trainer(model_folder, tmp_path / "resumed", callbacks=[MetricsFile()], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = lora_weights(whole)
    for name, weights in lora_weights(resumed).items():
        assert torch.equal(weights, expected[name]), name
    rows = [[r for r in t.state.log_history if r["step"] > 2 and "reward" in r] for t in (whole, resumed)]
    assert [r["reward"] for r in rows[0]] == [r["reward"] for r in rows[1]]


def test_metrics_file_reads_as_if_an_interruption_had_not_happened(model_folder, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "callbacks": [MetricsFile()]}
    make_trainer(model_folder, tmp_path, **settings).train()
    make_trainer(model_folder, tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1, 2, 3, 4]


def test_every_promised_metric_is_logged(trained):
    row = trained[0].state.log_history[0]
    promised = (
        "loss pg_loss kl reward reward_std rewards/digits_reward/mean rewards/digits_reward/std frac_reward_zero_std "
        "completions/mean_length completions/min_length completions/max_length completions/clipped_ratio "
        "clip_ratio/region_mean entropy learning_rate grad_norm rollout_tokens_per_second learning_tokens_per_second"
    )
    for name in promised.split():
        assert math.isfinite(row[name]), name


def test_saved_adapter_loads_with_peft_and_gives_equal_logits(trained, model_folder):
    trainer, _, folder = trained
    base = Gemma3ForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa")
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        trainer.model.eval()
        ours, theirs = trainer.model(input_ids=ids).logits, loaded(input_ids=ids).logits
    # Rounding differs, because our layer adds up the weights and PEFT's layer adds up the products.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_an_adapter_folder_is_trained_further(trained, tmp_path):
    first, _, folder = trained
    again = make_trainer(str(folder), tmp_path)
    expected = lora_weights(first)
    assert all(torch.equal(weights, expected[name]) for name, weights in lora_weights(again).items())
    again.train()


def test_no_reference_is_computed_without_a_kl_penalty(model_folder, tmp_path):
    assert first_batch(make_trainer(model_folder, tmp_path, beta=0.0)).ref_per_token_logps is None
    assert first_batch(make_trainer(model_folder, tmp_path, use_kl_penalty=False)).ref_per_token_logps is None
    assert first_batch(make_trainer(model_folder, tmp_path)).ref_per_token_logps is not None


def test_rewards_see_the_columns_of_the_data_set_under_each_name(model_folder, tmp_path):
    seen = {}

    def spy(prompts, completions, answer, answers, expected_answers, question, **columns):
        seen.update(prompts=prompts, answer=answer, answers=answers, expected=expected_answers, question=question)
        return [0.0] * len(completions)

    first_batch(make_trainer(model_folder, tmp_path, [digits_reward, spy]))
    assert seen["answer"] == seen["answers"] == seen["expected"] and len(seen["answer"]) == 16
    assert all(q in p for q, p in zip(seen["question"], seen["prompts"], strict=True))
    assert seen["question"][0] == seen["question"][3] != seen["question"][4]


def test_reward_weights_and_none(model_folder, tmp_path):
    def sometimes(prompts, completions, **columns):
        return [1.0 if i % 2 else None for i in range(len(completions))]

    trainer = make_trainer(model_folder, tmp_path, [digits_reward, sometimes], reward_weights=[0.0, 2.0])
    batch = first_batch(trainer)
    assert torch.equal(batch.advantages > 0, torch.arange(16) % 2 == 1)


@pytest.mark.parametrize(
    "values, message",
    [
        (lambda n: [1.0] * (n - 1), "returned 15 values for 16"),
        (lambda n: [float("nan")] * n, "returned nan"),
    ],
)
def test_broken_reward_functions_are_named(model_folder, tmp_path, values, message):
    def broken(prompts, completions, **columns):
        return values(len(completions))

    with pytest.raises(ValueError, match=message):
        first_batch(make_trainer(model_folder, tmp_path, broken))


def test_an_exception_in_a_reward_function_is_not_swallowed(model_folder, tmp_path):
    def failing(prompts, completions, **columns):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        make_trainer(model_folder, tmp_path, failing).train()


def test_equal_rewards_are_explained_and_give_no_gradient(model_folder, tmp_path, caplog):
    def constant(prompts, completions, **columns):
        return [0.3] * len(completions)

    trainer = make_trainer(model_folder, tmp_path, constant, beta=0.0)
    with caplog.at_level(logging.WARNING):
        batch = first_batch(trainer)
    assert "nothing to learn" in caplog.text
    _, grads = gradients(trainer, batch)
    assert not any(g.any() for g in grads.values())


def test_assertion_names_the_group_and_its_rewards(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path)
    batch = first_batch(trainer)
    batch.completion_ids = batch.completion_ids.clone()
    batch.sampler_logps = batch.sampler_logps - 1.0
    with pytest.raises(AssertionError, match=r"sampler and learner disagree.*group 0 has rewards \['digits_reward'\]"):
        trainer.update(batch)


def test_of_accumulated_batches_the_rewards_of_the_wrong_one_are_named(model_folder, tmp_path):
    trainer, collected = make_trainer(model_folder, tmp_path, gradient_accumulation_steps=2), []
    collect = trainer.collect

    def spoiled(prompts):
        batch = collect(prompts)
        collected.append(trainer._rewards)
        return replace(batch, sampler_logps=batch.sampler_logps - float(len(collected) == 1))

    trainer.collect = spoiled
    with pytest.raises(AssertionError, match="sampler and learner disagree") as error:
        trainer.train()
    assert not torch.equal(*collected) and str(collected[0][:4].tolist()) in str(error.value)


def test_the_group_that_is_named_is_the_one_that_is_wrong(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, num_completions_per_prompt=2, micro_batch_size=2)
    batch = first_batch(trainer)
    batch.sampler_logps[5] -= 1.0
    with pytest.raises(AssertionError, match="sampler and learner disagree by 1 .*group 2 has rewards"):
        trainer.update(batch)


def test_no_clipping_of_gradients_still_learns_in_every_pass(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_grad_norm=0.0)
    trainer.create_optimizer_and_scheduler(10)
    batch, before = first_batch(trainer), lora_weights(trainer)
    trainer.learning_pass(batch)
    trainer.optimizer_step()
    assert any(not torch.equal(weights, before[name]) for name, weights in lora_weights(trainer).items())


def test_one_step_is_recorded_as_a_trace(model_folder, tmp_path, caplog):
    trainer = make_trainer(model_folder, tmp_path, profile_step=2, kl_penalty_coef=0.1, num_iterations=2)
    trainer.train()
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["step-2.json"]
    events = json.loads((tmp_path / "profile" / "step-2.json").read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event["name"].startswith("tunix_torch.")}
    assert set(spans) == {f"tunix_torch.{part}" for part in PARTS}
    assert any(event["name"] == "aten::mm" for event in events)
    starts = {name: span["ts"] for name, span in spans.items()}
    assert starts["tunix_torch.rollout"] < starts["tunix_torch.learning"], "what is learned from was sampled before"
    assert "Step 2 took" in caplog.text and "rollout" in caplog.text


def test_recorded_steps_hold_what_went_in_and_what_came_out(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, save_batches=2, micro_batch_size=4)
    before = lora_weights(trainer)
    trainer.train()
    files = sorted((tmp_path / "batches").iterdir())
    assert [file.name for file in files] == ["step-0001.safetensors", "step-0002.safetensors"]
    first, second = map(StepRecord.load, files)
    assert all(torch.equal(first.lora[name], before[name]) for name in before)
    assert any(not torch.equal(second.lora[name], before[name]) for name in before)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for record, row in zip((first, second), logged, strict=False):
        assert record.loss.item() == pytest.approx(row["loss"], abs=1e-4)  # Trainer rounds the logged loss
        assert record.learning_rate == row["learning_rate"]
        assert record.batch.rewards.mean().item() == pytest.approx(row["reward"])
        torch.testing.assert_close(record.logps, record.batch.sampler_logps, rtol=0, atol=1e-4)
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in first.gradients.values()))
    assert norm.item() == pytest.approx(logged[0]["grad_norm"], rel=1e-4)
    (tmp_path / "torn.safetensors").write_bytes(files[0].read_bytes()[:-9])
    with pytest.raises(ValueError, match="torn.safetensors"):
        StepRecord.load(tmp_path / "torn.safetensors")


@pytest.mark.parametrize("damage", ["weights missing", "cut short"])
def test_a_model_that_is_not_whole_is_refused_rather_than_filled_in(model_folder, tmp_path, damage):
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    else:
        kept = {name: w for name, w in load_file(file).items() if "layers.2." not in name}
        save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match="model_name="):
        make_trainer(str(tmp_path / "model"), tmp_path / "out")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nan_in_the_policy_is_caught_with_its_step_and_matrix(model_folder, tmp_path, dropout):
    lora = lora_config(ModelConfig(lora_rank=4, lora_dropout=dropout))
    trainer = make_trainer(model_folder, tmp_path, peft_config=lora)
    batch = first_batch(trainer)
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1: .*lora_B.* is not finite"):
        trainer.update(batch)


def test_changed_frozen_weights_are_caught_before_they_are_saved(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=1)
    trainer.train()
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if not p.requires_grad).mul_(1.01)
    with pytest.raises(AssertionError, match="frozen weights changed"):
        trainer.save_model()


def test_supervised_fine_tuning_learns_its_rows_and_can_be_resumed(model_folder, tmp_path):
    settings = {
        "use_grpo": False,
        "generation_max_length": 64,
        "max_steps": 20,
        "save_strategy": "steps",
        "save_steps": 10,
        "rows": 8,
        "per_device_eval_batch_size": 8,
    }
    trainer = make_trainer(model_folder, tmp_path / "a", reward_funcs=None, **settings)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    resumed = make_trainer(model_folder, tmp_path / "b", reward_funcs=None, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-10"))
    expected = lora_weights(trainer)
    assert all(torch.equal(weights, expected[name]) for name, weights in lora_weights(resumed).items())


def test_supervised_loss_is_the_mean_over_completion_tokens(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, reward_funcs=None, use_grpo=False, generation_max_length=64)
    trainer.current_gradient_accumulation_steps = 1
    inputs = next(iter(trainer.get_train_dataloader()))
    loss = trainer.training_step(trainer.model, inputs)
    total, tokens = 0.0, 0
    model = Gemma3ForCausalLM.from_pretrained(model_folder)
    for i in range(4):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i]]
        completion = inputs["completion_ids"][i][inputs["completion_mask"][i]]
        logits = model(input_ids=torch.cat((prompt, completion))[None]).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, completion, reduction="sum").item()
        tokens += len(completion)
    assert loss.item() == pytest.approx(total / tokens, rel=1e-4)
    checkpointed = make_trainer(
        model_folder,
        tmp_path,
        reward_funcs=None,
        use_grpo=False,
        generation_max_length=64,
        gradient_checkpointing=True,
    )
    checkpointed.current_gradient_accumulation_steps = 1
    again = checkpointed.training_step(checkpointed.model, inputs)
    assert again.item() == pytest.approx(loss.item(), rel=1e-4)
    expected = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, p in checkpointed.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_evaluation_judges_with_the_first_reward_and_counts_samples(model_folder, tmp_path):
    def even(prompts, completions, answer, **columns):
        return [float(int(a) % 2 == 0) for a in answer]

    trainer = make_trainer(model_folder, tmp_path, even, num_eval_completions=3, per_device_eval_batch_size=5)
    metrics = trainer.evaluate()
    expected = sum(int(row["answer"]) % 2 == 0 for row in tiny.arithmetic_rows("test", 8)) / 8
    assert metrics["eval_accuracy"] == metrics["eval_mean@3"] == expected


def test_the_judge_need_not_be_a_reward_function(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, judge=lambda completions, **columns: [1.0] * len(completions))
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    assert make_trainer(model_folder, tmp_path).judge is digits_reward


def accuracies(*values):
    """Make a judge under which successive evaluations have these accuracies, given in eighths."""
    remaining = iter(values)

    def judge(completions, **columns):
        right = next(remaining)
        return [1.0] * right + [0.0] * (len(completions) - right)

    return judge


def test_the_model_that_is_kept_is_the_one_with_the_best_accuracy(model_folder, tmp_path):
    trainer = make_trainer(
        model_folder,
        tmp_path,
        judge=accuracies(1, 5, 2),
        load_best_model_at_end=True,
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        per_device_eval_batch_size=8,
    )
    trainer.train()
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == 5 / 8
    best = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    kept = {name.replace(".default", ""): p for name, p in lora_weights(trainer).items()}
    assert set(kept) == set(best) and all(torch.equal(kept[name], best[name]) for name in kept)
    assert not all(torch.equal(kept[name], last[name]) for name in kept)


def test_training_stops_when_accuracy_no_longer_rises(model_folder, tmp_path):
    settings = {"eval_steps": 1, "per_device_eval_batch_size": 8, "max_steps": 9, "early_stopping_patience": 2}
    settings |= {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(model_folder, tmp_path, judge=accuracies(1, 5, 4, 5, 7), **settings)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.best_global_step == 2
    resumed = make_trainer(model_folder, tmp_path, judge=accuracies(5, 7), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 4, "it began to count anew"


def test_a_checkpoint_cut_short_is_not_taken_for_whole(model_folder, tmp_path):
    make_trainer(model_folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text('{"global_step": ')
    assert not is_whole(tmp_path / "checkpoint-2")
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"


def test_what_cannot_work_is_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match="reward_funcs"):
        make_trainer(model_folder, tmp_path, reward_funcs=None)
    with pytest.raises(ValueError, match="reward_weights"):
        make_trainer(model_folder, tmp_path, reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="only 3 training rows"):
        make_trainer(model_folder, tmp_path, rows=3)
    model = tiny.make_model(tiny.make_tokenizer())
    with pytest.raises(ValueError, match="processing_class"):
        TunixTrainer(model, digits_reward)
    with pytest.raises(ValueError, match="no such folder"):
        TunixTrainer("./nowhere", digits_reward)


def test_a_loaded_model_with_its_own_lora_is_taken_as_it_is(model_folder, tmp_path):
    from tunix_torch import ModelConfig
    from tunix_torch.model.loading import add_lora

    tokenizer = tiny.make_tokenizer()
    model = add_lora(tiny.make_model(tokenizer), lora_config(ModelConfig(lora_rank=2)))
    args = GRPOConfig(output_dir=str(tmp_path), report_to="none")
    trainer = TunixTrainer(model, digits_reward, args, processing_class=tokenizer)
    assert trainer.model is model


def test_a_tokenizer_without_a_padding_token_can_train(model_folder, tmp_path):
    """Regression: the trainer set the padding token only after the collator had read it."""
    tokenizer = load_tokenizer(model_folder)
    tokenizer.pad_token = None
    model = load_model(model_folder)
    trainer = make_trainer(model, tmp_path, processing_class=tokenizer, max_steps=1)
    trainer.train()
    assert trainer.data_collator.pad_token_id == tokenizer.eos_token_id


def test_evaluation_rows_may_be_empty_or_exchanged(model_folder, tmp_path):
    trainer = TunixTrainer(model_folder, digits_reward, GRPOConfig(str(tmp_path), report_to="none"), eval_dataset=[])
    with pytest.raises(ValueError, match="eval_dataset: there are no rows to evaluate on"):
        trainer.evaluate()
    trainer.eval_dataset = tiny.arithmetic_rows("test", 3)
    trainer.evaluate()
    assert len(trainer.last_answers.right) == 3
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="eval_dataset: there are no rows to evaluate on"):
        trainer.evaluate()
    assert trainer.reward_funcs == [digits_reward]
