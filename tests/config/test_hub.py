"""What must come from the hub is asked for once: where nobody answers, that is said at once, and not tried again."""

import http.server
import threading
import time

import pytest
from huggingface_hub import constants

from tunix_torch.config import hub
from tunix_torch.data.readers import load_rows
from tunix_torch.model.loading import load_base_model, load_tokenizer
from tunix_torch.rewarding.models import make_reward_model

NOBODY = "http://127.0.0.1:9"  # the port of "discard", at which nothing listens


@pytest.fixture
def asked():
    """A hub on this machine that has nothing; the paths that it was asked for."""
    paths = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            paths.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "load, field",
    [
        (load_tokenizer, "model_name='nobody/no-model'"),
        (load_base_model, "model_name='nobody/no-model'"),
        (lambda name: make_reward_model(name, None, f"reward_funcs={name!r}"), "reward_funcs='nobody/no-model'"),
        (load_rows, "data_path='nobody/no-model'"),
    ],
)
def test_where_nobody_answers_it_is_said_at_once_in_one_line(load, field, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    before = time.monotonic()
    with pytest.raises(ValueError, match="does not answer") as caught:
        load("nobody/no-model")
    assert str(caught.value).startswith(field) and NOBODY in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - before < 10, "the hub's library tries again for 23 seconds"


def test_a_hub_that_answers_is_asked_once_and_not_for_what_is_here(asked, model_folder, tmp_path, monkeypatch):
    place, paths = asked
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    hub.require_hub_for_model(str(model_folder))
    (tmp_path / "nobody___here").mkdir()
    hub.require_hub_for_data("nobody/here", tmp_path)
    hub.require_hub_for_data(str(tmp_path), tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", place)
    hub.require_hub_for_model("nobody/no-model")
    hub.require_hub_for_data("nobody/no-data", tmp_path)
    assert paths == ["/"]


def test_a_model_in_the_cache_needs_no_hub(tmp_path, monkeypatch):
    folder = tmp_path / "models--some--model"
    (folder / "snapshots" / "a").mkdir(parents=True)
    (folder / "snapshots" / "a" / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    hub.require_hub_for_model("some/model")
    with pytest.raises(OSError, match="does not answer"):
        hub.require_hub_for_model("some/other")
