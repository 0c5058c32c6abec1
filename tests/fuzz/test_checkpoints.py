"""A checkpoint is resumed only when it is bit for bit what was written; any other is passed over, or refused."""

import json
import os
import shutil

import pytest
from fuzzing import check_refusal, fuzz, mutate, text, value

from tunix_torch import DataConfig, GRPOConfig, ModelConfig
from tunix_torch.checkpoints.files import (
    checkpoints_of,
    digest_of_files,
    final_files,
    has_final_files,
    is_finished,
    newest_checkpoint,
    why_not_whole,
)
from tunix_torch.checkpoints.manifest import BOTH, write_manifest
from tunix_torch.config.saved import check_same_run, settings_of
from tunix_torch.model.loading import base_model_name
from tunix_torch.run.folder import (
    check_output_dir,
    find_prompt_settings,
    find_system_message,
    newest_run,
    resolve_checkpoint,
)

pytestmark = pytest.mark.thorough

NUM_STEPS = 4
FOLDERS = ("checkpoint-4", "checkpoint-4", "checkpoint-4", "checkpoint-2", ".")
NAMES = ("checkpoint-\u00b2", "checkpoint-\u0663", "checkpoint-", "checkpoint--1", "checkpoint-007", "checkpoint-4 ")
NAMES += ("checkpoint-" + "9" * 200, "checkpoint-99", "Checkpoint-9", "checkpoint-9.tmp")
ADDED = ("scaler.pt", "waiting_batches_0.pt", "reference.safetensors", "adapter_model.bin", "rng_state_1.pth", "x.json")


def linked(source, target):
    """A copy of a folder whose files are the same on the disk; one that is changed is replaced first."""
    return shutil.copytree(source, target, copy_function=os.link, symlinks=True)


def replace(path, content):
    """Give a file another content, without changing the file that it is linked with."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.write_bytes(content)


def other_json(rng, content):
    """JSON of another type or shape at one place or as a whole."""
    made = json.loads(content)
    for _ in range(rng.randrange(1, 3)):
        at = made
        while isinstance(at, dict | list) and at and rng.random() < 0.7:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], dict | list) or rng.random() < 0.4:
                at[key] = value(rng)
                break
            at = at[key]
        if isinstance(at, dict) and rng.random() < 0.3:
            at[text(rng, longest=4)] = value(rng)
    return json.dumps(value(rng) if rng.random() < 0.1 else made).encode("utf-8", "surrogatepass")


def change_one(rng, run):
    """Change one file, or one name, of a run's folder."""
    folder = run / rng.choice(FOLDERS)
    files = sorted(path for path in folder.iterdir() if path.is_file() or path.is_symlink()) if folder.is_dir() else []
    kind = rng.randrange(12)
    if not files:
        return
    path = rng.choice(files)
    content = path.read_bytes() if path.is_file() else b""
    if kind < 4:
        replace(path, mutate(rng, content))
    elif kind == 4:
        path.unlink()
    elif kind == 5:
        path.unlink()
        path.mkdir()
    elif kind == 6:
        path.unlink()
        path.symlink_to(rng.choice([path, folder / "nowhere", rng.choice(files), run, "/dev/null"]))
    elif kind == 7:
        place = run / rng.choice(NAMES)
        if not place.exists() and folder != run:
            rng.choice([lambda: os.rename(folder, place), lambda: linked(folder, place), place.touch])()
    elif kind == 8:
        replace(folder / rng.choice(ADDED), rng.choice([b"", b"\x80\x04.", content]))
    elif kind == 9:
        other = rng.choice(files)
        replace(path, other.read_bytes() if other.is_file() else b"")
    else:
        path = rng.choice([p for p in files if p.suffix == ".json" and p.is_file()] or [path])
        try:
            replace(path, other_json(rng, path.read_bytes()))
        except (ValueError, OSError, RecursionError):
            replace(path, b"[]")


def allowed(function, *arguments):
    """Call a function that may answer or refuse in one line."""
    try:
        return function(*arguments)
    except ValueError as error:
        check_refusal(error)
        return None


@pytest.fixture(scope="module")
def settings(model_folder, finished_run):
    from runs import SMALL

    data = DataConfig(num_train_rows=16, num_eval_rows=4)
    return settings_of(ModelConfig(model_folder), data, GRPOConfig(output_dir=str(finished_run), **SMALL))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_only_what_was_written_is_resumed(finished_run, settings, tmp_path):
    written = {name: contents(finished_run / name) for name in ("checkpoint-2", "checkpoint-4")}
    final = {name: (finished_run / name).read_bytes() for name in final_files(finished_run)}
    outputs = tmp_path / "outputs"

    def is_written(folder):
        there = contents(folder)
        known = any(there.items() >= original.items() for original in written.values())
        added = there.keys() - written["checkpoint-2"].keys()
        return known and not any(name.endswith((".pt", ".pth", ".bin", ".safetensors", ".json")) for name in added)

    def check(rng):
        shutil.rmtree(outputs, ignore_errors=True)
        run = linked(finished_run, outputs / "run")
        early = rng.random() < 0.3  # without manifests, of which nothing says what was written
        for folder in (run, run / "checkpoint-2", run / "checkpoint-4") if early else ():
            for name in BOTH:
                (folder / name).unlink()
        for _ in range(rng.choice([1, 1, 2, 4])):
            change_one(rng, run)
        forged = rng.random() < 0.1
        if forged and (run / "checkpoint-4").is_dir():  # a manifest of what is there now
            for name in BOTH:
                replace(run / "checkpoint-4" / name, b"")
            write_manifest(run / "checkpoint-4")
        passed = []
        newest = newest_checkpoint(run, lambda folder, reason: passed.append((folder, reason)))
        for folder, reason in passed:
            assert reason and len(reason.splitlines()) == 1, (folder, reason)
            allowed(is_finished, folder, NUM_STEPS)
        for folder in checkpoints_of(run):
            assert (why_not_whole(folder) is None) == (
                folder not in [place for place, _ in passed]
            ) or newest is not None
            allowed(resolve_checkpoint, str(folder), run)
        assert resolve_checkpoint("auto", run) == (None if newest is None else str(newest))
        assert allowed(resolve_checkpoint, "latest", run) == (None if newest is None else str(newest))
        if newest is not None:
            assert early or forged or is_written(newest), f"{newest} is not what was written"
            is_finished(newest, NUM_STEPS), is_finished(newest, NUM_STEPS, 2)  # of a whole one it is known
            allowed(check_same_run, settings, newest)
            assert early or forged or allowed(base_model_name, str(newest)) is not None
        if has_final_files(run) and not early:
            assert all((run / name).read_bytes() == content for name, content in final.items() if name in final)
            is_finished(run, NUM_STEPS)
        for place in (run, run / "checkpoint-4"):
            allowed(find_system_message, str(place))
            allowed(find_prompt_settings, str(place))
            allowed(base_model_name, str(place))
            allowed(digest_of_files, place)
        allowed(newest_run, outputs)
        allowed(check_output_dir, run, settings["model_name"])
        return "none whole" if newest is None else "the last" if newest.name == "checkpoint-4" else "an earlier one"

    fuzz("checkpoints", check, kinds=3, share=0.4)  # each takes five times as long as one of another surface
