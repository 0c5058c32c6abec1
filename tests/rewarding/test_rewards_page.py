"""The examples of docs/rewards.md run as they stand there, with a reward model and a server of this test's own."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from models import save_reward_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "rewards.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def reward_model(tmp_path):
    save_reward_model(tmp_path / "my-reward-model")


@pytest.fixture
def server():
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "Fine. <score>6</score>"}}]}')

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", requests
    http.shutdown()
    http.server_close()


def test_the_page_has_the_examples_that_are_run_here():
    assert [text.count("TunixTrainer(") for text in EXAMPLES] == [1, 1, 1]


def log_of(run):
    (path,) = Path("outputs", run).rglob("trainer_state.json")
    return [row for row in json.loads(path.read_text())["log_history"] if "reward" in row]


@pytest.fixture
def example(tmp_path, monkeypatch, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNIX_CACHE", cache)

    def run(number, **names):
        text = EXAMPLES[number].replace("max_steps=2", "max_steps=2, save_steps=2, report_to='none'")
        for name, value in names.items():
            assert name in text
            text = text.replace(name, value)
        exec(compile(text, f"{PAGE.name}, example {number + 1}", "exec"), {"__name__": "example"})

    return run


def test_the_example_of_a_function_runs(example):
    example(0)
    assert [row["reward"] for row in log_of("brief")] == [row["share_of_right"] for row in log_of("brief")]


def test_the_example_of_a_reward_model_runs(example, reward_model):
    example(1)
    assert all("rewards/my-reward-model/mean" in row for row in log_of("preferred"))


def test_the_example_of_a_judge_runs(example, server):
    url, requests = server
    example(2, **{"http://localhost:8000/v1": url})
    assert [row["rewards/llm_judge/mean"] for row in log_of("judged")] == [6.0, 6.0]
    assert requests and '"answer": ' in requests[0]["messages"][1]["content"]
    assert len(list(Path("outputs/judge").rglob("*.json"))) == len(requests)
