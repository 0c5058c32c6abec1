"""A job that trains all weights: what it leaves, how it goes on, and which commands take its model."""

import json
import os
import shutil
import sys

import pytest
import torch
from runs import files, run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tunix_torch import ModelConfig
from tunix_torch.checkpoints.files import has_final_files, is_whole
from tunix_torch.cli import ask, train
from tunix_torch.cli import evaluate as evaluate_command
from tunix_torch.cli.script import run_script
from tunix_torch.config.saved import WHOLE_CONFIG_FILE, config_file
from tunix_torch.run.export import export_merged
from tunix_torch.run.folder import check_output_dir, find_system_message, newest_run

pytestmark = pytest.mark.thorough  # whole runs, each of many steps

WHOLE = {"lora_rank": 0, "system_message": "Think."}


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """The folder of a finished job of four steps that trained all weights. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(model_folder, folder, **WHOLE)
    return folder


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.fixture
def call(monkeypatch, capfd):
    """Return a function that runs a command in this process, and returns its exit code and what it printed."""

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        monkeypatch.setenv("TUNIX_DEVICE", os.environ["TUNIX_DEVICE"])  # --device would set it for other tests too
        try:
            run_script(module.main)
        except SystemExit as end:
            return end.code, "".join(capfd.readouterr())
        return 0, "".join(capfd.readouterr())

    return call


def model_in(folder):
    return load_file(folder / "model.safetensors")


def same(some, others):
    return some.keys() == others.keys() and all(torch.equal(weight, others[name]) for name, weight in some.items())


def test_the_folder_holds_a_plain_model_beside_the_runs_own_files(finished, model_folder):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", WHOLE_CONFIG_FILE}
    assert not [name for name in names if "adapter" in name]
    assert has_final_files(finished) and is_whole(finished / "checkpoint-2")
    settings = json.loads(config_file(finished).read_text())
    assert (settings["lora_rank"], settings["model_name"]) == (0, model_folder)
    trained, start = AutoModelForCausalLM.from_pretrained(finished), AutoModelForCausalLM.from_pretrained(model_folder)
    for one, other in zip(trained.parameters(), start.parameters(), strict=True):
        assert not torch.equal(one, other)
    for folder in (finished, finished / "checkpoint-4"):
        assert find_system_message(str(folder)) == "Think."


def test_a_finished_run_takes_no_step_more(model_folder, out, caplog):
    before = files(out)
    for checkpoint_of_the_last_step in (True, False):
        if not checkpoint_of_the_last_step:
            shutil.rmtree(out / "checkpoint-4")
            before = files(out)
        again = run(model_folder, out, resume_from_checkpoint="latest", **WHOLE)
        assert files(out) == before, "something was written"
        assert "4. Nothing is trained" in caplog.text
        kept = {name: p.detach() for name, p in again.model.named_parameters()}
        assert same(kept, model_in(out))


def test_a_run_goes_on_where_it_was(model_folder, finished, tmp_path):
    run(model_folder, tmp_path, max_steps=2, **WHOLE)
    run(model_folder, tmp_path, resume_from_checkpoint="latest", **WHOLE)
    assert same(model_in(tmp_path), model_in(finished))
    # the run was killed between its last checkpoint and its end
    for name in ("model.safetensors", "config.json", "trainer_state.json"):
        (tmp_path / name).unlink()
    run(model_folder, tmp_path, resume_from_checkpoint="latest", **WHOLE)
    assert same(model_in(tmp_path), model_in(finished)) and has_final_files(tmp_path)
    assert not (tmp_path / "previous").exists()


def test_a_run_is_resumed_only_with_what_it_trains(model_folder, out, finished_run):
    with pytest.raises(ValueError, match="lora_rank=16: the run that would be resumed .* has 0"):
        run(model_folder, out, resume_from_checkpoint="latest", system_message="Think.", max_steps=6)
    with pytest.raises(ValueError, match="lora_rank=0: the run that would be resumed .* has 16"):
        run(model_folder, out, resume_from_checkpoint=str(finished_run / "checkpoint-2"), lora_rank=0)


def test_an_earlier_run_is_set_aside_whole(model_folder, out):
    before = model_in(out)
    run(model_folder, out, max_steps=1, **WHOLE)
    (previous,) = (out / "previous").iterdir()
    assert same(model_in(previous), before) and (previous / WHOLE_CONFIG_FILE).is_file()
    assert not same(model_in(out), before)
    run(model_folder, out, max_steps=1)  # with a LoRA; nothing of the whole model is left beside it
    names = {path.name for path in out.iterdir()}
    assert "adapter_model.safetensors" in names and not names & {"model.safetensors", WHOLE_CONFIG_FILE}
    assert "lora_rank" in json.loads((out / "config.json").read_text())


def test_the_model_that_is_trained_is_not_moved_away(model_folder, out):
    with pytest.raises(ValueError, match="output_dir=.*holds a model"):
        run(str(out), out, max_steps=1)
    with pytest.raises(ValueError, match="output_dir=.*holds a model"):
        check_output_dir(model_folder)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_model_is_trained_further(out, tmp_path, lora_rank):
    trainer = run(str(out), tmp_path / "more", lora_rank=lora_rank, max_steps=1)
    assert [row["kl"] for row in trainer.state.log_history if "kl" in row][0] == pytest.approx(0, abs=1e-9)


def test_commands_take_the_folder_and_its_checkpoints(out, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "mine").symlink_to(out)
    assert newest_run() == "outputs/mine"
    question = ["--question", "1 + 1?", "--max_new_tokens", "4", "--no_do_sample", "--show_prompt"]
    for chosen in ([], ["--model_path", out], ["--model_path", out / "checkpoint-2"]):
        code, text = call(ask, *question, *chosen)
        assert code == 0 and "user\nThink.\n\n1 + 1?" in text, text
    code, text = call(evaluate_command, "--max_samples", "4", "--max_new_tokens", "8", "--batch_size", "4")
    assert code == 0 and "Model: outputs/mine" in text and "of 4" in text, text


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_writes_the_model_in_another_type(out, tmp_path, dtype):
    for source in (out, out / "checkpoint-4"):
        target = tmp_path / f"exported-{source.name}"
        export_merged(source, target, dtype)
        weights, expected = model_in(target), model_in(source)
        assert all(torch.equal(weight, expected[name].to(weight.dtype)) for name, weight in weights.items())
        assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype or 'float32'}"}
        assert find_system_message(str(target)) == "Think."
        assert not list(target.glob("optimizer*"))


def test_settings_that_do_not_go_together_are_one_line(call, model_folder, tmp_path):
    flags = ["--use_grpo", "--model_name", model_folder, "--output_dir", tmp_path / "out", "--lora_rank"]
    for given, words in (
        ([-1], "lora_rank=-1: must be at least 1, or 0"),
        ([0, "--model_dtype", "bfloat16"], "model_dtype='bfloat16': with lora_rank=0 all weights are trained"),
        ([0, "--lora_dropout", "0.1"], "lora_dropout=0.1: lora_rank=0 means no LoRA"),
        ([0, "--save_batches", "1"], "save_batches=1: records are replayed with a LoRA"),
        ([0, "--reference", "base"], "reference='base': where all weights learn"),
    ):
        code, text = call(train, *flags, *given)
        assert code == 2 and f"error: {words}" in text and "Traceback" not in text, text
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_trained_whole(model_folder, finished_run, tmp_path):
    with pytest.raises(ValueError, match="lora_rank=0: the adapter that is trained further, .* has 16"):
        run(str(finished_run), tmp_path / "out", lora_rank=0)
    assert ModelConfig(lora_rank=0).trains_all and not ModelConfig().trains_all
