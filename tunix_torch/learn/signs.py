"""Signs that a run has collapsed: which number of a step, which bound, how long it holds, what it means, what to try.

A run looks for them at every step (`collapse.py`), and the report of a run in its metrics (`report/diagnosis.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass

# Nats a token. A run that learns stays below 0.5 as a rule; learning rates of 0.1 and 1e6 gave 1.5 to 14 at once.
MOST_KL = 1.0
# Nats a token. A tiny model that solved nine of ten questions was at 0.04, and at 0.0008 after a rate of 1e6. At
# 0.002 the likeliest token has a probability of 99.98%, so that a group of completions is one completion.
LEAST_ENTROPY = 0.002
# Tokens: the one that ends a completion, and hardly another.
LEAST_LENGTH = 1.5
# How often a completion may grow to its length where half of all are cut off by then. Reasoning grows too, but ends.
MOST_GROWTH, MOST_CUT_OFF = 3.0, 0.5
# A loss of given rows is too high above so many times the first one, and a little more, so many logs in a row.
MOST_LOSS, MORE_LOSS, LOSS_LOGS = 1.4, 0.3, 3
# Steps in a row: small batches have equal rewards now and then, and an estimate of the KL has a heavy tail.
STEPS, KL_STEPS = 10, 5
# At the end of a run so many steps in a row are enough, since no further ones can tell.
STEPS_AT_END = 3
# Steps whose mean is compared for trends, and by how many standard errors of such a mean the reward must have fallen:
# over 10,000 steps of pure noise, the best and the worst mean are about 8 apart.
WINDOW, ERRORS = 20, 12.0

RATE = "a lower learning_rate (a tenth), or a smaller max_grad_norm"


@dataclass(frozen=True)
class Sign:
    """A condition that holds for a number of each step, so many steps in a row."""

    name: str  # in the summary
    metric: str
    holds: Callable[[float], bool]
    steps: int
    saw: str  # what was seen, with the smallest and the largest number as {least} and {most}
    means: str
    hint: str


SIGNS = (
    Sign(
        "equal rewards",
        "frac_reward_zero_std",
        lambda share: share == 1.0,
        STEPS,
        "within every group all rewards were equal",
        "nothing is learned: the questions are too easy or too hard by now, or the policy writes one thing only",
        "other questions, a higher generation_temperature, larger groups, or reward functions that see differences",
    ),
    Sign(
        "entropy",
        "entropy",
        lambda entropy: entropy < LEAST_ENTROPY,
        STEPS,
        f"the entropy of a token was {{least:.2g}} to {{most:.2g}} nats, below {LEAST_ENTROPY:g}",
        "the policy no longer tries anything else",
        f"{RATE}, an entropy bonus (entropy_coef), a KL penalty (kl_penalty_coef), or a higher epsilon_high",
    ),
    Sign(
        "KL",
        "kl",
        lambda kl: kl > MOST_KL,
        KL_STEPS,
        f"the KL from the reference policy was {{least:.3g}} to {{most:.3g}} nats a token, above {MOST_KL:g}",
        "the policy has left what the model knew, and its text is likely to be broken",
        f"{RATE}, or a larger kl_penalty_coef",
    ),
    Sign(
        "all cut off",
        "completions/clipped_ratio",
        lambda share: share == 1.0,
        STEPS,
        "every completion was cut off at generation_max_length",
        "no completion has ended, so no answer may have been reached, or the policy repeats itself",
        f"a larger generation_max_length, overlong_buffer_length, a prompt that asks for less, or {RATE}",
    ),
    Sign(
        "empty completions",
        "completions/mean_length",
        lambda length: length < LEAST_LENGTH,
        STEPS,
        "completions had {least:.3g} to {most:.3g} tokens",
        "the policy ends at once",
        f"reward functions that do not pay for that, a larger kl_penalty_coef, or {RATE}",
    ),
)


@dataclass
class Streak:
    """Steps in a row for which a sign holds."""

    first: int
    last: int
    least: float
    most: float

    @property
    def steps(self) -> int:
        return self.last - self.first + 1
