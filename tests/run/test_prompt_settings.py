"""A model is asked, after training, in the way in which it was asked in its run."""

import json
import shutil

import pytest

from tunix_torch.cli.answering import Asked
from tunix_torch.cli.ask import parse_args
from tunix_torch.cli.evaluation import render_questions
from tunix_torch.data.rows import PROMPT, PROMPT_IDS
from tunix_torch.model.loading import load_tokenizer
from tunix_torch.run.folder import find_prompt_settings, find_system_message

THINKING = "{% if not enable_thinking | default(true) %}{{ '<answer>' }}{% endif %}"


@pytest.fixture
def trained(model_folder, tmp_path):
    """A model's folder in that of a run, whose settings are no defaults."""
    folder = tmp_path / "run" / "checkpoint-1"
    shutil.copytree(model_folder, folder)
    with open(folder / "chat_template.jinja", "a") as file:
        file.write(THINKING)
    settings = {"system_message": "", "chat_template_kwargs": {"enable_thinking": False}, "wrap_prompts": True}
    (folder.parent / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_question_is_rendered_with_the_names_and_values_of_the_run(trained):
    assert find_system_message(str(trained)) == ""
    assert find_prompt_settings(str(trained)) == {"chat_template_kwargs": {"enable_thinking": False}}
    args = parse_args(["--question", "1 + 1?", "--max_new_tokens", "2"], "ask")
    ((asked,),) = Asked(args, str(trained)).answers(["1 + 1?"])
    assert asked["prompt"].endswith("<start_of_turn>model\n<answer>")
    tokenizer, settings = load_tokenizer(str(trained)), find_prompt_settings(str(trained))
    ((row,), _) = render_questions([{"prompt": "1 + 1?"}], tokenizer, "", None, settings)
    assert row[PROMPT] == asked["prompt"]


def test_a_text_that_was_not_wrapped_in_the_run_is_not_wrapped(trained):
    (trained.parent / "config.json").write_text(json.dumps({"system_message": "", "wrap_prompts": False}))
    args = parse_args(["--question", "1 + 1?", "--max_new_tokens", "2"], "ask")
    ((asked,),) = Asked(args, str(trained)).answers(["1 + 1?"])
    assert asked["prompt"] == "1 + 1?"
    tokenizer, settings = load_tokenizer(str(trained)), find_prompt_settings(str(trained))
    ((row,), _) = render_questions([{"prompt": "1 + 1?"}], tokenizer, "", None, settings)
    assert row[PROMPT] == "1 + 1?" and tokenizer.decode(row[PROMPT_IDS]) == "1 + 1?"
