"""What cannot work is refused before training, and numbers that are not finite are neither learned from nor saved."""

import functools

import pytest
import torch
from models import COMMON, FAMILIES, make_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trainers import digits_reward, make_trainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from tunix_torch import TunixTrainer
from tunix_torch.data.prompts import decode_completions
from tunix_torch.model.checks import check_head, has_dropout
from tunix_torch.rewarding.scoring import names_of


@pytest.fixture
def base(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.fixture
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


# ---- the model's head ----


def test_the_heads_of_tested_families_are_ours(subtests):
    for family in FAMILIES:
        with subtests.test(family=family):
            check_head(make_model(family))


@pytest.mark.parametrize(
    "model_class, config_class, scale",
    [
        (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
        (CohereForCausalLM, CohereConfig, {"logit_scale": 0.0625}),
    ],
)
def test_a_head_with_a_scale_of_its_own_is_refused(model_class, config_class, scale, tokenizer, tmp_path):
    """Regression: the scale was left out. Log-probabilities were off by 3 to 6, and training gave no warning."""
    settings = COMMON | scale | {"vocab_size": len(tokenizer)}
    with pytest.raises(ValueError, match="model_type=.*the logits of its own forward differ"):
        make_trainer(model_class(config_class(**settings)), tmp_path, processing_class=tokenizer)


def test_the_check_of_the_head_leaves_the_model_as_it_was(base):
    ids = torch.tensor([[2, 10, 11]])
    expected = base(input_ids=ids).logits
    check_head(base)
    assert torch.equal(base(input_ids=ids).logits, expected)


# ---- dropout and checkpointing of the model's own ----


def test_only_dropout_that_acts_counts(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.config.classifier_dropout = 0.1  # this setting belongs to a head that is not there, as in GPT-NeoX
    assert not has_dropout(model)
    assert has_dropout(AutoModelForCausalLM.from_pretrained(model_folder, attention_dropout=0.1))
    assert has_dropout(get_peft_model(model, LoraConfig(lora_dropout=0.1, target_modules=["q_proj"])))


def test_dropout_of_the_models_own_is_no_disagreement(model_folder, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder, attention_dropout=0.1)
    make_trainer(model, tmp_path, processing_class=tokenizer).train()


def test_checkpointing_that_was_switched_on_before_is_kept(base, tokenizer, tmp_path):
    """Regression: such a model raised a RuntimeError about sizes, as did a second trainer on a checkpointing model."""
    base.gradient_checkpointing_enable()
    first = make_trainer(base, tmp_path / "a", processing_class=tokenizer)
    assert first.args.gradient_checkpointing
    first.train()
    second = make_trainer(first.model, tmp_path / "b", processing_class=tokenizer)
    second.train()
    plain = make_trainer(
        AutoModelForCausalLM.from_pretrained(base.name_or_path), tmp_path / "c", processing_class=tokenizer
    )
    plain.train()
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (first, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


class ScheduleFree(torch.optim.SGD):
    """Remembers its mode, because schedulefree's optimizers must be told when they train and when they do not."""

    mode = "eval"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    def step(self, *args):
        assert self.mode == "train"
        return super().step(*args)


def test_schedule_free_optimizers_are_told_what_happens(model_folder, tmp_path, monkeypatch):
    modes = []

    class Watched(TunixTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = ScheduleFree([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
            return self.optimizer

        def sample_completions_for_prompts(self, prompts):
            modes.append(("rollout", self.optimizer.optimizer.mode))
            return super().sample_completions_for_prompts(prompts)

        def log(self, logs, start_time=None):
            if "eval_accuracy" in logs:
                modes.append(("evaluation", self.optimizer.optimizer.mode))
            super().log(logs, start_time)

        def _save_optimizer_and_scheduler(self, output_dir):
            modes.append(("save", self.optimizer.optimizer.mode))
            super()._save_optimizer_and_scheduler(output_dir)

    monkeypatch.setattr("trainers.TunixTrainer", Watched)
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    make_trainer(model_folder, tmp_path, **settings).train()
    assert set(modes) == {("rollout", "train"), ("evaluation", "eval"), ("save", "eval")}


# ---- numbers that are not finite ----


def test_a_learning_rate_that_explodes_is_named_with_its_step(model_folder, tmp_path):
    """Regression: an exploding learning rate raised an AssertionError that blamed the rewards of a group."""
    with pytest.raises(FloatingPointError, match="step [123]: "):
        make_trainer(model_folder, tmp_path, learning_rate=1e30, lr_scheduler_type="constant").train()


def test_weights_that_are_not_finite_are_not_saved(model_folder, tmp_path):
    trainer = make_trainer(model_folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.args.adam_epsilon = 0.0  # which the settings refuse
    with pytest.raises(FloatingPointError, match="step 1: .*not finite; nothing is saved"):
        # Adam computes 0 / 0 where a gradient is 0. This is the last step, so no later one would notice.
        trainer.train()
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_a_total_of_rewards_that_overflows_is_named(model_folder, tmp_path):
    def large(prompts, completions, **columns):
        return [1e300] * len(completions)

    trainer = make_trainer(model_folder, tmp_path, large, reward_weights=[1e300])
    with pytest.raises(ValueError, match="reward_weights=.1e.300.: the weighted total .* overflows"):
        trainer.train()


# ---- rewards, tokenizer, LoRA ----


def test_special_tokens_reach_the_reward_functions(tokenizer):
    """Regression: tags that are special tokens vanished from the text, so no completion had an answer."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    texts = ["<answer>72</answer>", "7<start_of_turn>", ""]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    bos, pad, end = tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    # The second completion was cut off at its limit, so it has no end token.
    ids = [[bos, *ids[0], end], [*ids[1][:1], pad, *ids[1][1:]], [end]]
    width = max(map(len, ids))
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in ids])
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    assert decode_completions(tokenizer, padded, mask, [end]) == texts


def test_each_reward_function_has_a_name_of_its_own(model_folder, tmp_path):
    """Regression: two functions of one name shared one metric, which held only the values of the last."""

    class Constant:
        def __init__(self, value):
            self.value = value

        def __call__(self, prompts, completions, **columns):
            return [self.value] * len(completions)

    functions = [
        Constant(1.0),
        Constant(2.0),
        functools.partial(digits_reward),
        lambda completions, **_: [3.0] * len(completions),
    ]
    names = ["Constant", "Constant_2", "digits_reward", "<lambda>"]
    assert names_of(functions) == names
    trainer = make_trainer(model_folder, tmp_path, functions, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert [log[f"rewards/{name}/mean"] for name in (*names[:2], names[3])] == [1.0, 2.0, 3.0]


def test_rewards_that_are_no_functions_are_refused(base, model_folder, tmp_path):
    for reward, words in (
        ("correctness", "'correctness'"),
        (["format"], "'format'"),
        (base, "a Gemma3ForCausalLM predicts tokens; a reward model is"),
        (model_folder, "a Gemma3ForCausalLM predicts tokens; a reward model is"),
        (3, "int"),
    ):
        with pytest.raises(ValueError, match=f"reward_funcs.*{words}"):
            make_trainer(model_folder, tmp_path, reward)


def test_tokenizers_that_cannot_work_are_refused(base, tokenizer, tmp_path):
    # The model has no embedding for this token, which occurs in the prompts.
    tokenizer.add_tokens(["What is "])
    with pytest.raises(ValueError, match="row 1: its token 108, 'What is ', has no embedding.*resize_token_embeddings"):
        make_trainer(base, tmp_path, processing_class=tokenizer)
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(ValueError, match="processing_class: .*neither a padding nor an EOS token"):
        make_trainer(base, tmp_path, processing_class=tokenizer)


def test_end_tokens_may_be_a_tuple(base, tokenizer, tmp_path):
    base.generation_config.eos_token_id = (1, 5)
    assert make_trainer(base, tmp_path, processing_class=tokenizer).sampler.eos_token_ids == (1, 5)


def test_adapters_of_another_kind_are_refused(base, tokenizer, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for setting in ({"trainable_token_indices": [3]}, {"ensure_weight_tying": True}):
        with pytest.raises(ValueError, match=f"peft_config: {next(iter(setting))}=.*not supported"):
            make_trainer(base, tmp_path, processing_class=tokenizer, peft_config=LoraConfig(**setting))
    for model, peft_config in ((base, config), (get_peft_model(base, config), None)):
        with pytest.raises(ValueError, match="PromptTuningConfig, and only a LoRA"):
            make_trainer(model, tmp_path, processing_class=tokenizer, peft_config=peft_config)
