"""The reverse KL from a teacher equals its definition, is exactly 0 for the policy itself, and falls by learning."""

import numpy as np
import pytest
import torch
from models import (
    add_nontrivial_lora,
    assert_close,
    hugging_face_logits,
    lora_gradients,
    make_batch,
    make_model,
    make_policy,
    single_row,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainers import digits_reward, ends_early, first_batch, gradients, lora_weights, make_trainer

from tunix_torch import DataConfig, GRPOConfig, ModelConfig, TunixTrainer
from tunix_torch.learn import logprobs
from tunix_torch.learn.distillation import reverse_kl, token_scores
from tunix_torch.learn.logprobs import token_logps
from tunix_torch.learn.passes import bucketed_rows, padded_rows, plain_rows, shared_prompts
from tunix_torch.model import tiny
from tunix_torch.model.attention import use_own_attention
from tunix_torch.model.loading import load_model, lora_config
from tunix_torch.model.teacher import Teacher
from tunix_torch.run.setup import choose_rewards


def teacher_of(family, **overrides):
    """Return a frozen random model of another seed."""
    model = make_model(family, seed=9, **overrides).requires_grad_(False)
    use_own_attention(model)
    return Teacher(model, is_base=False)


# ---- the mathematics ----


def test_reverse_kl_and_its_gradient_equal_their_definitions():
    random = torch.Generator().manual_seed(0)
    scores, theirs = (torch.randn(3, 4, 11, generator=random, dtype=torch.float64) for _ in range(2))
    scores.requires_grad_()
    logps, teacher_logps = torch.log_softmax(scores, -1), torch.log_softmax(theirs, -1)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (scores.detach().numpy(), theirs.numpy()))
    expected = (p * np.log(p / q)).sum(-1)
    kl = reverse_kl(logps, teacher_logps)
    np.testing.assert_allclose(kl.detach(), expected, rtol=1e-12)
    (gradient,) = torch.autograd.grad(kl.sum(), scores)
    np.testing.assert_allclose(gradient, p * (np.log(p / q) - expected[..., None]), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("layout", [plain_rows, padded_rows, bucketed_rows])
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "qwen3"])
def test_every_tokens_kl_equals_that_of_hugging_faces_own_forward(family, layout):
    """Also with a teacher of another size, and for every layout."""
    model, batch = make_policy(family), make_batch()
    teacher = teacher_of(family, hidden_size=48, intermediate_size=32)
    logps, entropy, kl = token_scores(model, layout(batch), 0.7, teacher)
    rows = []
    for i in range(len(batch.completion_ids)):
        row = single_row(batch, i)
        ids, start = torch.cat((row.prompt_ids[0], row.completion_ids[0])), len(row.prompt_ids[0]) - 1
        p, q = (torch.log_softmax(hugging_face_logits(m, ids)[start:-1] / 0.7, -1) for m in (model, teacher.model))
        of_row = (p.exp() * (p - q)).sum(-1)
        rows.append(torch.nn.functional.pad(of_row, (0, batch.completion_ids.shape[1] - len(of_row))))
    expected = torch.stack(rows)
    assert_close(kl, expected, 2e-5)
    plain_logps, plain_entropy = token_logps(model, layout(batch), 0.7)
    assert_close(logps, plain_logps, 1e-6)
    assert_close(entropy, plain_entropy, 1e-6)
    weights = torch.linspace(0.1, 2, kl.numel()).view(kl.shape)
    assert_close(lora_gradients(model, (kl * weights).sum()), lora_gradients(model, (expected * weights).sum()), 2e-5)


def test_a_teacher_that_is_the_policy_gives_0_and_no_gradient():
    policy, batch = add_nontrivial_lora(make_model("gemma3")), make_batch()
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    _, _, kl = token_scores(policy, shared_prompts(batch), 0.7, Teacher(policy, is_base=True))
    assert not kl.any() and not lora_gradients(policy, kl.sum()).any()
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


def test_the_base_model_as_a_teacher_is_the_policy_without_its_adapter():
    policy, batch = make_policy("gemma3"), make_batch()
    base = make_model("gemma3").requires_grad_(False)
    use_own_attention(base)
    kls = [token_scores(policy, shared_prompts(batch), 1.0, Teacher(m, is_base=m is policy))[2] for m in (policy, base)]
    assert_close(*kls, 1e-5)


class LargestOutput(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("chunked", [True, False])
def test_no_tensor_holds_the_logits_of_all_tokens_of_either_model(chunked, monkeypatch):
    vocabulary = 2048
    model, teacher = make_policy("gemma3", vocab_size=vocabulary), teacher_of("gemma3", vocab_size=vocabulary)
    batch = make_batch(vocabulary=vocabulary)
    whole = token_scores(model, shared_prompts(batch), 1.0, teacher)[2]
    if chunked:
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", 8 * vocabulary)
    kept = []
    with (
        LargestOutput() as largest,
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor.shape) or tensor, lambda tensor: tensor
        ),
    ):
        kl = token_scores(model, shared_prompts(batch), 1.0, teacher)[2]
        kl.sum().backward()
    all_logits = int(batch.completion_mask.sum()) * vocabulary
    assert largest.numel < all_logits if chunked else largest.numel >= all_logits
    assert_close(kl, whole, 1e-6)


# ---- the trainer ----


@pytest.fixture(scope="module")
def teacher_folder(model_folder, tmp_path_factory):
    """A model of the same tokenizer that prefers other tokens."""
    folder = tmp_path_factory.mktemp("teacher")
    model, random = load_model(model_folder), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("teacher", ["base", "folder"])
@pytest.mark.parametrize("algorithm", ["grpo", "dapo"])
def test_training_towards_itself_changes_nothing(model_folder, tmp_path, teacher, algorithm):
    teacher = model_folder if teacher == "folder" else teacher
    trainer = make_trainer(model_folder, tmp_path, None, teacher=teacher, algorithm=algorithm, weight_decay=0.0)
    before = lora_weights(trainer)
    trainer.train()
    for row in trainer.state.log_history[:3]:
        assert row["loss"] == row["teacher_kl"] == row["grad_norm"] == 0.0 and "reward" not in row and "kl" not in row
    assert all(torch.equal(weights, before[name]) for name, weights in lora_weights(trainer).items())


def test_the_policy_comes_nearer_to_its_teacher(model_folder, teacher_folder, tmp_path, caplog):
    settings = {"max_steps": 16, "generation_temperature": 1.0, "generation_top_k": 0, "generation_top_p": 1.0}
    trainer = make_trainer(model_folder, tmp_path, None, teacher=teacher_folder, learning_rate=2e-2, **settings)
    trainer.train()
    kl = [row["teacher_kl"] for row in trainer.state.log_history if "teacher_kl" in row]
    assert np.mean(kl[-4:]) < 0.8 * np.mean(kl[:4]), kl
    assert "nothing to learn" not in caplog.text, "there are no rewards that could be equal"


def test_with_rewards_the_kl_is_added_to_the_loss(model_folder, teacher_folder, tmp_path):
    settings = {"beta": 0.0, "generation_temperature": 1.5}
    plain = make_trainer(model_folder, tmp_path / "a", digits_reward, **settings)
    loss, policy_gradient = gradients(plain, first_batch(plain))
    alone = make_trainer(model_folder, tmp_path / "b", None, teacher=teacher_folder, **settings)
    kl, kl_gradient = gradients(alone, first_batch(alone))
    both = make_trainer(
        model_folder, tmp_path / "c", digits_reward, teacher=teacher_folder, distillation_coef=0.5, **settings
    )
    total, gradient = gradients(both, first_batch(both))
    assert kl > 0 and total.item() == pytest.approx(loss.item() + 0.5 * kl.item(), abs=1e-6)
    for name in gradient:
        torch.testing.assert_close(
            gradient[name], policy_gradient[name] + 0.5 * kl_gradient[name], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("settings", [{"micro_batch_size": 4}, {"gradient_checkpointing": True}])
def test_micro_batches_and_checkpointing_change_nothing(model_folder, teacher_folder, tmp_path, settings):
    results = []
    for more in ({}, settings):
        trainer = make_trainer(model_folder, tmp_path / str(len(results)), ends_early, teacher=teacher_folder, **more)
        results.append(gradients(trainer, first_batch(trainer)))
    assert results[1][0].item() == pytest.approx(results[0][0].item(), rel=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rewards", [None, digits_reward])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(model_folder, teacher_folder, tmp_path, rewards):
    settings = {"teacher": teacher_folder, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(model_folder, tmp_path / "whole", rewards, **settings)
    frozen = {name: p.detach().clone() for name, p in whole.teacher.model.named_parameters()}
    whole.train()
    assert all(torch.equal(p, frozen[name]) for name, p in whole.teacher.model.named_parameters())
    resumed = make_trainer(model_folder, tmp_path / "resumed", rewards, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = lora_weights(whole)
    assert all(torch.equal(weights, expected[name]) for name, weights in lora_weights(resumed).items())


def test_an_adapters_folder_may_be_the_teacher(model_folder, tmp_path):
    first = make_trainer(model_folder, tmp_path / "a", ends_early)
    first.train()
    first.save_model()
    again = make_trainer(str(tmp_path / "a"), tmp_path / "b", None, teacher=str(tmp_path / "a"), max_steps=1)
    again.train()
    assert again.state.log_history[0]["teacher_kl"] == pytest.approx(0.0, abs=1e-6)
    base = make_trainer(str(tmp_path / "a"), tmp_path / "c", None, teacher="base", max_steps=1)
    base.train()
    assert base.state.log_history[0]["teacher_kl"] > 1e-4


def test_a_teacher_of_other_tokens_is_refused_in_one_line(model_folder, teacher_folder, tmp_path):
    folder = tmp_path / "more"
    model, tokenizer = load_model(teacher_folder), tiny.make_tokenizer()
    tokenizer.add_tokens(["<more>"])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="its tokenizer has other tokens .'<more>' is None for the policy and"):
        make_trainer(model_folder, tmp_path / "out", None, teacher=str(folder))
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match="its head has [0-9]+ tokens and the policy's"):
        make_trainer(model_folder, tmp_path / "out", None, teacher=str(folder))
    with pytest.raises(ValueError, match="teacher='/no/where': model_name='/no/where': no such folder"):
        make_trainer(model_folder, tmp_path / "out", None, teacher="/no/where")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_grpo": False}, "teacher='base': judges what the policy samples: set use_grpo to True"),
        (
            {"beta": 0.1},
            r"kl_penalty_coef \(beta\)=0.1: with a teacher there is no KL penalty from the reference policy",
        ),
        ({"save_batches": 1}, "save_batches=1: a record has no teacher to be replayed with; leave it at 0"),
        ({"teacher": None, "distillation_coef": 2.0}, "distillation_coef=2.0: of which teacher. Set teacher"),
        ({"distillation_coef": 0.0}, "distillation_coef=0.0: must be above 0"),
    ],
)
def test_settings_that_can_not_work_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**({"teacher": "base"} | settings))


def test_a_job_with_a_teacher_has_no_reward_functions_unless_they_are_named(model_folder, teacher_folder, tmp_path):
    args = GRPOConfig(teacher_model_name_or_path=teacher_folder)
    assert args.teacher == teacher_folder and choose_rewards(DataConfig(), args) == []
    assert len(choose_rewards(DataConfig(reward_funcs=["format"]), args)) == 1
    assert len(choose_rewards(DataConfig(), GRPOConfig())) == 2
    with pytest.raises(ValueError, match="reward_funcs: GRPO needs at least one reward function"):
        TunixTrainer(model_folder, None, GRPOConfig(output_dir=str(tmp_path)), peft_config=lora_config(ModelConfig()))
