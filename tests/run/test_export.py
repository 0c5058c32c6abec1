"""A merged model is a plain Hugging Face model with the adapter's logits, and is written whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub
import pytest
import torch
from models import FAMILIES, add_nontrivial_lora, hugging_face_logits, make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from tunix_torch import load_model, load_tokenizer
from tunix_torch.cli.export import main
from tunix_torch.cli.script import run_script
from tunix_torch.model import tiny
from tunix_torch.model.loading import eos_token_ids
from tunix_torch.run import export
from tunix_torch.run.export import TOLERANCE, export_merged
from tunix_torch.run.folder import find_system_message

ROOT = Path(__file__).parent.parent.parent
IDS = torch.arange(40) * 7 % 97  # the row is longer than the window of attention


def save_run(folder, family="gemma3", base_dtype=torch.float32, tokenizer_in=("base", "run"), lora=None, **overrides):
    """Write `folder`/base and `folder`/run as TunixTrainer.save_model writes them, and return the adapter model."""
    tokenizer = tiny.make_tokenizer()
    base = make_model(family, **overrides).to(base_dtype)
    base.generation_config.update(eos_token_id=[1, 5], do_sample=True, top_k=64)  # Gemma has such settings
    base.save_pretrained(folder / "base")
    attention = {"attn_implementation": "eager"} if family == "gemma2" else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, **attention)
    model = add_nontrivial_lora(model, **(lora or {}))
    trained = {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(folder / "run", state_dict=trained)
    for name in tokenizer_in:
        tokenizer.save_pretrained(folder / name)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a folder with a base and a run; tests write into folders of their own."""
    folder = tmp_path_factory.mktemp("saved")
    save_run(folder)
    return folder


@pytest.fixture
def command(capsys):
    """Return a function that runs the command in this process and returns its exit code and stderr."""
    verbosity = transformers_logging.get_verbosity()

    def run(*args):
        try:
            run_script(lambda: main([str(arg) for arg in args]))
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()


def refused(result, *words):
    code, stderr = result
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    "family, overrides", [*((family, {}) for family in FAMILIES), ("gemma3", {"tie_word_embeddings": False})]
)
@torch.no_grad()
def test_merged_model_computes_the_adapters_logits(family, overrides, tmp_path):
    adapter = save_run(tmp_path, family, **overrides)
    assert export_merged(tmp_path / "run", tmp_path / "merged") <= TOLERANCE
    # Users load the model like this, without our settings.
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = hugging_face_logits(adapter, IDS)
    torch.testing.assert_close(hugging_face_logits(merged, IDS), expected, atol=3e-4, rtol=0)
    with adapter.disable_adapter():
        assert (hugging_face_logits(adapter, IDS) - expected).abs().max() > 0.1, "the adapter changes nothing"
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert tied == adapter.config.get_text_config().tie_word_embeddings
    assert torch.equal(merged.get_input_embeddings().weight, adapter.get_input_embeddings().weight)


def test_merged_folder_is_a_plain_model_that_inference_loads(saved, tmp_path):
    export_merged(saved / "run", tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert not [name for name in names if "adapter" in name]
    assert os.listdir(tmp_path) == ["merged"]
    assert (tmp_path / "merged").stat().st_mode == (saved / "base").stat().st_mode, "mkdtemp's 0700 would stay"
    text = "".join(path.read_text() for path in (tmp_path / "merged").glob("*.json"))
    assert "unfinished" not in text and str(saved) not in text
    model, tokenizer = load_model(str(tmp_path / "merged")), load_tokenizer(str(tmp_path / "merged"))
    assert model.name_or_path == str(tmp_path / "merged") and tokenizer.chat_template == tiny.CHAT_TEMPLATE
    assert eos_token_ids(model, tokenizer) == sorted({1, 5, tokenizer.eos_token_id})
    assert model.generation_config.top_k == 64


@pytest.mark.parametrize("message", ["", "Think first."])
def test_a_merged_model_is_asked_as_the_adapter_was(message, tmp_path):
    save_run(tmp_path)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"system_message": message}))
    export_merged(tmp_path / "run", tmp_path / "merged")
    assert find_system_message(str(tmp_path / "merged")) == message


@pytest.mark.parametrize("tokenizer_in", ["base", "run"])
def test_tokenizer_comes_from_the_adapters_folder_or_else_the_bases(tokenizer_in, tmp_path):
    save_run(tmp_path, tokenizer_in=[tokenizer_in])
    export_merged(tmp_path / "run", tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.get_vocab() == tiny.make_tokenizer().get_vocab()


@pytest.mark.parametrize(
    "stored, wanted, written",
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_merge_is_in_float32_and_rounds_once(stored, wanted, written, tmp_path):
    adapter = save_run(tmp_path, base_dtype=stored)
    difference = export_merged(tmp_path / "run", tmp_path / "merged", wanted)
    assert (difference <= TOLERANCE) == (written == torch.float32)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {written}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == written
    exact = adapter.merge_and_unload().state_dict()
    for name, tensor in weights.items():
        assert torch.equal(tensor, exact[name].to(written)), name


@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_check_leaves_nothing(call, saved, tmp_path, monkeypatch):
    planted = iter([0.0] * (call - 1) + [2 * TOLERANCE])
    monkeypatch.setattr(export, "_largest_difference", lambda *_: next(planted))
    with pytest.raises(AssertionError, match="logits"):
        export_merged(saved / "run", tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_nothing(saved, tmp_path, monkeypatch, command):
    def interrupt(*_):
        assert "model.safetensors" in os.listdir(next(tmp_path.iterdir())), "too early to show anything"
        raise KeyboardInterrupt

    differences = iter([lambda: 0.0, interrupt])
    monkeypatch.setattr(export, "_largest_difference", lambda *_: next(differences)())
    code, stderr = command(saved / "run", "--merged", tmp_path / "merged")
    assert code == 130 and "interrupted" in stderr and not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(saved, tmp_path, monkeypatch, command):
    def save(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", save)
    refused(command(saved / "run", "--merged", tmp_path / "merged"), "merged=", "No space left")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_and_a_full_one_is_not(saved, tmp_path, command):
    (tmp_path / "merged").mkdir()
    assert command(saved / "run", "--merged", tmp_path / "merged")[0] == 0
    before = (tmp_path / "merged" / "model.safetensors").stat()
    refused(command(saved / "run", "--merged", tmp_path / "merged"), "merged=", "not empty")
    assert (tmp_path / "merged" / "model.safetensors").stat() == before


@pytest.mark.parametrize(
    "flags, words",
    [
        (["{saved}/run"], ["--merged"]),
        (["{saved}/nowhere", "--merged", "{new}/merged"], ["output_dir=", "nowhere", "no such folder"]),
        (["{saved}/base", "--merged", "{new}/merged"], ["output_dir=", "a whole model already"]),
        (["{new}", "--merged", "{new}/merged"], ["output_dir=", "adapter_config.json"]),
        (["{saved}/run", "--merged", "{saved}/run"], ["merged=", "the adapter's own folder"]),
        (["{saved}/run", "--merged", "{saved}/run/merged"], ["merged=", "the adapter's own folder"]),
        (["{saved}/run", "--merged", "{saved}"], ["merged=", "not empty"]),
        (["{saved}/run", "--merged", "{saved}/run/adapter_config.json/x"], ["merged=", "the adapter's own folder"]),
        (["{saved}/run", "--merged", "{saved}/base/config.json"], ["merged=", "is a file"]),
        (["{saved}/run", "--merged", "{saved}/base/config.json/x"], ["merged=", "can't be written"]),
        (["{saved}/run", "--merged", "{new}/merged", "--dtype", "int8"], ["dtype", "int8", "bfloat16"]),
        (["{saved}/run", "--merged", "{new}/merged", "--push_to_hub", "a/b/c"], ["push_to_hub='a/b/c'", "NAME/MODEL"]),
    ],
)
def test_wrong_input_is_refused_with_one_line(flags, words, saved, tmp_path, command):
    before = sorted(saved.rglob("*"))
    refused(command(*(flag.format(saved=saved, new=tmp_path) for flag in flags)), *words)
    assert not list(tmp_path.iterdir()) and sorted(saved.rglob("*")) == before, "nothing may be written"


def test_library_refuses_an_unknown_dtype(saved, tmp_path):
    with pytest.raises(ValueError, match="dtype='float16'.*float32, bfloat16"):
        export_merged(saved / "run", tmp_path / "merged", "float16")


def break_adapter(folder, **settings):
    path = folder / "run" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"base_model_name_or_path": "./gone"}, ["'./gone'", "no such folder", "base_model_name_or_path"]),
        ({"base_model_name_or_path": None}, ["names no base model"]),
        ({"base_model_name_or_path": "nobody/no-such-model"}, ["nobody/no-such-model", "local folder"]),
        ({"peft_type": "IA3"}, ["IA3", "expected a LoRA"]),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(settings, words, tmp_path, command, monkeypatch):
    save_run(tmp_path)
    break_adapter(tmp_path, **settings)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(command(tmp_path / "run", "--merged", tmp_path / "merged"), *words)
    assert sorted(os.listdir(tmp_path)) == ["base", "run"]


def test_a_run_that_has_not_ended_names_its_checkpoint(tmp_path, command):
    save_run(tmp_path)
    checkpoint = tmp_path / "unended" / "checkpoint-3"
    checkpoint.parent.mkdir()
    (tmp_path / "run").rename(checkpoint)
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3, "stateful_callbacks": {}}')
    refused(command(tmp_path / "unended", "--merged", tmp_path / "merged"), "has not ended", "checkpoint-3")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").write_text('{"learning_rate": 0.1}')
    refused(command(tmp_path / "new", "--merged", tmp_path / "merged"), "output_dir=", "has no checkpoint yet")
    assert command(checkpoint, "--merged", tmp_path / "merged")[0] == 0


def test_broken_adapter_files_are_refused(tmp_path, command):
    save_run(tmp_path)
    weights = tmp_path / "run" / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({name: tensor * float("nan") for name, tensor in whole.items()}, weights)
    refused(command(tmp_path / "run", "--merged", tmp_path / "merged"), "NaN")
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(command(tmp_path / "run", "--merged", tmp_path / "merged"), "output_dir=", "could not be loaded")
    weights.unlink()
    refused(command(tmp_path / "run", "--merged", tmp_path / "merged"), "no weights")
    (tmp_path / "run" / "adapter_config.json").write_text("{")
    refused(command(tmp_path / "run", "--merged", tmp_path / "merged"), "adapter_config.json", "can't be read")
    assert sorted(os.listdir(tmp_path)) == ["base", "run"]


def test_an_adapter_on_tied_embeddings_is_refused(tmp_path, command):
    """Merging would also change the head, which the adapter on embeddings leaves alone."""
    save_run(tmp_path, lora={"modules_to_save": ["embed_tokens"]})
    refused(command(tmp_path / "run", "--merged", tmp_path / "merged"), "embeddings", "projections only")


# ---- the hub ----


def push(saved, folder, endpoint):
    inherited = {k: v for k, v in os.environ.items() if k not in ("USE_TORCH_XLA", "TORCH_DEVICE_BACKEND_AUTOLOAD")}
    hub_settings = {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": hub.TOKEN,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_OFFLINE": "0",
    }
    hub_settings["HF_HUB_DISABLE_XET"] = "1"
    flags = [saved / "run", "--merged", folder / "merged", "--push_to_hub", "me/model"]
    return subprocess.run(
        [sys.executable, "-m", "tunix_torch.export", *map(str, flags)],
        env={**inherited, "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT), **hub_settings},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.thorough
def test_push_to_hub_uploads_what_was_written(tmp_path):
    save_run(tmp_path, "gemma2")
    with hub.running() as server:
        result = push(tmp_path, tmp_path, server.url)
    assert result.returncode == 0, result.stderr
    assert "Uploaded to me/model" in result.stdout and "float32" in result.stdout
    for path in (tmp_path / "merged").iterdir():
        assert server.files["me/model"][path.name] == path.read_bytes(), path.name


@pytest.mark.thorough
def test_an_unreachable_hub_is_one_line_after_the_folder_is_written(saved, tmp_path):
    result = push(saved, tmp_path, "http://127.0.0.1:9")
    refused((result.returncode, result.stderr), "push_to_hub='me/model'", "Connection refused", "is whole and stays")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_push_without_a_token_is_one_line_after_the_folder_is_written(saved, tmp_path, command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = command(saved / "run", "--merged", tmp_path / "merged", "--push_to_hub", "me/model")
    refused(result, "no token", "hf auth login", "is whole and stays")
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
