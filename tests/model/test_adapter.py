"""A LoRA starts from its reference policy, only the right matrices learn, and saving leaves nothing out."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trainers import lora_weights, make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunix_torch.checkpoints.files import is_whole
from tunix_torch.checkpoints.manifest import BOTH
from tunix_torch.model.adapter import REFERENCE_FILE, adapter_weights, changes_nothing
from tunix_torch.model.attention import attention_masks, prompt_positions
from tunix_torch.model.forward import base_model, hidden_states, logits, reference_policy, text_config
from tunix_torch.model.loading import load_model, load_tokenizer
from tunix_torch.run.export import export_merged

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**settings):
    return LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings)


def kls(trainer):
    return [row["kl"] for row in trainer.state.log_history if "kl" in row]


def logits_of(model, ids):
    """Compute logits as training and sampling do, whatever the form of attention: (1, L) ids -> (1, L, V)."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    masks = attention_masks(text_config(model), mask, torch.arange(ids.shape[1]), base_model(model).dtype)
    with torch.no_grad():
        return logits(model, hidden_states(model.eval(), ids, masks, prompt_positions(mask), None))


@pytest.fixture
def base(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.fixture
def trainer_of(model_folder, tmp_path):
    """Return a function that makes a trainer of a loaded model."""

    def make(model, name="run", tokenizer=None, **settings):
        trainer = make_trainer(
            model, tmp_path / name, processing_class=tokenizer or load_tokenizer(model_folder), **settings
        )
        return trainer

    return make


@pytest.fixture
def trained(model_folder, tmp_path):
    """Return the folder of an adapter that has learned something."""
    trainer = make_trainer(model_folder, tmp_path / "before", max_steps=2)
    trainer.train()
    trainer.save_model()
    return str(tmp_path / "before")


# ---- the reference policy ----


def test_an_adapter_that_is_trained_further_starts_from_itself(trained, tmp_path):
    """Regression: the reference was the base model without the given adapter, so the first KL was 0.46."""
    trainer = make_trainer(trained, tmp_path / "run", use_kl_penalty=True)
    trainer.train()
    first, *others = kls(trainer)
    assert first == pytest.approx(0, abs=1e-9) and others[-1] > 1e-6
    from_base = make_trainer(trained, tmp_path / "base", reference="base")
    from_base.train()
    assert kls(from_base)[0] > 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", "gaussian", False, True])
def test_whatever_the_initialisation_the_first_kl_is_zero(base, trainer_of, init):
    trainer = trainer_of(base, peft_config=lora(init_lora_weights=init))
    trainer.train()
    first, *others = kls(trainer)
    assert first == pytest.approx(0, abs=1e-9) and others[-1] > 1e-6


def test_an_adapter_with_changed_base_weights_loads_as_it_was_saved(base, trainer_of, tmp_path):
    ids = torch.randint(6, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    for init in ("pissa", "olora"):
        trainer = trainer_of(base, init, peft_config=lora(init_lora_weights=init))
        trainer.train()
        trainer.save_model()
        torch.testing.assert_close(
            logits_of(load_model(str(tmp_path / init)), ids), logits_of(trainer.model, ids), rtol=0, atol=1e-4
        )
        base = AutoModelForCausalLM.from_pretrained(base.name_or_path)


def test_initialisations_that_cannot_be_loaded_again_or_left_out_are_refused(base, trainer_of):
    with pytest.raises(ValueError, match="init_lora_weights='pissa_niter_4'"):
        trainer_of(base, peft_config=lora(init_lora_weights="pissa_niter_4"))
    with pytest.raises(ValueError, match="reference='base'.*'pissa'"):
        trainer_of(base, peft_config=lora(init_lora_weights="pissa"), reference="base")


def test_a_resumed_run_keeps_the_reference_that_it_began_with(trained, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(trained, tmp_path / "whole", **settings)
    whole.train()
    assert (tmp_path / "whole" / "checkpoint-2" / REFERENCE_FILE).is_file()
    resumed = make_trainer(trained, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert kls(resumed)[-1] == kls(whole)[-1]
    expected = lora_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in lora_weights(resumed).items())


@pytest.mark.parametrize("lost", [False, True])
def test_a_checkpoint_of_the_adapter_alone_has_its_reference_too(trained, tmp_path, lost, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(trained, tmp_path / "whole", **settings).train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    for name in (REFERENCE_FILE, *BOTH) if lost else ():  # as an early version left it
        (checkpoint / name).unlink()
    resumed = make_trainer(trained, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    start = adapter_weights(load_model(trained), "default")
    assert resumed.reference.keys() == start.keys()
    assert all(torch.equal(weight, start[name]) for name, weight in resumed.reference.items())
    assert (f"has no {REFERENCE_FILE}" in caplog.text) == lost


def test_each_call_of_train_begins_from_the_policy_as_it_is(model_folder, tmp_path):
    """Regression: a policy that had changed before `train()` raised "the reference is not the base model"."""
    trainer = make_trainer(model_folder, tmp_path)
    with torch.no_grad():
        for name, weight in lora_weights(trainer).items():
            trainer.model.get_parameter(name).copy_(weight + 0.05)
    for _ in range(2):
        trainer.train()
        first, *others = kls(trainer)
        assert first == pytest.approx(0, abs=1e-9) and others[-1] > 1e-6


@pytest.mark.parametrize("fails", [False, True])
def test_weights_and_what_learns_are_as_before_after_the_reference(base, fails):
    model = get_peft_model(base, lora())
    frozen, *_ = adapter_weights(model, "default").values()
    frozen.requires_grad_(False)
    before = {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    start = {name: torch.randn_like(p) for name, p in adapter_weights(model, "default").items()}
    for weights in (start, None):
        with contextlib.suppress(KeyError), reference_policy(model, weights):
            if weights is not None:
                assert all(torch.equal(model.get_parameter(name), weight) for name, weight in weights.items())
            if fails:
                raise KeyError
        assert before == {name: (p, p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("init, silent", [(True, True), ("orthogonal", False), (False, False)])
def test_an_adapter_that_changes_nothing_is_known(base, init, silent):
    model = get_peft_model(base, lora(init_lora_weights=init))
    assert changes_nothing(adapter_weights(model, "default")) is silent


# ---- which adapter, and which of its matrices ----


def test_a_matrix_that_the_user_froze_stays_frozen_and_is_saved(base, trainer_of, tmp_path):
    model = get_peft_model(base, lora())
    name, matrix = next((n, p) for n, p in model.named_parameters() if "lora_A" in n)
    matrix.requires_grad_(False)
    before = matrix.detach().clone()
    trainer = trainer_of(model, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    # Loading a checkpoint lets all matrices learn, so the frozen one must be frozen again.
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    trainer.save_model()
    assert torch.equal(matrix, before) and not matrix.requires_grad
    saved = adapter_weights(load_model(str(tmp_path / "run")), "default")
    assert torch.equal(saved[name], before)


def test_of_two_adapters_the_active_one_learns_and_is_saved(base, trainer_of, tmp_path):
    """Regression: with a second adapter the first save raised "base weights changed", and the run was lost."""
    model = get_peft_model(base, lora())
    model.add_adapter("other", lora(init_lora_weights=False))
    other = {name: p.detach().clone() for name, p in adapter_weights(model, "other").items()}
    trainer = trainer_of(model)
    trainer.train()
    trainer.save_model()
    assert all(torch.equal(p, other[name]) for name, p in adapter_weights(model, "other").items())
    saved = adapter_weights(load_model(str(tmp_path / "run")), "default")
    now = adapter_weights(model, "default")
    assert all(torch.equal(weight, now[name]) for name, weight in saved.items())


def test_a_named_adapter_is_saved_where_loading_looks(base, trainer_of, tmp_path):
    """Regression: it was saved in a folder of its name, so that checkpoints looked torn.

    The best model was therefore not loaded.
    """
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(get_peft_model(base, lora(), adapter_name="mine"), load_best_model_at_end=True, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 1  # no answer is right, so the first checkpoint stays the best
    best = tmp_path / "run" / "checkpoint-1"
    assert is_whole(best) and not (best / "mine").exists()
    saved = adapter_weights(load_model(str(best)), "default")
    now = adapter_weights(trainer.model, "mine")
    assert all(torch.equal(weight, now[name.replace(".default", ".mine")]) for name, weight in saved.items())


def test_adapters_that_cannot_learn_are_refused(base, trainer_of):
    model = get_peft_model(base, lora())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged .*unmerge_adapter"):
        trainer_of(model)
    model.unmerge_adapter()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default, other act together"):
        trainer_of(model)


# ---- embeddings ----


def test_embeddings_that_were_resized_are_saved_with_the_adapter(base, trainer_of, model_folder, tmp_path):
    """Regression: the saved folder lacked the embeddings, so that loading raised IndexError.

    Export wrote only as many rows as the base model has.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["<a>", "<b>"])
    base.resize_token_embeddings(len(tokenizer))
    with torch.no_grad():
        base.get_input_embeddings().weight[-2:] = 0.25
    trainer = trainer_of(base, tokenizer=tokenizer)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[2, 10, len(tokenizer) - 2, len(tokenizer) - 1]])
    expected = logits_of(trainer.model, ids)
    torch.testing.assert_close(logits_of(load_model(str(tmp_path / "run")), ids), expected, rtol=0, atol=1e-4)
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == len(tokenizer)
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=0, atol=1e-3)


def test_embeddings_that_were_set_without_a_resize_are_saved_too(base, trainer_of, tmp_path):
    """Users can set embeddings without a resize, because models have spare rows for tokens that are added."""
    untouched = trainer_of(AutoModelForCausalLM.from_pretrained(base.name_or_path), "untouched", max_steps=1)
    untouched.save_model()
    assert not any("embed_tokens" in name for name in load_file(tmp_path / "untouched" / "adapter_model.safetensors"))
    with torch.no_grad():
        base.get_input_embeddings().weight[20] += 0.25
    trainer = trainer_of(base)
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[2, 10, 20, 21]])
    # The second time, the folder was saved by a trainer that had loaded the adapter.
    for _ in range(2):
        loaded = load_model(str(tmp_path / "run"))
        torch.testing.assert_close(logits_of(loaded, ids), logits_of(trainer.model, ids), rtol=0, atol=1e-4)
        trainer = trainer_of(loaded)
        trainer.save_model()


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_lora_on_tied_embeddings_learns_and_loads_again(base, trainer_of, tmp_path, layer):
    """Regression: a LoRA on the head raised KeyError; one on embeddings was saved in a form that loading refused."""
    trainer = trainer_of(base, peft_config=lora(target_modules=["q_proj", layer]))
    trainer.train()
    trainer.save_model()
    ids = torch.tensor([[2, 10, 11, 12]])
    loaded = load_model(str(tmp_path / "run"))
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(trainer.model, ids), rtol=0, atol=1e-4)
    assert any(layer in name and weight.detach().any() for name, weight in lora_weights(trainer).items())
