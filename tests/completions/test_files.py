"""All files together stay within the limit, hold what they were given, and appear whole."""

import pyarrow.parquet
import pytest

from tunix_torch.completions.files import EVALUATIONS, STEPS, CompletionFiles


def columns(step, count=4, text="x"):
    """The columns of a step's file, with texts that can't be packed into fewer bytes."""
    texts = [f"{text}{hash((step, row))}" * 20 for row in range(count)]
    return {"step": [step] * count, "completion": texts, "rewards/a": [None, *[0.5] * (count - 1)]}


def taken(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def steps_of(folder, kind):
    return sorted(int(path.stem.rpartition("_")[2]) for path in (folder / "completions").glob(f"{kind}_*.parquet"))


def test_a_file_holds_what_it_was_given(tmp_path):
    table = columns(3) | {"prompt": ["\ud800", "", "数\x1b", "a\nb"], "clipped": [True, False, None, True]}
    CompletionFiles(tmp_path, 2**20).write(STEPS, 3, table)
    (path,) = (tmp_path / "completions").iterdir()
    assert path.name == "completions_00003.parquet"
    read = pyarrow.parquet.read_table(path)
    assert read.to_pydict() == table | {"prompt": ["\\ud800", "", "数\x1b", "a\nb"]}
    kinds = {name: str(kind) for name, kind in zip(read.schema.names, read.schema.types, strict=True)}
    assert kinds["step"] == "int64" and kinds["rewards/a"] == "double" and kinds["clipped"] == "bool"


def test_the_limit_holds_at_every_moment_and_evaluations_leave_steps_room(tmp_path):
    limit, files = 40_000, CompletionFiles(tmp_path, 40_000)
    files.write(EVALUATIONS, 0, columns(0))
    for step in range(1, 121):
        files.write(STEPS, step, columns(step))
        assert taken(tmp_path) <= limit
        if step % 3 == 0:
            files.write(EVALUATIONS, step, columns(step))
            assert taken(tmp_path) <= limit
    evaluations, steps = steps_of(tmp_path, EVALUATIONS), steps_of(tmp_path, STEPS)
    assert evaluations[0] == 0 and evaluations[-1] == 120 and len(evaluations) > 3
    assert steps[0] == 1 and steps[-1] == 120 and len(steps) > 3
    assert taken(tmp_path) > limit / 2


def test_the_first_and_the_newest_evaluation_stay_whatever_they_take(tmp_path):
    files = CompletionFiles(tmp_path, 1000)
    for step in range(5):
        files.write(EVALUATIONS, step, columns(step))
        files.write(STEPS, step, columns(step))
    assert steps_of(tmp_path, EVALUATIONS) == [0, 4] and steps_of(tmp_path, STEPS) == []


def test_without_a_limit_of_its_own_nothing_is_written(tmp_path):
    files = CompletionFiles(tmp_path, 0)
    files.write(STEPS, 1, columns(1))
    assert not list(tmp_path.iterdir())


def test_later_steps_are_forgotten_and_other_files_stay(tmp_path):
    files = CompletionFiles(tmp_path, 2**20)
    for step in (1, 2, 30_000, 100_000):
        files.write(STEPS, step, columns(step))
    own = tmp_path / "completions" / "completions_of_mine.parquet"
    own.write_text("mine")
    CompletionFiles(tmp_path, 2**20).forget_after(2)
    assert {path.name for path in own.parent.iterdir()} == {
        "completions_00001.parquet",
        "completions_00002.parquet",
        own.name,
    }


def test_files_without_an_end_are_forgotten(tmp_path):
    files = CompletionFiles(tmp_path, 2**20)
    for step in (1, 2):
        files.write(STEPS, step, columns(step))
    cut = tmp_path / "completions" / "completions_00001.parquet"
    cut.write_bytes(cut.read_bytes()[:-1])
    (cut.parent / "completions_00003.parquet.new").write_bytes(b"PAR1")
    CompletionFiles(tmp_path, 2**20).forget_after(2)
    assert [path.name for path in cut.parent.iterdir()] == ["completions_00002.parquet"]


def test_a_file_that_can_not_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    files = CompletionFiles(tmp_path, 2**20)
    files.write(STEPS, 1, columns(1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "completions").iterdir()}
    (tmp_path / "completions" / "completions_00002.parquet.new").mkdir()  # so that it can't be opened
    with pytest.raises(OSError, match="completions_00002.parquet.new"):
        files.write(STEPS, 2, columns(2))
    assert {p.name: p.read_bytes() for p in (tmp_path / "completions").iterdir() if p.is_file()} == before
