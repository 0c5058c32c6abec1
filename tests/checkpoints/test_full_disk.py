"""A disk that is full at any write, and a kill at any write, lose nothing: the same command ends as if it had not been.

The process of a job has a library preloaded that lets its writes fail, as `full_disk.py` says. So the errors are those
that the operating system gives, where Python, torch, safetensors and tokenizers meet them.
"""

import shutil

import pytest
from full_disk import Disk, is_possible
from runs import left_by

from benchmarks.small_job import all_flags, make_model
from tunix_torch.checkpoints.files import checkpoints_of, has_final_files, newest_checkpoint

pytestmark = pytest.mark.skipif(not is_possible(), reason="gcc is not installed")

JOB = (
    "--max_steps 4 --save_strategy steps --save_steps 2 --save_total_limit 1 --eval_strategy steps --eval_steps 2 "
    "--disable_tqdm true --resume_from_checkpoint auto"
).split()


class Trials:
    """A job that was not disturbed, and trials of the same job."""

    def __init__(self, scratch):
        self.disk, self.folder = Disk(scratch), scratch / "run"
        model = make_model(scratch / "model")
        self.flags = all_flags(self.folder, *JOB, "--model_name", str(model))
        whole = self.disk.run(self.folder, self.flags)
        assert whole.status == 0, whole.text
        self.writes, self.expected, self.saved = whole.writes, left_by(self.folder), False

    def disturb(self, writes, killed):
        """Let the disk be full from a write on, or kill the job there; then run it again. `saved` says of a trial that
        a checkpoint was whole; of a later one that it must be."""
        shutil.rmtree(self.folder, ignore_errors=True)
        ended = self.disk.run(self.folder, self.flags, writes, killed)
        assert ended.status == (-9 if killed else 1), (writes, ended)
        if not killed:
            errors = [line for line in ended.text.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and "no space left in" in errors[0], (writes, ended.text)
            assert "Traceback" not in ended.text, (writes, ended.text)
        newest = newest_checkpoint(self.folder)
        assert newest is not None or not self.saved, f"{writes}: a checkpoint that was whole is lost"
        self.saved = newest is not None
        assert killed or checkpoints_of(self.folder)[:1] == [newest][: self.saved], f"{writes}: a part has the name"
        again = self.disk.run(self.folder, self.flags)
        assert again.status == 0, (writes, again.text)
        finished = "The run is finished" in again.text
        assert finished or "Continuing from" in again.text or not self.saved, (writes, again.text)
        for name, what in left_by(self.folder).items():
            assert what == self.expected[name], f"{writes}: other {name}"
        assert has_final_files(self.folder)
        assert not (self.saved and (self.folder / "previous").exists()), f"{writes}: it began anew"


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    trials = Trials(tmp_path_factory.mktemp("full_disk"))
    yield trials
    trials.disk.close()


@pytest.mark.thorough
@pytest.mark.parametrize("killed", [False, True], ids=["full", "killed"])
def test_a_disk_that_is_full_at_a_write_or_a_kill_there_loses_nothing(trials, killed):
    trials.saved = False
    for share in (0.05, 0.3, 0.5, 0.8, 0.97):
        trials.disturb(int(share * trials.writes), killed)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["full", "killed"])
def test_at_every_single_write(trials, killed):
    trials.saved = False
    for writes in range(trials.writes):
        trials.disturb(writes, killed)
    print(f"{trials.writes} writes, {'killed' if killed else 'full'} at each: all ended alike")
