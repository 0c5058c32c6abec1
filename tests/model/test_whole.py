"""All weights of a model learn: from a reference of its own, saved as a plain model, seen by every form of decoding."""

import json

import pytest
import torch
from models import make_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trainers import digits_reward, first_batch, gradients, lora_weights, make_trainer
from transformers import AutoModelForCausalLM, GenerationConfig

from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.batch import PromptBatch
from tunix_torch.checkpoints.files import is_whole
from tunix_torch.checkpoints.manifest import BOTH
from tunix_torch.model import tiny
from tunix_torch.model.adapter import REFERENCE_FILE
from tunix_torch.model.loading import load_model
from tunix_torch.rollout.sampler import Sampler

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def kls(trainer):
    return [row["kl"] for row in trainer.state.log_history if "kl" in row]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A model with the tiny model's tokenizer whose embeddings are tied to the head, or not."""
    path, tokenizer = tmp_path_factory.mktemp("model"), tiny.make_tokenizer()
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    settings = tokens | {"vocab_size": len(tokenizer), "initializer_range": 0.05, "tie_word_embeddings": request.param}
    model = make_model("gemma3", **settings)
    model.generation_config.update(**tokens | {"eos_token_id": [1, 5]}, do_sample=True, top_k=64)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A trainer after four steps with checkpoints, its weights before them, and its folder."""
    path = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, path, full=True, **SAVING)
    before = weights_of(trainer.model)
    trainer.train()
    trainer.save_model()
    return trainer, before, path


def test_every_weight_learns_and_the_first_kl_is_zero(trained):
    trainer, before, _ = trained
    unchanged = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    assert not unchanged
    first, *others = kls(trainer)
    assert first == pytest.approx(0, abs=1e-9) and others[-1] > 1e-6
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.reference.items())


def test_what_is_saved_is_a_plain_model(trained, folder):
    trainer, _, path = trained
    kept = weights_of(trainer.model)
    for saved in (path, path / "checkpoint-4"):
        for model in (AutoModelForCausalLM.from_pretrained(saved), load_model(str(saved))):
            assert {name: p.dtype for name, p in model.named_parameters()} == dict.fromkeys(kept, torch.float32)
            assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
            tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
            assert tied == model.config.tie_word_embeddings
    before, after = (json.loads((place / "config.json").read_text()) for place in (type(path)(folder), path))
    assert after.pop("system_message") == ""
    before.pop("transformers_version"), after.pop("transformers_version")
    assert after | {"use_cache": before["use_cache"]} == before
    assert 5 in GenerationConfig.from_pretrained(path).eos_token_id
    assert {"tokenizer.json", "generation_config.json"} <= {file.name for file in path.iterdir()}


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained, folder, tmp_path):
    whole, _, path = trained
    assert is_whole(path / "checkpoint-2")
    resumed = make_trainer(folder, tmp_path, full=True, **SAVING)
    resumed.train(resume_from_checkpoint=str(path / "checkpoint-2"))
    expected = weights_of(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed.model).items())
    assert kls(resumed) == kls(whole)
    assert resumed.reference.keys() == whole.reference.keys()
    assert all(torch.equal(weight, whole.reference[name]) for name, weight in resumed.reference.items())


def test_without_a_kl_penalty_nothing_is_copied(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, full=True, beta=0.0, **SAVING)
    trainer.train()
    assert trainer.reference is None and not list(tmp_path.glob(f"**/{REFERENCE_FILE}"))
    assert first_batch(trainer).ref_per_token_logps is None
    resumed = make_trainer(folder, tmp_path / "resumed", full=True, beta=0.0, **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = weights_of(trainer.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed.model).items())


def test_a_checkpoint_that_has_lost_its_reference_is_refused(trained, folder, tmp_path):
    lost = tmp_path / "checkpoint-2"
    lost.mkdir()
    for file in (trained[2] / "checkpoint-2").iterdir():
        if file.name not in (REFERENCE_FILE, *BOTH):  # without a manifest, which would say first what is missing
            (lost / file.name).symlink_to(file)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint=.*no {REFERENCE_FILE}"):
        make_trainer(folder, tmp_path / "out", full=True, **SAVING).train(resume_from_checkpoint=str(lost))


def test_the_gradient_is_that_of_transformers_own_layers(folder, tmp_path):
    """The gradient of the whole batch at once, by the model's own forward over unpadded rows."""
    trainer = make_trainer(folder, tmp_path, full=True, beta=0.0, generation_temperature=1.0)
    batch = first_batch(trainer)
    _, found = gradients(trainer, batch)
    model, loss = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa"), 0.0
    group = trainer.args.num_completions_per_prompt
    for row in range(len(batch.completion_ids)):
        prompt = batch.prompt_ids[row // group][batch.prompt_mask[row // group]]
        completion = batch.completion_ids[row][batch.completion_mask[row]]
        scores = model(input_ids=torch.cat((prompt, completion))[None]).logits[0, len(prompt) - 1 : -1]
        logps = scores.log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        weights = batch.token_weights[row][batch.completion_mask[row]]
        loss = (
            loss - (batch.advantages[row] * weights * logps).sum()
        )  # the ratio is 1, so its gradient is that of logps
    loss.backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert (found[name] - parameter.grad).abs().max() < 2e-5 * largest, name


def test_a_sample_after_a_step_is_that_of_a_fresh_model_with_the_same_weights(trained):
    """Weights that were laid out for decoding before the step must not be used after it."""
    trainer, _, path = trained
    prompts = PromptBatch(**next(iter(trainer.get_train_dataloader())))
    fresh = AutoModelForCausalLM.from_pretrained(path)
    samplers = [Sampler(m, trainer.sampler.eos_token_ids, trainer.sampler.pad_token_id) for m in (trainer.model, fresh)]
    uniforms = torch.rand(16, 12, generator=torch.Generator().manual_seed(0))
    old = weights_of(trainer.model)
    for change in (0.0, 0.05):
        with torch.no_grad():
            for parameters in zip(trainer.model.parameters(), fresh.parameters(), strict=True):
                for parameter in parameters:
                    parameter.data.add_(change)  # as a fused optimizer does, which raises no version
        one, other = (
            s.sample(prompts.prompt_ids, prompts.prompt_mask, 4, trainer.sampling, uniforms) for s in samplers
        )
        assert torch.equal(one.completion_ids, other.completion_ids)
        assert torch.equal(one.sampler_logps, other.sampler_logps)
    for name, parameter in trainer.model.named_parameters():
        parameter.data.copy_(old[name])


def test_a_loaded_bfloat16_model_is_trained_in_float32(folder, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    trainer = make_trainer(model, tmp_path, processing_class=tiny.make_tokenizer(), full=True, max_steps=1)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32} and "float32" in caplog.text
    trainer.train()
    trainer.save_model()
    assert {w.dtype for w in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_weights_that_the_user_froze_stay_as_they_are(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.requires_grad_(False)
    trainer = make_trainer(model, tmp_path, processing_class=tiny.make_tokenizer(), full=True)
    before = weights_of(model)
    trainer.train()
    same = {name for name, weight in weights_of(model).items() if torch.equal(weight, before[name])}
    assert same == {"model.embed_tokens.weight"} == before.keys() - trainer.reference.keys()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(AssertionError, match="frozen weights changed"):
        trainer.save_model()


def test_the_best_model_is_loaded_at_the_end(folder, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    judge = lambda completions, **columns: [0.0] * len(completions)  # noqa: E731
    trainer = make_trainer(folder, tmp_path, full=True, judge=judge, load_best_model_at_end=True, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 1  # no answer is right, so the first checkpoint stays the best
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    assert all(
        torch.equal(p, weight) for p, weight in zip(best.parameters(), lora_weights(trainer).values(), strict=True)
    )


def test_a_model_that_was_trained_is_trained_further(trained, tmp_path):
    trainer = make_trainer(str(trained[2]), tmp_path, full=True, max_steps=2)
    expected = weights_of(trained[0].model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(trainer.model).items())
    trainer.train()
    assert kls(trainer)[0] == pytest.approx(0, abs=1e-9)


def test_supervised_fine_tuning_trains_all_weights_too(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, full=True, use_grpo=False, generation_max_length=64)
    before = weights_of(trainer.model)
    trainer.train()
    assert not [name for name, weight in weights_of(trainer.model).items() if torch.equal(weight, before[name])]
    assert trainer.reference is None
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_gradient_checkpointing_gives_the_same_gradient(folder, tmp_path):
    plain = make_trainer(folder, tmp_path, full=True)
    _, expected = gradients(plain, first_batch(plain))
    trainer = make_trainer(folder, tmp_path, full=True, gradient_checkpointing=True)
    _, found = gradients(trainer, first_batch(trainer))
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * largest, name


def test_what_cannot_be_is_refused(folder, tmp_path):
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny.make_tokenizer()
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    for words, options in (
        ("full=True.*leave peft_config out", {"peft_config": lora}),
        ("reference='base'.*leave it out", {"reference": "base"}),
        ("save_batches=1", {"save_batches": 1}),
    ):
        with pytest.raises(ValueError, match=words):
            make_trainer(base, tmp_path, processing_class=tokenizer, full=True, **options)
    with pytest.raises(ValueError, match="full=True: the model has a LoRA; merge it"):
        make_trainer(get_peft_model(base, lora), tmp_path, processing_class=tokenizer, full=True)


def test_what_sees_does_not_learn(tmp_path):
    """Of a model that also sees, the text model learns; what sees and what projects it stay frozen, and are saved."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    tokenizer = tiny.make_tokenizer()
    text = make_model("gemma3", vocab_size=len(tokenizer)).config
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        generation_max_length=8,
        max_prompt_length=40,
        system_message="",
        learning_rate=1e-2,
        report_to="none",
        save_strategy="steps",
        save_steps=1,
        disable_tqdm=True,
    )
    rows = tiny.arithmetic_rows("train", 16)
    trainer = TunixTrainer(model, digits_reward, args, rows, processing_class=tokenizer, full=True)
    before = weights_of(model)
    trainer.train()
    trainer.save_model()
    same = {name for name, weight in weights_of(model).items() if torch.equal(weight, before[name])}
    sees = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert sees and same == sees and not trainer.reference.keys() & sees
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, weights_of(model)[name]) for name, p in saved.named_parameters())
    again = TunixTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path),
        digits_reward,
        args,
        rows,
        processing_class=tokenizer,
        full=True,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(p, weights_of(model)[name]) for name, p in again.model.named_parameters())
