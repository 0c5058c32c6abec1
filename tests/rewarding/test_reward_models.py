"""Reward models give the scores of Hugging Face's own forward, whatever else is in the batch; mistakes are one line."""

import pytest
import torch
from models import random_reward_model, save_reward_model
from runs import SMALL
from trainers import digits_reward, make_trainer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tunix_torch import DataConfig, GRPOConfig, ModelConfig, TunixTrainer, train
from tunix_torch.model import tiny
from tunix_torch.rewarding.models import RewardModel, is_model_name, make_reward_model
from tunix_torch.rewarding.scorer import Scorer

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{{ ending or '' }}\n{% endfor %}"


@pytest.fixture
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of reward models with one output and with two."""
    root = tmp_path_factory.mktemp("reward")
    for name, labels in (("one", 1), ("two", 2)):
        save_reward_model(root / name, labels)
    return root


def alone(model, tokenizer, text):
    """The score of a text by itself, without padding, by the model's own forward."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0])


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_scores_are_those_of_the_models_own_forward_alone(kind, tokenizer):
    model = random_reward_model(tokenizer, family=kind)
    prompts = ["1 + 1 = ", "What is 2 + 3? "] * 20
    completions = [f"{'so ' * (i % 7)}{i}" for i in range(40)]
    expected = [alone(model, tokenizer, p + c) for p, c in zip(prompts, completions, strict=True)]
    scores = RewardModel(model.train(), tokenizer)(prompts, completions)
    assert len(set(scores)) > 5 and scores == pytest.approx(expected, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_batches_hold_a_bounded_number_of_tokens(tokenizer, monkeypatch):
    from tunix_torch.rewarding import models

    reward, shapes = RewardModel(random_reward_model(tokenizer), tokenizer), []
    whole = reward.scores([[5] * n for n in (3, 50, 7, 20, 100, 1)])
    forward = reward._forward

    def watched(ids, width, height):
        shapes.append((height, width))
        return forward(ids, width, height)

    monkeypatch.setattr(reward, "_forward", watched)
    monkeypatch.setattr(models.mesh, "tokens_per_pass", lambda: 100)
    assert reward.scores([[5] * n for n in (3, 50, 7, 20, 100, 1)]) == pytest.approx(whole, abs=1e-5)
    assert shapes == [(1, 100), (2, 50), (3, 7)]


def test_messages_are_rendered_by_the_reward_models_own_template(tokenizer):
    model = random_reward_model(tokenizer)
    tokenizer.chat_template = TEMPLATE
    prompt = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}]
    completion = [{"role": "assistant", "content": "2"}]
    text = "[system] Add.{0}\n[user] 1 + 1?{0}\n[assistant] 2{0}\n"
    expected = [alone(model, tokenizer, text.format(ending)) for ending in ("", "!")]
    assert RewardModel(model, tokenizer)([prompt], [completion]) == pytest.approx(expected[:1], abs=1e-5)
    ending = RewardModel(model, tokenizer, chat_template_kwargs={"ending": "!"})([prompt], [completion])
    assert ending == pytest.approx(expected[1:], abs=1e-5)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="'Qwen3ForSequenceClassification': prompts are lists of messages, and its to"):
        RewardModel(model, tokenizer)([prompt], [completion])


def test_a_text_that_is_too_long_is_cut_and_said_so_once(tokenizer, caplog):
    model = random_reward_model(tokenizer)
    reward, text = RewardModel(model, tokenizer), "12 + 34 " * 200
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:256]
    with torch.no_grad():
        expected = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
    assert reward([text, text], ["", ""]) == pytest.approx([expected] * 2, abs=1e-5)
    assert caplog.text.count("is cut at its end to the 256") == 1
    assert len(reward([""], [""])) == 1


def test_the_tokenizer_of_another_model_is_refused(tokenizer):
    reward = RewardModel(random_reward_model(tokenizer), tokenizer)
    tokenizer.add_tokens(["What is "])
    with pytest.raises(
        ValueError, match="it has 108 embeddings, and its tokenizer gives the token 108; give the model"
    ):
        reward(["What is 2 + 2?"], [""])


@pytest.mark.parametrize("kind", ["qwen3", "bert"])
def test_fixed_shapes_change_no_score(kind, tokenizer, monkeypatch):
    from tunix_torch.rewarding import models

    texts = [f"{'so ' * (9 * i)}{i}" for i in range(7)]
    plain = RewardModel(random_reward_model(tokenizer, family=kind), tokenizer)(texts, [""] * 7)
    monkeypatch.setattr(models.device, "static_shapes", lambda: True)
    monkeypatch.setattr(models, "SHORTEST", 16)
    monkeypatch.setattr(models.mesh, "tokens_per_pass", lambda: 128)
    shapes, forward = [], RewardModel._forward

    def watched(self, ids, width, height):
        shapes.append((height, width))
        return forward(self, ids, width, height)

    monkeypatch.setattr(RewardModel, "_forward", watched)
    fixed = RewardModel(random_reward_model(tokenizer, family=kind), tokenizer, num_rows=4, num_tokens=200)
    rehearsed = set(shapes)
    assert rehearsed == {(4, 16), (4, 32), (2, 64), (1, 128), (1, 256)}
    assert fixed(texts, [""] * 7) == pytest.approx(plain, abs=1e-5)
    assert set(shapes) == rehearsed and len(shapes) > len(rehearsed)


# ---- in a trainer ----


def test_a_folder_and_a_model_are_rewards(folders, model_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folders / "one")
    other = AutoTokenizer.from_pretrained(folders / "one")
    other.pad_token = None
    functions = [str(folders / "one"), digits_reward, model]
    trainer = make_trainer(
        model_folder,
        tmp_path,
        functions,
        max_steps=1,
        reward_processing_classes=[None, None, other],
        eval_on_start=True,
        per_device_eval_batch_size=4,
    )
    seen, score = [], trainer.scorer.score

    def watched(rows, completions, *more):
        rewards = score(rows, completions, *more)
        seen.append((rows, completions, rewards))
        return rewards

    trainer.scorer.score = watched
    trainer.train()
    ((rows, completions, rewards),) = seen
    assert trainer.scorer.names == ["one", "digits_reward", "one_2"] and trainer.judge is digits_reward
    prompts = [row["tunix/prompt"] for row in rows for _ in range(4)]
    expected = [alone(model, other, p + c) for p, c in zip(prompts, completions, strict=True)]
    assert rewards[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert rewards[:, 2].tolist() == pytest.approx(expected, abs=1e-5)
    assert other.pad_token == other.eos_token and model.config.pad_token_id == other.pad_token_id
    log = next(row for row in trainer.state.log_history if "reward" in row)
    assert log["rewards/one/mean"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_a_gemma_is_a_reward_model_too(tokenizer):
    base = tiny.make_model(tokenizer)
    config = base.config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    expected = [alone(model, tokenizer, text) for text in ("1 + 1", "What is 2 + 2?")]
    assert RewardModel(model, tokenizer)(["1 + 1", "What is "], ["", "2 + 2?"]) == pytest.approx(expected, abs=1e-5)


def test_a_job_may_name_a_folder(folders, model_folder, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path / "out"), **SMALL | {"max_steps": 1, "reward_weights": [1.0, 0.5]})
    data = DataConfig(num_train_rows=8, num_eval_rows=2, reward_funcs=[str(folders / "one"), "format"])
    trainer = train(ModelConfig(model_folder), data, args)
    assert trainer.scorer.names == ["one", "format_reward"]
    assert "rewards/one/mean" in next(row for row in trainer.state.log_history if "reward" in row)


# ---- what can't be a reward model ----


def test_what_is_no_reward_model_is_one_line(folders, model_folder, tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "cut").mkdir()
    for name, files in (("no_weights", ["config.json"]), ("cut", ["config.json", "model.safetensors"])):
        for file in files:
            (tmp_path / name / file).write_bytes((folders / "one" / file).read_bytes()[:2000])
    two = random_reward_model(tokenizer, 2)
    for given, words in (
        (str(folders / "two"), "reward_funcs='.*two': its head has 2 outputs; a reward model is an AutoModelForSeq"),
        (two, "reward_funcs: its head has 2 outputs; a reward model is"),
        (str(model_folder), "a Gemma3ForCausalLM predicts tokens; a reward model is"),
        (tiny.make_model(tokenizer), "a Gemma3ForCausalLM predicts tokens"),
        (torch.nn.Linear(2, 1), "a Linear without a config is no reward model; give a model of Transformers, or a fun"),
        (str(tmp_path / "empty"), "the folder has no config.json"),
        (str(tmp_path / "no_weights"), "the folder has no weights"),
        (str(tmp_path / "cut"), "could not be loaded: "),
        (str(tmp_path / "nowhere"), "no such folder"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            Scorer([given])
        assert "\n" not in str(caught.value)


def test_a_body_whose_head_is_missing_is_refused(folders, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folders / "one")
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith("score")}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match="1 weights are missing, such as score.weight; a reward model is"):
        Scorer([str(tmp_path)])


def test_a_model_of_the_hub_that_cannot_be_had_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="reward_funcs='nobody/no-model' could not be loaded: .*give the function its"):
        Scorer(["nobody/no-model"])


def test_names_of_functions_are_no_models(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("format", "mine"):
        (tmp_path / name).mkdir()
    assert [is_model_name(name) for name in ("format", "./format", "mine")] == [False, True, True]
    assert not is_model_name("correctness") and not is_model_name("tunix_torch.rewards.format_reward")
    assert is_model_name("organisation/model") and is_model_name(str(folders)) and is_model_name("bert-base-uncased")


def test_tokenizers_must_be_as_many_as_functions_and_be_able_to_pad(folders, tokenizer):
    one = str(folders / "one")
    for count, given in ((1, [None, None]), (2, [tokenizer]), (2, tokenizer)):
        size = len(given) if isinstance(given, list) else 1
        with pytest.raises(
            ValueError,
            match=f"reward_processing_classes: their number, {size}, must match that of reward_funcs, {count}",
        ):
            Scorer([one, digits_reward][:count], processing_classes=given)
    assert Scorer([one], processing_classes=tokenizer).functions[0].tokenizer is tokenizer
    bare = tiny.make_tokenizer()
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="reward_funcs='.*one': its tokenizer has neither a padding nor an EOS token"):
        Scorer([one], processing_classes=[bare])
    with pytest.raises(ValueError, match="reward_funcs: no tokenizer .*give it in reward_processing_classes"):
        make_reward_model(random_reward_model(tokenizer), None, "reward_funcs")


def test_workers_call_functions_and_a_slow_model_is_named(folders, monkeypatch):
    import contextlib
    import time

    from tunix_torch.rewarding import scorer as home

    given, scorer = [], Scorer([str(folders / "one"), digits_reward], timeout=0.5)

    @contextlib.contextmanager
    def watched(functions, count):
        given.append((functions, count))
        yield None

    monkeypatch.setattr(home, "reward_workers", watched)
    with scorer.in_workers(3):
        assert given == [([digits_reward], 3)]
    rows, completions = [{"prompt": "1 + 1?"}], ["2", "a"]
    assert scorer.score(rows, completions)[:, 1].tolist() == [1.0, 0.0]
    model = scorer.functions[0]
    monkeypatch.setattr(model, "scores", lambda ids: time.sleep(0.6) or [0.0] * len(ids))
    with pytest.raises(ValueError, match="reward_timeout=0.5: 'one' takes longer than that"):
        scorer.score(rows, completions)


def test_a_model_is_no_judge(folders, model_folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folders / "one")
    with pytest.raises(ValueError, match="judge: a Qwen3ForSequenceClassification, but reward models are not taken"):
        make_trainer(model_folder, tmp_path, judge=model)


# ---- on XLA ----


@pytest.mark.xla
def test_a_reward_model_compiles_nothing_after_the_warm_up(folders, model_folder, tmp_path):
    from tunix_torch.runtime import device

    assert device.traces_graphs()
    rows = [
        {**row, "question": row["question"] + "!" * (7 * i % 60)}
        for i, row in enumerate(tiny.arithmetic_rows("train", 64))
    ]
    args = GRPOConfig(
        output_dir=str(tmp_path),
        report_to="none",
        disable_tqdm=True,
        max_steps=5,
        per_device_train_batch_size=2,
        max_prompt_length=160,
        system_message="",
        generation_max_length=12,
        save_strategy="no",
    )
    trainer = TunixTrainer(model_folder, str(folders / "one"), args, rows)
    trainer.train()
    log = [row for row in trainer.state.log_history if "reward" in row]
    assert len(log) == 5 and len({row["compilations"] for row in log[2:]}) == 1
    reward, texts = trainer.reward_funcs[0], ["1 + 1", "What is 2 + 2? " * 9]
    model = AutoModelForSequenceClassification.from_pretrained(folders / "one")
    expected = [alone(model, reward.tokenizer, text) for text in texts]
    before = device.num_compilations()
    assert reward(texts, ["", ""]) == pytest.approx(expected, abs=1e-4)
    assert device.num_compilations() == before
