"""Config files hold every setting, only files of runs are set aside, and curves and the device report are made."""

import json
import os

import pytest

import utils
from tunix_torch import DataConfig, GRPOConfig, ModelConfig


def test_config_round_trip_in_json_and_yaml(tmp_path):
    settings = utils.settings_of(ModelConfig(), DataConfig(), GRPOConfig(output_dir=str(tmp_path), beta=0.5))
    utils.save_config(settings, tmp_path / "a.json")
    (tmp_path / "a.yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in settings.items()))
    assert utils.load_config(tmp_path / "a.json") == utils.load_config(tmp_path / "a.yaml") == settings
    assert settings["kl_penalty_coef"] == 0.5 and settings["device"] == "auto"


def test_device_is_read_from_flags_before_the_config_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNIX_DEVICE", "unset")
    utils.save_config({"device": "xla"}, tmp_path / "a.json")
    utils.choose_device(["--config", str(tmp_path / "a.json")])
    assert os.environ["TUNIX_DEVICE"] == "xla"
    utils.choose_device([f"--config={tmp_path / 'a.json'}", "--device=cpu"])
    assert os.environ["TUNIX_DEVICE"] == "cpu"


def test_newest_run_is_the_one_written_last(tmp_path):
    assert utils.newest_run(tmp_path) is None
    for age, name in ((20, "new"), (10, "old"), (99, "checkpoint-7")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
        os.utime(tmp_path / name / "adapter_config.json", (age, age))
    assert utils.newest_run(tmp_path) == str(tmp_path / "new")


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    assert utils.resolve_checkpoint(None, tmp_path) is None
    for wanted in ("latest", "true", str(tmp_path / "checkpoint-1")):
        with pytest.raises(ValueError, match="resume_from_checkpoint"):
            utils.resolve_checkpoint(wanted, tmp_path)


def test_curves_are_drawn_from_whatever_was_logged(tmp_path):
    rows = [{"step": 0, "eval_accuracy": 0.5}, {"step": 1, "loss": 1.0, "reward": 0.2}, {"step": 2, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert utils.load_metrics(tmp_path) == rows
    assert utils.plot_training_curves(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_device_report():
    report = utils.verify_tpu_setup()
    assert report["kind"] == "cpu" and not report["tpu"] and "CPU" in report["description"]
    assert "GiB" in utils.memory_summary()


def test_only_what_a_run_wrote_is_set_aside(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    utils.set_aside_previous_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    utils.set_aside_previous_run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "previous"}
    (previous,) = (tmp_path / "previous").iterdir()
    assert {path.name for path in previous.iterdir()} == {"checkpoint-3", "metrics.jsonl"}


def test_a_folder_that_cannot_hold_a_run_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="output_dir=.*is a file"):
            utils.check_output_dir(folder)
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match="output_dir=.*holds a model"):
        utils.check_output_dir(tmp_path)
    utils.check_output_dir(tmp_path / "new" / "one")
    assert not (tmp_path / "new").exists()


def test_a_bare_no_in_yaml_is_the_word(tmp_path):
    (tmp_path / "a.yaml").write_text("eval_strategy: no\nuse_grpo: no\n")
    assert utils.load_config(tmp_path / "a.yaml") == {"eval_strategy": "no", "use_grpo": False}


def test_a_config_file_holds_every_setting_that_is_not_the_default():
    assert utils.settings_of(GRPOConfig(adam_beta2=0.5))["adam_beta2"] == 0.5
    assert "adam_beta2" not in utils.settings_of(GRPOConfig())
