"""A run whose newest checkpoint is damaged goes on from an earlier one, and ends where it would have ended."""

import os
import shutil

import pytest
from damages import DAMAGES
from runs import left_by

from benchmarks.forks import Forks
from benchmarks.small_job import all_flags, make_model
from tunix_torch.checkpoints.files import why_not_whole

JOB = (
    "--max_steps 4 --save_strategy steps --save_steps 2 --eval_strategy steps --eval_steps 2 --disable_tqdm true "
    "--resume_from_checkpoint auto"
).split()


class Run:
    """A run of four steps, with checkpoints of the second and the fourth, killed before its last files."""

    def __init__(self, scratch):
        self.folder, self.kept, self.log = scratch / "run", scratch / "kept", scratch / "log.txt"
        self.forks = Forks(os.environ)
        self.flags = all_flags(self.folder, *JOB, "--model_name", str(make_model(scratch / "model")))
        self.start()
        self.expected = left_by(self.folder)
        for name in ("adapter_model.safetensors", "trainer_state.json", "manifest.sha256"):
            (self.folder / name).unlink()
        self.folder.rename(self.kept)
        self.names = sorted(path.name for path in (self.kept / "checkpoint-4").iterdir())

    def start(self):
        self.log.unlink(missing_ok=True)
        status = self.forks.start("tunix_torch.cli.train:main", self.flags, self.log).wait()
        assert status == 0, self.log.read_text()

    def check(self, name, kind):
        """Damage a file of the newest checkpoint, and see that the run's end is equal."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.kept, self.folder)
        newest = self.folder / "checkpoint-4"
        DAMAGES[kind](newest / name)
        self.start()
        lines = self.log.read_text().splitlines()
        assert [line for line in lines if line.startswith(f"{newest} is passed over: ")], (name, kind)
        assert f"Continuing from {self.folder / 'checkpoint-2'}" in lines, (name, kind)
        assert left_by(self.folder) == self.expected and why_not_whole(newest) is None, (name, kind)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    killed = Run(tmp_path_factory.mktemp("damage"))
    yield killed
    killed.forks.close()


@pytest.mark.thorough
def test_a_damage_to_each_file_is_passed_over_and_the_end_is_equal(killed):
    kinds = list(DAMAGES)
    for i, name in enumerate(killed.names):
        killed.check(name, kinds[i % len(kinds)])


@pytest.mark.slow
def test_every_damage_to_every_file_is_passed_over_and_the_end_is_equal(killed):
    assert len(killed.names) * len(DAMAGES) >= 60
    for name in killed.names:
        for kind in DAMAGES:
            killed.check(name, kind)
    print(f"{len(killed.names)} files x {len(DAMAGES)} damages: all passed over, all ended alike")
