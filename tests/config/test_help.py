"""The help of `train.py` fits a screen, has every setting under `--help-all`, and says the defaults in force."""

import dataclasses
import json
import re

import pytest

from tunix_torch.config import help
from tunix_torch.config.flags import CONFIGS, NAMES, parse_job
from tunix_torch.rewarding.scoring import name_of
from tunix_torch.run.setup import choose_rewards


@pytest.fixture
def printed(monkeypatch, capsys):
    """Return a function that gives what the flags print on a terminal of some width."""

    def printed(*flags, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as ended:
            parse_job(flags, "python train.py", "Train a model.\n\n# one\npython train.py --use_grpo\n")
        assert ended.value.code == 0
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize("columns", [72, 80, 120])
def test_help_fits_one_screen_of_any_width(printed, columns):
    text = printed("--help", columns=columns)
    assert len(text.splitlines()) < 45
    assert max(map(len, text.splitlines())) <= columns
    assert re.findall(r"^  --(\w+)", text.partition("matter first [")[2], re.MULTILINE) == list(help.FIRST)
    assert len(help.FIRST) == 12


def test_help_shows_the_defaults_that_are_in_force(printed, tmp_path):
    """They are those of the tiny model's recipe only where it is trained; then come the file and the flags."""

    def default(text, name):
        return re.search(rf"--{name} .*?\[(.*?)\]", text, re.DOTALL)[1]

    text = printed("-h")
    assert default(text, "learning_rate") == "0.002" and default(text, "generation_max_length") == "48"
    text = printed("--model_name", "google/gemma-3-270m-it", "--help")
    assert default(text, "learning_rate") == "1e-05" and default(text, "generation_max_length") == "256"
    (tmp_path / "c.json").write_text(json.dumps({"learning_rate": 0.5, "reward_funcs": ["format", "a.b"]}))
    text = printed("--config", str(tmp_path / "c.json"), "--help")
    assert default(text, "learning_rate") == "0.5" and default(text, "reward_funcs") == "format a.b"


def test_help_shows_the_rewards_and_the_judge_that_a_job_takes_where_none_is_named(printed):
    def shown(*flags):
        text = printed("--help-all", *flags, columns=200)
        return [re.search(rf"--{name} .*?\[(.*?)\]", text, re.DOTALL)[1] for name in ("reward_funcs", "judge")]

    assert shown() == shown("--dataset", "gsm8k") == ["correctness format", "correctness"]
    assert shown("--dataset", "math") == ["math_equal format", "math_equal"]
    assert shown("--teacher", "base")[0] == "none", "a teacher alone is what such a job learns from"
    assert shown("--reward_preset", "agent_tunix")[0] == "those of agent_tunix"
    for flags in ([], ["--dataset", "math"]):
        _, data, args = parse_job(["--use_grpo", *flags])
        assert (
            " ".join(name_of(each).removesuffix("_reward") for each in choose_rewards(data, args)) == shown(*flags)[0]
        )


def test_help_all_has_every_setting_once_in_a_group(printed):
    text = printed("--help-all", columns=100)
    groups = text.split("\n\n")[4:]
    found = [name for group in groups for name in re.findall(r"^  --(\w+)", group, re.MULTILINE)]
    assert sorted(found) == NAMES
    titles = [group.strip().splitlines()[0] for group in groups]
    assert len(set(titles)) == len(titles) and all(title.endswith(":") for title in titles), titles
    assert max(map(len, re.sub(r"--\w+ \S+", "", text).splitlines())) <= 100


def test_groups_are_derived_from_the_dataclasses():
    """Every field that the table of groups names is there, and the last group of Transformers keeps few settings."""
    titles = help.group_titles(CONFIGS)
    assert sorted(titles) == NAMES and help.FIRST.keys() | help.MOVED.keys() <= titles.keys()
    own = [field.name for field in dataclasses.fields(CONFIGS[-1])]
    places = [own.index(name) for name in help.OWN_GROUPS]
    assert places == sorted(places), "groups stand in the order of the fields"
    for name, title in help.OWN_GROUPS.items():
        assert titles[name] == title
    assert titles["learning_rate"] == "Learning Rate & Scheduler" and titles["hub_model_id"].startswith("Hugging Face")
    assert sum(title == "Others of Transformers" for title in titles.values()) < 10, "the docstring has no headings?"


def test_a_folded_command_is_the_same_command():
    command = "python train.py --use_grpo --model_name google/gemma-3-270m-it --dataset gsm8k --max_steps 500"
    folded = help.folded(f"# a comment\n{command}", 60)
    assert all(len(line) <= 60 for line in folded.splitlines())
    assert all(line.count("--") == line.count(" --") for line in folded.splitlines())
    assert " ".join(folded.replace("\\\n", " ").splitlines()[1].split()) == command
    assert not re.search(r"--model_name \\", folded), "a flag and its value stay on one line"
