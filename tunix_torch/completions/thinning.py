"""Decides which steps' files stay when there is too little room: few of them, spread evenly over the run.

The first and the newest file stay. When all files together would take more than they may, every second of the others
goes; from then on, a step stays only where it is at least as far from the one before it as those that stayed are from
each other. How far that is shows in what is there. So a run that was killed and goes on from a checkpoint comes to the
same files as one that was not.
"""

from collections.abc import Mapping


def thinned(sizes: Mapping[int, int], limit: int) -> list[int]:
    """The steps whose files stay, in order, the newest among them.

    Args:
        sizes: the bytes of each step's file, with those of the newest step, which is about to be written.
        limit: bytes that the files may take together. The first and the newest stay even where they take more.
    """
    *earlier, newest = sorted(sizes)
    if len(earlier) > 2 and earlier[-1] - earlier[-2] < _nearest(earlier[:-1]):
        earlier.pop()  # it was the newest until now
    while len(earlier) > 1 and sum(sizes[step] for step in earlier) + sizes[newest] > limit:
        distance, kept = 2 * _nearest(earlier), earlier[:1]
        for step in earlier[1:]:
            if step - kept[-1] >= distance:
                kept.append(step)
        earlier = kept
    return [*earlier, newest]


def _nearest(steps: list[int]) -> int:
    """The smallest distance between neighbours among at least two steps."""
    return min(after - before for before, after in zip(steps, steps[1:], strict=False))
