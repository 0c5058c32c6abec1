"""`push_to_hub` uploads what a run has trained and no more, after everything is on the disk, whatever the hub does."""

import shutil

import hub
import pytest
import transformers
from huggingface_hub import ModelCard, constants
from runs import left_by, run
from trainers import make_trainer

REPO = "me/out"
FINAL = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "config.json"),
    *(
        "metrics.jsonl",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "training_curves.png",
        "report.html",
    ),
}


@pytest.fixture
def server(monkeypatch):
    """A hub on this machine that this process takes for the real one."""
    with hub.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
        yield server
        transformers.utils.hub._hf_api = None


@pytest.fixture
def complete_run(finished_run, tmp_path):
    """A copy of a finished run, which a resumed job leaves as it is but for the upload."""
    return shutil.copytree(finished_run, tmp_path / "out")


def push_again(model_folder, folder):
    return run(model_folder, folder, push_to_hub=True, resume_from_checkpoint="auto")


def test_a_run_uploads_its_model_card_and_curves_and_no_secret(server, model_folder, tmp_path):
    folder = tmp_path / "out"
    (folder / "previous" / "1").mkdir(parents=True)
    (folder / "previous" / "1" / "report.html").write_text("of an earlier run")
    (folder / "mine.pt").write_text("of somebody else")
    token = {"hub_token": hub.TOKEN, "report_to": "tensorboard", "hub_strategy": "checkpoint"}
    run(model_folder, folder, push_to_hub=True, **token)
    files = server.files[REPO]
    shown = {name for name in files if not name.startswith(("runs/", "last-checkpoint/"))}
    assert shown == FINAL
    for name in FINAL:
        assert files[name] == (folder / name).read_bytes(), f"{name} is not that of the end of the run"
    assert any(name.startswith("runs/") for name in files), "TensorBoard's"
    assert "last-checkpoint/optimizer.pt" in files, "hub_strategy=checkpoint asks for it"
    assert server.commits[-1] == "End of training" and "Training in progress, step 2" in server.commits
    assert ModelCard(files["README.md"].decode()).data.model_name == REPO
    for name, content in [*files.items(), *((p.name, p.read_bytes()) for p in folder.rglob("*") if p.is_file())]:
        assert hub.TOKEN.encode() not in content, f"{name} holds the token"
    assert not (folder / "uploading").exists()


@pytest.mark.parametrize("failing", [("/commit/", 500), ("/preupload/", 401), ("/lfs/", 403)])
def test_a_hub_that_fails_at_the_end_loses_nothing(server, failing, complete_run, model_folder):
    before = left_by(complete_run)
    server.failing = failing
    with pytest.raises(
        OSError, match=rf"push_to_hub=True: the upload to {REPO} failed: .*{failing[1]}.*hf upload"
    ) as failed:
        push_again(model_folder, complete_run)
    assert "\n" not in str(failed.value) and hub.TOKEN not in str(failed.value)
    assert left_by(complete_run) == before and server.files[REPO] == {}
    server.failing = None
    push_again(model_folder, complete_run)  # the same command tries again
    assert FINAL - {"training_curves.png", "report.html"} <= server.files[REPO].keys()


@pytest.mark.parametrize("failing", [("/repos/create", 401), None])
def test_a_hub_that_fails_at_the_start_is_one_line_before_anything_is_trained(server, failing, model_folder, tmp_path):
    server.failing = failing
    if failing is None:
        server.shutdown()
        server.server_close()  # the connection is refused
    with pytest.raises(ValueError, match="push_to_hub=True: .*(401|[Cc]onnect).*log in") as failed:
        run(model_folder, tmp_path / "out", push_to_hub=True)
    assert "\n" not in str(failed.value) and not (tmp_path / "out").exists()


def test_an_upload_that_fails_during_training_is_a_warning(server, model_folder, tmp_path, caplog):
    server.failing = ("/commit/", 500)
    with pytest.raises(OSError, match="nothing is lost"):
        run(model_folder, tmp_path / "out", push_to_hub=True, max_steps=2, eval_strategy="no", eval_steps=None)
    (warning,) = [message for message in caplog.messages if message.startswith("push_to_hub:")]
    assert "the upload of step 2 failed" in warning and "training goes on" in warning and "\n" not in warning
    assert (tmp_path / "out" / "manifest.json").is_file() and (tmp_path / "out" / "README.md").is_file()


def test_a_trainer_saves_and_uploads_by_itself(server, model_folder, tmp_path):
    """As with `transformers.Trainer`: `save_model` uploads where `push_to_hub` is set, `push_to_hub()` always does."""
    trainer = make_trainer(model_folder, tmp_path / "out", max_steps=1)
    trainer.train()
    trainer.push_to_hub(commit_message="mine", language="en")
    (files,) = server.files.values()
    assert server.commits == ["mine"] and "adapter_model.safetensors" in files
    assert ModelCard(files["README.md"].decode()).data.language == "en"
    assert not any("reference" in name for name in files)
    assert "run.json" in files and b"token" not in files["run.json"], "it says how the model is asked"
