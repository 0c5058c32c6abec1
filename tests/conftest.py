"""What must be settled before anything heavy is imported: the tests run on the CPU unless told otherwise."""

import gc
import logging
import os
import subprocess
import sys

import pytest

os.environ.setdefault("TUNIX_DEVICE", "cpu")
os.environ.setdefault("TORCH_TPU_ALLOW_LEGACY_DEVICE_APIS", "1")  # test files import torch before the library
# The models here are too small for several threads, which slow each other down where other work shares the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a plain call leaves out, in this order: marker, what it marks, and the command that runs it.
LEFT_OUT = (
    ("slow", "that take minutes each", "make test-slow, make test-plans"),
    ("thorough", "that are not needed after every change", "make test-all"),
    ("xla", "through XLA", "TUNIX_DEVICE=xla .venv/bin/python -m pytest -m 'xla and not slow'"),
)
NUM_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def pytest_configure(config):
    config.stash[NUM_LEFT_OUT] = {}


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports make many objects and no garbage; looking for it again and again would take a quarter of collecting."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True)
def root_logger_stays_as_it_was():
    """Hydra lets it say more, and what others then say would reach the tests that count what the library said."""
    root = logging.getLogger()
    of_pytest = [handler for handler in root.handlers if type(handler).__module__.startswith("_pytest.")]
    yield
    root.setLevel(logging.WARNING)
    root.handlers[:] = of_pytest


def pytest_deselected(items):
    """Counts what the markers leave out. In a process of XLA only tests of XLA count: the others are another call's."""
    for item in items:
        if os.environ["TUNIX_DEVICE"] == "xla" and item.get_closest_marker("xla") is None:
            continue
        marker = next((marker for marker, *_ in LEFT_OUT if item.get_closest_marker(marker)), None)
        if marker is not None:
            counts = item.config.stash[NUM_LEFT_OUT]
            counts[marker] = counts.get(marker, 0) + 1


def pytest_sessionfinish(session):
    """Under pytest-xdist only the workers collect; what they leave out is reported by the first process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[NUM_LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every worker has collected the same tests."""
    node.config.stash[NUM_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config):
    if config.option.keyword:
        return  # what was asked for by name has left the rest out
    for marker, words, command in LEFT_OUT:
        count = config.stash[NUM_LEFT_OUT].get(marker, 0)
        if count:
            terminalreporter.write_line(f"Left out: {count} tests {words}; run them by: {command}")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The tiny model without its warm start, as a Hugging Face folder."""
    from tunix_torch.model import tiny

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tiny.make_tokenizer()
    tiny.make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def finished_run(model_folder, tmp_path_factory):
    """The folder of a whole job with the settings `runs.SMALL`. Tests that change it copy it first."""
    from runs import run

    folder = tmp_path_factory.mktemp("finished") / "out"
    run(model_folder, folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory, model_folder):
    """A cache folder in which the tiny model lies already, without its warm start, so that no test waits for that."""
    from tunix_torch.model import tiny

    folder = tmp_path_factory.mktemp("cache")
    os.symlink(model_folder, folder / tiny.folder_name())
    return str(folder)


@pytest.fixture
def call(monkeypatch, capfd, cache):
    """`call(script, *arguments)` does what `commands.run` does, but in this process."""
    from tunix_torch.cli.script import run_script

    def call(module, *args, **environment):
        # The flag --device sets TUNIX_DEVICE for the rest of the process, so monkeypatch restores it after the test.
        for name, value in {"TUNIX_CACHE": cache, "TUNIX_DEVICE": os.environ["TUNIX_DEVICE"], **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        code = 0
        try:
            run_script(module.main)
        except SystemExit as exit:
            code = exit.code
        return subprocess.CompletedProcess(sys.argv, code, *capfd.readouterr())

    return call
