"""The question that a template returns, and the words and number formats that templates of all types share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from random import Random

NAMES = (
    "Alice Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Mia Noah Olivia Paul Quinn Rosa Sam Tina "
    "Umar Vera Will Zoe"
).split()


@dataclass(frozen=True)
class Question:
    """One question with its computed answer.

    `problem` identifies what is asked, whatever the wording and the names, so that no two rows ask the same. It is
    empty where the text itself does that.
    """

    text: str
    answer: str
    steps: Sequence[str]  # the sentences that lead to the answer, without the one that states it
    problem: tuple[object, ...] = ()

    @property
    def reasoning(self) -> str:
        """The steps, one on each line, and a last line that states the answer."""
        return "\n".join([*self.steps, f"So the answer is {self.answer}."])


Template = Callable[[Random], Question]


def exact(value: int | Fraction) -> str:
    """A number as an exact decimal, which it must have.

    >>> exact(Fraction(5, 4)), exact(30)
    ('1.25', '30')
    """
    value = Fraction(value)
    text = f"{Decimal(value.numerator) / Decimal(value.denominator):f}"
    assert Fraction(text) == value, f"{value} has no exact decimal"
    return text


def has_places(value: Fraction, places: int) -> bool:
    """Whether the number can be written with so many decimal places."""
    return (value * 10**places).denominator == 1


def signed(value: int) -> str:
    """A number as a term to put after another one: 5 -> "+ 5", -5 -> "- 5"."""
    return f"+ {value}" if value >= 0 else f"- {-value}"


def listed(words: Sequence[str]) -> str:
    """Join words to a list as in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def ordinal(number: int) -> str:
    """A number as an ordinal: 1 -> "1st", 12 -> "12th"."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
