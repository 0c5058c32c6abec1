"""Every default stands once: recipes hold differences from the dataclasses, and files of defaults come from both."""

from pathlib import Path

import pytest

from tunix_torch import GRPOConfig, ModelConfig
from tunix_torch.compat import generate
from tunix_torch.config import recipes
from tunix_torch.config.files import load_config

ROOT = Path(__file__).parent.parent.parent
GENERATED = [ROOT / "config_example.json", ROOT / generate.FROM_TRL, ROOT / generate.ALL_SETTINGS]


def test_the_files_of_defaults_are_what_the_generator_writes(tmp_path):
    generate.main(tmp_path)
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    files = [path for path in (ROOT / "conf").rglob("*.yaml") if path.parent.name != "experiment"]
    committed = {str(path.relative_to(ROOT)): path.read_text() for path in [*files, *GENERATED]}
    hint = "run python -m tunix_torch.compat.generate, or make config"
    assert written.keys() == committed.keys(), hint
    assert not [name for name in written if written[name] != committed[name]], hint


@pytest.mark.parametrize("name", ["JOB", "TINY", "AGENT_TUNIX"])
def test_a_recipe_has_nothing_but_differences_from_the_defaults(name):
    assert not {key for key, value in getattr(recipes, name).items() if getattr(GRPOConfig, key) == value}


def test_agent_tunix_agrees_in_what_it_has_no_difference():
    assert not set(recipes.AGENT_TUNIX_AGREES) & set(recipes.AGENT_TUNIX)
    assert all(hasattr(GRPOConfig, name) for name in recipes.AGENT_TUNIX_AGREES)
    assert all(hasattr(ModelConfig, name) for name in recipes.AGENT_TUNIX_MODEL)


# ---- files of settings ----


def test_a_number_with_an_exponent_is_a_number_in_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "learning_rate: 1e-5\nlora_alpha: 2E+1\nmodel_name: 1e-5b\nseed: 7\nnames: [1e3]\n"
    )
    expected = {"learning_rate": 1e-5, "lora_alpha": 20.0, "model_name": "1e-5b", "seed": 7, "names": [1000.0]}
    assert load_config(tmp_path / "a.yaml") == expected


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "seed: 1\nepsilon: [1\n", "a.yaml, line 3: not valid YAML: expected"),
        ("a.yaml", "seed: 1\nseed: 2\n", "a.yaml, line 2: not valid YAML: found duplicate key seed"),
        ("a.yaml", "- 1\n- 2\n", "a.yaml: expected names and values"),
        ("a.yml", "7\n", "a.yml: expected names and values"),
        ("a.json", '{"seed": 1,\n}', "a.json, line 2: not valid JSON"),
        ("a.json", "[1]", "a.json: expected names and values"),
        ("a.json", '{"seed": 1, "seed": 2}', "a.json: not valid JSON: the name 'seed' is there twice"),
        ("a.yaml", "1: 2\n", "a.yaml: expected names and values"),
        ("a.yaml", "seed: \x00\n", "a.yaml: not valid YAML: "),
        ("b.json", None, "b.json': no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as refused:
        load_config(tmp_path / name)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_empty_yaml_file_sets_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "a.yaml") == {}
