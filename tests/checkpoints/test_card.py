"""The model card says what a model is made of and how to load it, and nothing that holds on one machine only."""

import contextlib
import io
import json
import os
import re
import shutil

import pytest
from huggingface_hub import ModelCard, constants
from runs import run

from tunix_torch.checkpoints import card
from tunix_torch.checkpoints.card import CardFacts, model_card
from tunix_torch.config.data import DataConfig
from tunix_torch.config.flags import parse_job
from tunix_torch.config.grpo import GRPOConfig
from tunix_torch.config.model import ModelConfig
from tunix_torch.config.saved import settings_of
from tunix_torch.evals.estimators import wilson_interval
from tunix_torch.model import origin, tiny
from tunix_torch.model.loading import resolve_model_name
from tunix_torch.run import curves
from tunix_torch.run.export import export_merged

LOGS = [
    {"step": 0, "eval_accuracy": 0.5, "eval_mean@8": 0.25, "eval_runtime": 1.0},
    {"step": 1, "loss": 0.1},
    {"step": 40, "eval_accuracy": 0.75, "eval_mean@8": 0.5, "eval_runtime": 1.0},
    {"step": 80, "eval_accuracy": 0.875, "eval_mean@8": 0.625, "eval_runtime": 1.0},
]


def card_of(folder, base="google/gemma-3-270m-it", model_type="gemma3_text", **facts):
    return model_card(folder, CardFacts(base, model_type, is_adapter=True, **facts))


def settings(tmp_path, **others):
    args = GRPOConfig(output_dir=str(tmp_path / "secret_place"), learning_rate=2e-5, max_steps=80, report_to="none")
    data = DataConfig(dataset="gsm8k", **others)
    return settings_of(ModelConfig("google/gemma-3-270m-it"), data, args)


def test_a_card_of_a_gemma(tmp_path):
    facts = {"settings": settings(tmp_path), "log_history": LOGS, "questions": {"": 256}, "repo": "me/mine"}
    made = card_of(tmp_path, reward_funcs=["correctness_reward", "format_reward"], **facts)
    made = ModelCard(str(made))  # as the hub reads it
    assert made.data.base_model == "google/gemma-3-270m-it" and made.data.license == "gemma"
    assert made.data.datasets == ["openai/gsm8k"] and made.data.library_name == "peft"
    results = {result.metric_type: result for result in made.data.eval_results}
    assert results["accuracy"].metric_value == 0.875 and results["mean@8"].metric_value == 0.625
    low, high = wilson_interval(0.875, 256)
    assert results["accuracy"].metric_args == {"interval_95": [round(low, 4), round(high, 4)], "num_questions": 256}
    assert f"| 50.0% (43.9% to 56.1%) | 87.5% ({low:.1%} to {high:.1%}) |" in made.text
    assert "| before training | after step 80 |" in made.text
    assert "| `learning_rate` | 2e-05 |" in made.text and "The run had `max_steps` 80." in made.text
    assert "correctness_reward, format_reward" in made.text and "openai/gsm8k, split train" in made.text
    assert "https://ai.google.dev/gemma/terms" in made.text and "secret_place" not in made.content
    assert 'from_pretrained("google/gemma-3-270m-it")' in made.text and 'place = "me/mine"' in made.text


def test_the_same_facts_give_the_same_card(tmp_path):
    facts = {"settings": settings(tmp_path), "log_history": LOGS, "questions": {"": 256}}
    assert str(card_of(tmp_path, **facts)) == str(card_of(tmp_path, **facts))


def test_only_settings_that_differ_from_the_defaults_of_the_job_are_said_to_differ(tmp_path):
    def shown(*flags):
        given = settings_of(*parse_job(["--use_grpo", "--output_dir", str(tmp_path), *flags]))
        text = str(card_of(tmp_path, settings=given)).partition("## Settings")[2].partition("## Licence")[0]
        return text, dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))

    text, rows = shown()
    assert rows == {} and "The run had `max_steps` 280." in text
    assert "All settings that change what is learned are at the defaults of `train.py` for the tiny model." in text
    text, rows = shown("--learning_rate", "1e-5")
    assert rows == {"learning_rate": "1e-05"} and "these differ from the defaults of `train.py` for the tiny" in text
    text, rows = shown("--model_name", "org/model", "--learning_rate", "0.002")
    assert rows == {"learning_rate": "0.002"} and "these differ from the defaults of `train.py`:" in text


def test_paths_of_this_machine_do_not_stand_in_a_card(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}")
    given = settings(tmp_path) | {"dataset": None, "data_path": str(rows), "teacher": str(tmp_path / "teacher")}
    made = str(card_of(tmp_path / "run", base=str(tmp_path / "base"), settings=given))
    assert str(tmp_path) not in made and "rows.jsonl" in made and "base_model" not in made and "datasets" not in made


def test_figures_name_their_data_set_and_their_steps(tmp_path):
    logs = [{"step": 5, "eval_easy_accuracy": 1.0, "eval_hard_accuracy": 0.0, "eval_easy_runtime": 1.0}]
    made = card_of(tmp_path, log_history=logs, questions={"easy": 10, "hard": 20})
    assert "on 10 or 20 held-out questions" in made.text and "after step 5" in made.text
    assert "easy: greedy answers that are right |  | 100.0%" in made.text
    assert card_of(tmp_path, log_history=[{"step": 1, "loss": 1.0}], questions={"": 4}).data.eval_results is None


@pytest.mark.parametrize(
    "base, model_type, licence",
    [
        ("google/gemma-2-2b-it", "gemma2", "gemma"),
        ("unsloth/gemma-3-4b-it", "gemma3", "gemma"),
        ("google/gemma-4-E2B-it", "gemma4", "apache-2.0"),
        ("tiny", "gemma3_text", "apache-2.0"),
        (f"/anywhere/{tiny.FOLDER_PREFIX}0123abcd", "gemma3_text", "apache-2.0"),
        ("./of_mine", "gemma3_text", None),
        ("", "gemma3_text", None),
    ],
)
def test_the_licence_is_that_of_the_base_model(base, model_type, licence, tmp_path):
    made = card_of(tmp_path, base=base, model_type=model_type)
    assert made.data.license == licence
    assert ("was not known where this card was written" in made.text) == (licence is None)


def test_the_licence_of_another_model_comes_from_its_card(tmp_path, monkeypatch):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "README.md").write_text("---\nlicense: llama3.2\n---\n")
    assert origin.licence_of(str(tmp_path / "llama"), "llama") == "llama3.2"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert origin.licence_of("nobody/no-such-llama", "llama") is None


def test_a_snapshot_in_the_cache_has_the_name_of_its_repository(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--google--gemma-3-270m-it" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert origin.public_name(str(snapshot)) == "google/gemma-3-270m-it"
    assert origin.public_name(str(tmp_path)) == str(tmp_path) and origin.hub_id(str(tmp_path)) is None


def asked(text, place, folder):
    """What the Python of a card prints, with the places that the card can't know."""
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    code = re.sub(r'place = ".*?"', f"place = {str(place)!r}", code)
    code = code.replace('base = "base"', f"base = {str(folder)!r}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    return printed.getvalue()


def test_a_run_of_the_tiny_model_has_a_card_whose_code_runs(cache, tmp_path, monkeypatch, capsys):
    """The tiny model's adapter names it by its folder's name alone; merged, the card says so and keeps the figures."""
    monkeypatch.setenv("TUNIX_CACHE", cache)
    output = tmp_path / "mine"
    run("tiny", output, system_message="Think.", num_eval_completions=2)
    text = (output / "README.md").read_text()
    made = ModelCard(text)
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny.folder_name()
    assert made.data.license == "apache-2.0" and made.data.base_model is None and cache not in text
    assert "![Curves of the training](training_curves.png)" in text and (output / "training_curves.png").is_file()
    assert "on 4 held-out questions" in text and len(made.data.eval_results) == 2
    assert asked(text, output, cache).strip()
    assert "More Information Needed" not in text + (output / "checkpoint-2" / "README.md").read_text()

    export_merged(output, tmp_path / "merged")
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert merged.data.library_name == "transformers" and merged.data.model_name == "merged"
    assert "on 4 held-out questions" in merged.text and "merged into" in merged.text
    assert "PeftModel" not in merged.text and "config.json" not in merged.text
    assert (tmp_path / "merged" / "training_curves.png").is_file()
    assert asked(merged.text, tmp_path / "merged", cache).strip()


def test_a_merged_model_of_a_foreign_adapter_has_a_card_without_figures(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("README.md", "checkpoint-*"))
    export_merged(tmp_path / "run", tmp_path / "merged")
    made = ModelCard.load(tmp_path / "merged" / "README.md")
    assert made.data.eval_results is None and "## How to load it" in made.text and "## Settings" not in made.text


def test_a_card_that_somebody_broke_is_named(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "run" / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=r"README\.md: its head can't be read: .*mend or delete it"):
        export_merged(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_finds_the_tiny_model_that_it_was_trained_on(tmp_path, monkeypatch, model_folder, caplog):
    """Another version of the package makes another tiny model. The adapter gets its own, where that is still there."""
    monkeypatch.setenv("TUNIX_CACHE", str(tmp_path))
    os.symlink(model_folder, tmp_path / tiny.folder_name())
    earlier = f"{tiny.FOLDER_PREFIX}00000000"
    assert resolve_model_name(earlier) == str(tmp_path / tiny.folder_name())
    assert "which may differ" in caplog.text
    shutil.copytree(model_folder, tmp_path / earlier)
    assert resolve_model_name(earlier) == str(tmp_path / earlier)
    assert resolve_model_name(tiny.folder_name()) == resolve_model_name("tiny") == str(tmp_path / tiny.folder_name())


def test_the_curves_of_a_card_are_those_that_a_run_draws():
    assert card.CURVES_FILE == curves.CURVES_FILE
