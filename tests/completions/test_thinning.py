"""Files that stay are spread evenly, within the limit, and a run that was killed and goes on comes to the same ones."""

import random

import pytest

from tunix_torch.completions.thinning import thinned


def write_all(steps, size_of, limit, kept=None):
    """Write the files of steps, one after the other. Returns the sizes of those that are left."""
    kept = dict(kept or {})
    for step in steps:
        kept[step] = size_of(step)
        stay = thinned(kept, limit)
        kept = {s: kept[s] for s in stay}
        assert step in kept and (len(kept) <= 2 or sum(kept.values()) <= limit)
    return kept


def test_all_stay_where_there_is_room():
    assert list(write_all(range(1, 51), lambda step: 10, 500)) == list(range(1, 51))


@pytest.mark.parametrize("every, first", [(1, 1), (10, 10), (7, 3)])
def test_those_that_stay_are_spread_evenly_and_hold_the_first_and_the_newest(every, first):
    steps = list(range(first, first + 1000 * every, every))
    kept = list(write_all(steps, lambda step: 10, 640))
    gaps = [after - before for before, after in zip(kept, kept[1:], strict=False)]
    assert kept[0] == first and kept[-1] == steps[-1]
    assert len(set(gaps[:-1])) == 1 and gaps[-1] <= gaps[0], "the newest one may be nearer"
    assert 32 <= len(kept) <= 64, "at least half of the room is used"


def test_steps_at_uneven_distances_are_thinned_out_too():
    chance = random.Random(0)
    steps = sorted(chance.sample(range(10_000), 500))
    kept = list(write_all(steps, lambda step: 1 + step % 7, 200))
    gaps = [after - before for before, after in zip(kept, kept[1:], strict=False)]
    assert kept[0] == steps[0] and kept[-1] == steps[-1] and max(gaps[:-1]) < 4 * min(gaps[:-1])


@pytest.mark.parametrize("seed", range(20))
def test_a_run_that_was_killed_comes_to_the_same_files(seed):
    """Whatever was thinned out after the checkpoint, also among the steps before it."""
    chance = random.Random(seed)
    sizes, limit = [chance.randint(5, 15) for _ in range(301)], chance.randint(60, 900)
    whole = write_all(range(1, 301), sizes.__getitem__, limit)
    killed = chance.randint(2, 299)
    checkpoint = chance.randint(1, killed)
    kept = write_all(range(1, killed + 1), sizes.__getitem__, limit)
    kept = {step: size for step, size in kept.items() if step <= checkpoint}
    assert write_all(range(checkpoint + 1, 301), sizes.__getitem__, limit, kept) == whole
