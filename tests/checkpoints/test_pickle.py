"""No file that is read can run code: a planted pickle is refused in one line that names it, or passed over."""

import ast
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from runs import run
from trainers import make_trainer

from tunix_torch.checkpoints.files import why_not_whole
from tunix_torch.checkpoints.manifest import BOTH, write_manifest
from tunix_torch.checkpoints.waiting import load_waiting
from tunix_torch.config.files import load_config
from tunix_torch.data.readers import load_rows
from tunix_torch.model.adapter import load_reference
from tunix_torch.model.loading import load_model, load_tokenizer
from tunix_torch.rewarding.models import make_reward_model
from tunix_torch.run.export import export_merged
from tunix_torch.run.folder import resolve_checkpoint


class Planted:
    """What makes a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path):
    """A folder that is there after planted code has run. That it works is seen before, and that none ran after."""
    place = tmp_path / "mark"
    pickle.loads(pickle.dumps(Planted(place)))
    assert place.is_dir()
    place.rmdir()
    yield place
    assert not place.exists(), "planted code has run"


def plant(path, mark, by_torch=True):
    """Replace a file by a pickle that runs code, as `torch.save` writes one or as Python does."""
    path.unlink(missing_ok=True)
    if by_torch:
        torch.save({"state": Planted(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"state": Planted(mark)}))


READ = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "waiting_batches_0.pt", "scaler.pt", "reference.safetensors")
READ += ("adapter_model.safetensors",)


@pytest.fixture
def early(finished_run, tmp_path):
    """A run's folder as an early version left it: no manifest says what the files held."""
    folder = shutil.copytree(finished_run, tmp_path / "run")
    for place in (folder, folder / "checkpoint-2", folder / "checkpoint-4"):
        for name in BOTH:
            (place / name).unlink()
    return folder


@pytest.mark.parametrize("by_torch", [True, False])
@pytest.mark.parametrize(
    "manifest", ["none", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("true", "forged"))]
)
def test_a_checkpoint_with_a_planted_pickle_is_refused_by_its_name_and_passed_over(early, mark, by_torch, manifest):
    newest = early / "checkpoint-4"
    kept = shutil.copytree(newest, early / "kept")
    for name in READ:
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
        if manifest == "true":
            write_manifest(newest)
        plant(newest / name, mark, by_torch)
        if manifest == "forged":
            write_manifest(newest)
        assert name in why_not_whole(newest), name
        with pytest.raises(ValueError, match=f"not a whole checkpoint folder: {name}") as caught:
            resolve_checkpoint(str(newest), early)
        assert "\n" not in str(caught.value)
        assert resolve_checkpoint("auto", early) == str(early / "checkpoint-2")


@pytest.mark.thorough
def test_a_planted_file_that_no_run_reads_does_not_run(model_folder, early, mark):
    """The arguments of Transformers' trainer are a pickle that it writes, and that nothing here reads."""
    plant(early / "checkpoint-4" / "training_args.bin", mark)
    plant(early / "training_args.bin", mark)
    shutil.rmtree(early / "checkpoint-2")
    os.remove(early / "adapter_model.safetensors")
    assert run(model_folder, early, resume_from_checkpoint="latest").state.global_step == 4


def test_who_uses_the_library_is_refused_too(model_folder, early, tmp_path, mark):
    """`transformers.Trainer` does not look for a manifest, nor does it know which checkpoint is whole."""
    plant(early / "checkpoint-4" / "optimizer.pt", mark)
    trainer = make_trainer(model_folder, tmp_path / "out")
    for where in (str(early / "checkpoint-4"), str(early / "checkpoint-9")):
        with pytest.raises(ValueError, match=f"resume_from_checkpoint='{where}'") as caught:
            trainer.train(resume_from_checkpoint=where)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("by_torch", [True, False])
def test_the_functions_that_read_refuse_by_themselves(tmp_path, mark, by_torch):
    plant(tmp_path / "waiting_batches_0.pt", mark, by_torch)
    plant(tmp_path / "reference.safetensors", mark, by_torch)
    for read in (load_waiting, load_reference):
        with pytest.raises(ValueError, match=r"(waiting_batches_0.pt|reference.safetensors) ") as caught:
            read(tmp_path, torch.device("cpu"))
        assert "\n" not in str(caught.value)


def refused(read, *words):
    with pytest.raises(ValueError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and any(word in message for word in words), message


@pytest.mark.parametrize("by_torch", [True, False])
def test_models_and_adapters_in_pickles_are_refused(model_folder, finished_run, tmp_path, mark, by_torch):
    model = shutil.copytree(model_folder, tmp_path / "model")
    os.remove(model / "model.safetensors")
    plant(model / "pytorch_model.bin", mark, by_torch)
    refused(lambda: load_model(str(model)), str(model))
    refused(lambda: make_reward_model(str(model), None, f"reward_funcs={str(model)!r}"), str(model))
    adapter = shutil.copytree(finished_run / "checkpoint-4", tmp_path / "adapter")
    os.remove(adapter / "adapter_model.safetensors")
    plant(adapter / "adapter_model.bin", mark, by_torch)
    refused(lambda: load_model(str(adapter)), str(adapter))
    refused(lambda: export_merged(str(adapter), str(tmp_path / "merged")), str(adapter))
    plant(adapter / "adapter_model.safetensors", mark, by_torch)
    refused(lambda: load_model(str(adapter)), str(adapter))


def test_code_beside_a_model_or_its_tokenizer_is_not_run(model_folder, tmp_path, mark, monkeypatch):
    """Regression: Transformers asked on the terminal whether to run it, and ran it when the answer was yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    names = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoModelForSequenceClassification": "own.M"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names, "model_type": "own"}))
    refused(lambda: load_model(str(folder)), str(folder))
    refused(lambda: make_reward_model(str(folder), None, f"reward_funcs={str(folder)!r}"), str(folder))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", "own.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(lambda: load_tokenizer(str(folder)), str(folder))


@pytest.mark.parametrize("name", ["rows.pt", "rows.pkl", "rows.pickle", "rows.npy", "rows.jsonl", "rows.parquet"])
def test_rows_in_a_pickle_are_refused(tmp_path, mark, name):
    plant(tmp_path / name, mark, by_torch=name == "rows.pt")
    refused(lambda: load_rows(str(tmp_path / name)), name)


@pytest.mark.parametrize("ending", ["py", "pkl", "pt"])
def test_a_folder_of_data_runs_nothing(tmp_path, mark, ending):
    folder = tmp_path / "rows"
    folder.mkdir()
    if ending == "py":  # as data sets of the hub once came
        (folder / "rows.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    else:
        plant(folder / f"train.{ending}", mark, by_torch=ending == "pt")
    refused(lambda: load_rows(str(folder)), str(folder))


@pytest.mark.parametrize("tag", [f"!!python/{kind}:os.mkdir" for kind in ("object/apply", "object/new", "name")])
def test_tags_of_yaml_run_nothing(tmp_path, mark, tag):
    (tmp_path / "settings.yaml").write_text(f"seed: {tag} [{mark}]\n")
    refused(lambda: load_config(tmp_path / "settings.yaml"), "settings.yaml")


def test_nothing_here_unpickles_or_trusts_code_of_a_hub():
    """`torch.load` has `weights_only=True`, pickles are read by no other way, and no code of a hub is run."""
    for path in Path(__file__).parent.parent.parent.glob("tunix_torch/**/*.py"):
        code = path.read_text()
        loads = code.count("torch.load(")
        assert code.count("weights_only=True") == loads, path
        for call in ast.walk(ast.parse(code)):  # the text of a model card has such calls too, for its reader
            if isinstance(call, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(call.func)):
                assert "trust_remote_code=False" in map(ast.unparse, call.keywords), (path, ast.unparse(call))
        for word in ("pickle.load", "allow_pickle=True", "joblib", "read_pickle", "trust_remote_code=True"):
            assert word not in code, (path, word)
