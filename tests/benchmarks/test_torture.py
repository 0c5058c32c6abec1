"""A job that is killed at random moments ends as one that is not; and what a soak measures shows a leak."""

import random

import pytest

from benchmarks.soak import Sample, report
from benchmarks.torture import PHASES, Watched, draw, torture


@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.thorough), pytest.param(10, marks=pytest.mark.slow)]
)
def test_jobs_that_are_killed_at_random_moments_end_as_one_that_is_not(tmp_path, kills):
    assert torture(kills, 0, tmp_path) == 0


@pytest.mark.slow
@pytest.mark.xla
def test_on_xla_jobs_that_are_killed_ten_times_end_as_one_that_is_not(tmp_path):
    assert torture(10, 1, tmp_path) == 0


def test_moments_are_drawn_from_every_phase_and_from_each_time_that_a_job_comes_to_it():
    generator, reference = random.Random(0), Watched(0)
    for phase in PHASES:
        reference.seconds[phase] += [1.0] * (6 if phase == "checkpoint" else 1)
    drawn = [draw(generator, reference, cached=False) for _ in range(2000)]
    assert {kill.phase for kill in drawn} == set(PHASES)
    assert {kill.time for kill in drawn if kill.phase == "checkpoint"} == set(range(6))
    assert all(0 <= kill.share < 1 for kill in drawn)
    assert not {"warm start", "cache"} & {draw(generator, reference, cached=True).phase for _ in range(500)}


FLAT = {"memory": 800.0, "files": 4, "threads": 5, "processor": 0.05, "seconds": 0.06, "disk": 2.0, "logs": 0.0002}


def samples(**growth):
    """Samples of a process whose quantities grow by so much a step."""
    grown = {"processor": FLAT["processor"], "seconds": FLAT["seconds"], "logs": FLAT["logs"]} | growth
    return [
        Sample(
            step=n, **{k: (0 if k in ("processor", "seconds") else v) + grown.get(k, 0) * n for k, v in FLAT.items()}
        )
        for n in range(100, 10_000, 100)
    ]


@pytest.mark.parametrize(
    "growth, said",
    [
        ({}, None),
        ({"memory": 0.0009}, None),
        ({"memory": 0.0011}, "memory grows by 1.10 MB"),
        ({"files": 0.001}, "more open files"),
        ({"threads": 0.001}, "more threads"),
        ({"disk": 0.00001}, "the folder grows"),
    ],
)
def test_a_leak_breaks_a_bound(growth, said, capsys):
    broken = report(samples(**growth), warm_up=500)
    assert [text.startswith(said) for text in broken] == [True] if said else not broken
    assert "| resident memory, MB |" in capsys.readouterr().out


def test_steps_that_take_ever_longer_break_a_bound():
    slower = [Sample(**(vars(s) | {"processor": s.processor * (1 + s.step / 20_000)})) for s in samples()]
    assert report(slower, warm_up=500) == ["steps take longer"]


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="too few for a line"):
        report(samples()[:9], warm_up=500)
