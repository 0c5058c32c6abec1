"""Estimates how well a model answers from a few sampled answers: pass@k, mean@k, maj@k and 95% confidence intervals."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

Z = 1.959964  # 95% of a normal distribution lie within this many standard deviations of its mean


def pass_at_k(num_completions: int, num_right: int, k: int) -> float:
    """The probability, in [0, 1], that at least one of k completions of a question is right.

    The estimate is the share of those subsets of k completions, out of n that were sampled, that hold a right one:
    1 - C(n - c, k) / C(n, k). It is unbiased for every n (Chen et al. 2021, arXiv:2107.03374, equation 1).

    Args:
        num_completions: n, at least k.
        num_right: c, in [0, n].

    Raises:
        ValueError: a number is out of its range.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= num_completions:
        raise ValueError(f"k={k}: must be in [1, {num_completions}], the number of completions")
    if not 0 <= num_right <= num_completions:
        raise ValueError(f"num_right={num_right}: must be in [0, {num_completions}], the number of completions")
    return 1 - math.comb(num_completions - num_right, k) / math.comb(num_completions, k)


def mean_at_k(right: Sequence[bool]) -> float:
    """The share of a question's completions that are right, in [0, 1]. It equals pass@1; others call it avg@k.

    Raises:
        ValueError: there are no completions.
    """
    if not right:
        raise ValueError("right=[]: a question needs at least one completion")
    return sum(right) / len(right)


def maj_at_k(votes: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """1.0 when the answer that most of a question's completions give is right, else 0.0.

    This is self-consistency (Wang et al. 2022, arXiv:2203.11171) with equal weights, and maj1@k of Minerva
    (arXiv:2206.14858). Of answers with equally many votes the first one wins. A completion without an answer (None) has
    no vote, and a question without votes is wrong. Right and wrong completions are counted apart even where their votes
    are equal.

    Args:
        votes: the answer of each completion, in a form that is equal for equal answers.
        right: whether each completion is right.

    Raises:
        ValueError: `right` has not one value for each vote.

    >>> maj_at_k(["7", None, "8", "8"], [False, False, True, True])
    1.0
    """
    if len(votes) != len(right):
        raise ValueError(f"right has {len(right)} values; it needs one for each of the {len(votes)} votes")
    counts = Counter(pair for pair in zip(votes, right, strict=True) if pair[0] is not None)  # in order of appearance
    if not counts:
        return 0.0
    _, winner_is_right = max(counts, key=counts.__getitem__)  # the first where several have the largest count
    return float(winner_is_right)


def wilson_interval(share: float, num_answers: float) -> tuple[float, float]:
    """The 95% confidence interval of a probability of which a share of n independent answers was seen.

    The interval of Wilson 1927, "Probable inference, the law of succession, and statistical inference", stays within
    [0, 1], and has a width even where all answers or none are right.

    Args:
        share: the share of right answers, in [0, 1].
        num_answers: n, above 0; it need not be a whole number.

    Raises:
        ValueError: a number is out of its range.

    >>> [round(bound, 3) for bound in wilson_interval(0.5, 100)]
    [0.404, 0.596]
    """
    if not 0 <= share <= 1 or not num_answers > 0:
        raise ValueError(f"share={share}, num_answers={num_answers}: expected a share in [0, 1] of more than 0 answers")
    scale = 1 + Z**2 / num_answers
    middle = (share + Z**2 / (2 * num_answers)) / scale
    half = Z * math.sqrt(share * (1 - share) / num_answers + Z**2 / (4 * num_answers**2)) / scale
    # `min` and `max` mend errors of rounding near 0 and 1.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def share_interval(shares: Sequence[float], num_completions: int) -> tuple[float, float]:
    """The 95% confidence interval of the mean over N questions of one share each, such as mean@k or pass@k.

    Completions of one question are not independent, so the standard error is taken over questions: s / sqrt(N) (Miller
    2024, arXiv:2411.00640). The interval is Wilson's for as many independent answers as would have this standard error
    (Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data"). For many questions it is the mean -+ 1.96 standard errors, and near 0 and 1 it is
    sound where that would be too narrow. With one completion a question it is Wilson's interval itself.

    Args:
        shares: one value in [0, 1] for each question.
        num_completions: the number of completions of each question. A question counts for at most so many independent
            answers.

    Raises:
        ValueError: there are no questions.
    """
    num_questions = len(shares)
    if num_questions == 0:
        raise ValueError("shares=[]: there are no questions")
    mean = min(1.0, sum(shares) / num_questions)
    squared_error = sum((share - mean) ** 2 for share in shares) / num_questions**2
    variance = mean * (1 - mean)  # the variance of one answer
    num_answers = num_questions  # where the shares do not tell how alike the completions of a question are
    if num_questions > 1 and variance > 0:
        most = num_questions * num_completions
        num_answers = most if squared_error * most <= variance else variance / squared_error
    return wilson_interval(mean, max(num_answers, 1.0))


def difference_interval(
    before: float, before_interval: tuple[float, float], after: float, after_interval: tuple[float, float]
) -> tuple[float, float]:
    """The 95% confidence interval of the difference between two shares, from the interval of each.

    This is method 10 of Newcombe 1998, "Interval estimation for the difference between independent proportions". Where
    both are of the same questions, as before and after training, it is wider than need be, so that it never takes
    chance for a change.

    >>> [round(bound, 2) for bound in difference_interval(0.5, (0.4, 0.6), 0.8, (0.7, 0.87))]
    [0.16, 0.42]
    """
    change = after - before
    down = math.hypot(after - after_interval[0], before_interval[1] - before)
    up = math.hypot(after_interval[1] - after, before - before_interval[0])
    return max(-1.0, change - down), min(1.0, change + up)
