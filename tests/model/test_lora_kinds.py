"""Every kind of LoRA trains, saves, resumes exactly, starts from its reference, and decodes as it learns."""

import contextlib

import pytest
import torch
from models import make_model
from peft import LoraConfig, get_peft_model
from trainers import lora_weights, make_trainer
from transformers import AutoModelForCausalLM

from tunix_torch.model import tiny
from tunix_torch.model.adapter import REFERENCE_FILE, acts_as_base, adapter_weights
from tunix_torch.model.attention import attention_masks, prompt_positions
from tunix_torch.model.decoding import decode_weights, fast_layers
from tunix_torch.model.forward import base_model, hidden_states, logits, reference_policy, text_config
from tunix_torch.model.loading import load_model
from tunix_torch.run.export import export_merged

IDS = torch.tensor([[2, 10, 11, 12, 40, 41]])
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head copied": {"modules_to_save": ["lm_head"]},
    "embeddings copied": {"modules_to_save": ["embed_tokens"]},
    "both copied": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms and projections copied": {"modules_to_save": ["input_layernorm", "norm", "o_proj"]},
    "dora and head copied": {"use_dora": True, "modules_to_save": ["lm_head"]},
    "lora on the head": {"target_modules": [*TARGETS, "lm_head"]},
    "lora on the embeddings": {"target_modules": [*TARGETS, "embed_tokens"]},
}


def lora(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)


def logits_of(model, ids=IDS):
    """Compute logits as training does: (1, L) ids -> (1, L, V)."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    masks = attention_masks(text_config(model), mask, torch.arange(ids.shape[1]), base_model(model).dtype)
    with torch.no_grad():
        return logits(model, hidden_states(model.eval(), ids, masks, prompt_positions(mask), None))


def kls(trainer):
    return [row["kl"] for row in trainer.state.log_history if "kl" in row]


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(weight, others[name]) for name, weight in some.items())


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A model with the tiny model's tokenizer whose embeddings are tied to the head, or not."""
    path, tokenizer = tmp_path_factory.mktemp("model"), tiny.make_tokenizer()
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    settings = tokens | {"vocab_size": len(tokenizer), "initializer_range": 0.05, "tie_word_embeddings": request.param}
    make_model("gemma3", **settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.replace(" ", "-"))
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def trained(folder, kind, tmp_path_factory):
    """A trainer after four steps with checkpoints, all its weights before them, and its folder."""
    path = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, path, peft_config=lora(**kind), **SAVING)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    trainer.save_model()
    return trainer, before, path


def test_all_that_the_config_names_learns_and_nothing_else(trained, kind):
    trainer, before, _ = trained
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == lora_weights(trainer).keys() == adapter_weights(trainer.model, "default").keys()
    for module in kind.get("modules_to_save", []):
        assert any(f"{module}.modules_to_save.default" in name for name in changed)
    assert any("lora_magnitude_vector" in name for name in changed) == kind.get("use_dora", False)


def test_the_reference_of_a_new_adapter_is_the_base_model(trained, folder):
    trainer, _, _ = trained
    first, *others = kls(trainer)
    # DoRA divides the weights by their norms and multiplies by these again, which rounds
    assert first == pytest.approx(0, abs=1e-6) and others[-1] > 1e-6
    assert trainer.reference is None
    with reference_policy(trainer.model):
        torch.testing.assert_close(
            logits_of(trainer.model), logits_of(AutoModelForCausalLM.from_pretrained(folder)), rtol=0, atol=1e-5
        )
    assert not acts_as_base(trainer.model, "default")


def test_what_is_saved_computes_the_same(trained):
    trainer, _, path = trained
    expected = logits_of(trainer.model)
    for saved in (path, path / "checkpoint-4"):
        torch.testing.assert_close(logits_of(load_model(str(saved))), expected, rtol=0, atol=1e-4)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained, folder, kind, tmp_path):
    whole, _, path = trained
    resumed = make_trainer(folder, tmp_path, peft_config=lora(**kind), **SAVING)
    resumed.train(resume_from_checkpoint=str(path / "checkpoint-2"))
    assert same(lora_weights(resumed), lora_weights(whole)) and kls(resumed) == kls(whole)


@pytest.mark.thorough
def test_an_adapter_that_is_trained_further_starts_from_itself_and_resumes(trained, tmp_path):
    """The frozen copy must hold magnitudes and copied layers too."""
    trainer = make_trainer(str(trained[2]), tmp_path / "a", **SAVING)
    start = lora_weights(trainer)
    assert same(start, lora_weights(trained[0]))
    trainer.train()
    assert same(trainer.reference, start) and (tmp_path / "a" / "checkpoint-2" / REFERENCE_FILE).is_file()
    first, *others = kls(trainer)
    assert first == pytest.approx(0, abs=1e-9) and others[-1] > 1e-6
    resumed = make_trainer(str(trained[2]), tmp_path / "b", **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(lora_weights(resumed), lora_weights(trainer)) and kls(resumed) == kls(trainer)


def test_faster_layers_compute_what_peft_computes(trained):
    """Sampler and learner are compared in every step, so here both are compared with PEFT's own layers."""
    model = trained[0].model
    expected = logits_of(model)
    for context in (fast_layers, decode_weights):
        with torch.no_grad(), context(model):
            torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=1e-5)
    gaps = [r["sampling/sampling_logp_difference/mean"] for r in trained[0].state.log_history if "kl" in r]
    assert max(gaps) < 1e-5


def test_a_merge_is_right_or_refused(trained, tmp_path):
    trainer, _, path = trained
    tied = text_config(trainer.model).tie_word_embeddings
    layers = base_model(trainer.model).get_input_embeddings(), base_model(trainer.model).get_output_embeddings()
    wrapped = any(type(layer).__module__.startswith("peft") for layer in layers)
    refused = pytest.raises(ValueError, match="changes the embeddings, which the model's head shares")
    with refused if tied and wrapped else contextlib.nullcontext():
        export_merged(path, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits_of(merged), logits_of(trainer.model), rtol=0, atol=3e-4)


def test_of_two_adapters_one_learns_and_is_resumed(folder, tmp_path):
    def two():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora())
        model.add_adapter("mine", lora(use_dora=True, modules_to_save=["lm_head"]))
        model.set_adapter("mine")
        return model

    tokenizer, trainers = tiny.make_tokenizer(), []
    for name, checkpoint in (("a", None), ("b", str(tmp_path / "a" / "checkpoint-2"))):
        trainer = make_trainer(two(), tmp_path / name, processing_class=tokenizer, **SAVING)
        other = {n: p.detach().clone() for n, p in adapter_weights(trainer.model, "default").items()}
        trainer.train(resume_from_checkpoint=checkpoint)
        assert same(other, {n: p.detach() for n, p in adapter_weights(trainer.model, "default").items()})
        assert trainer.model.active_adapters == ["mine"] and all(".mine." in name for name in lora_weights(trainer))
        trainers.append(trainer)
    assert same(*map(lora_weights, trainers)) and kls(trainers[0]) == kls(trainers[1])


def test_new_tokens_whose_embeddings_learn_are_saved(folder, tmp_path, caplog):
    """Embeddings that were resized and copied: all of them are saved as copies, or none of them is."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])

    def resized():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        return model

    both, one = (lora(modules_to_save=names) for names in (["embed_tokens", "lm_head"], ["lm_head"]))
    trainer = make_trainer(resized(), tmp_path / "run", processing_class=tokenizer, peft_config=both)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[2, 10, len(tokenizer) - 2, len(tokenizer) - 1]])
    loaded = load_model(str(tmp_path / "run"))
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(trainer.model, ids), rtol=0, atol=1e-4)
    assert "is not the one that it was trained on" not in caplog.text
    with pytest.raises(ValueError, match="modules_to_save=.*resized or set, so name both"):
        make_trainer(resized(), tmp_path / "other", processing_class=tokenizer, peft_config=one)


def test_what_cannot_learn_here_is_refused(folder, tmp_path):
    tokenizer = tiny.make_tokenizer()
    for settings, words in (
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\]: .*modules_to_save"),
        ({"bias": "all"}, "bias='all': only the LoRA learns"),
    ):
        base = AutoModelForCausalLM.from_pretrained(folder, attention_bias=True)
        with pytest.raises(ValueError, match=words):
            make_trainer(base, tmp_path, processing_class=tokenizer, peft_config=lora(**settings))
    if base.config.tie_word_embeddings:  # the head has the padding token's embedding, which is 0
        with pytest.raises(ValueError, match="use_dora=True: .*lm_head has a row of zeros"):
            on_head = lora(target_modules=[*TARGETS, "lm_head"], use_dora=True)
            make_trainer(
                AutoModelForCausalLM.from_pretrained(folder), tmp_path, processing_class=tokenizer, peft_config=on_head
            )
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head'\]: the copies learn in float32"):
        make_trainer(half, tmp_path, processing_class=tokenizer, peft_config=lora(modules_to_save=["lm_head"]))


def test_another_kind_of_checkpoint_is_refused(folder, tmp_path):
    make_trainer(folder, tmp_path / "plain", peft_config=lora(), **SAVING | {"max_steps": 2}).train()
    checkpoint = str(tmp_path / "plain" / "checkpoint-2")
    for settings, words in (
        ({"use_rslora": True}, "use_rslora=True: the LoRA in .* has False"),
        ({"use_dora": True}, "use_dora=True: the LoRA in .* has False"),
        ({"modules_to_save": ["lm_head"]}, "lacks .*lm_head"),
    ):
        trainer = make_trainer(folder, tmp_path / "other", peft_config=lora(**settings), **SAVING)
        with pytest.raises(ValueError, match=words):
            trainer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="holds no weights of this Gemma3ForCausalLM"):
        make_trainer(folder, tmp_path / "whole", full=True, **SAVING).train(resume_from_checkpoint=checkpoint)
