"""Any completion gets the same finite reward each time, in the range that is stated, and in a bounded time."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
from fuzzing import check_refusal, fuzz, text

from tunix_torch.rewards import PRESET_REWARDS, REWARDS, extract_answer, find_numbers, parse_number
from tunix_torch.rewards.math_equal import math_equal

pytestmark = pytest.mark.thorough

RANGES = {
    "match_format_exactly": (0, 3),
    "match_format_approximately": (-2, 2),
    "check_answer": (-1, 3),
    "check_numbers": (0, 1.5),
    "gemma2_self_correction": (0, 0.1),
    "gemma2_length": (0, 0.05),
}  # all others give numbers in [0, 1]
ALL = REWARDS | PRESET_REWARDS

# What mathematics, and the tags around it, are made of.
PIECES = (
    *(
        "\\frac{",
        "\\frac12",
        "\\dfrac",
        "\\sqrt{",
        "\\sqrt[",
        "\\binom",
        "\\left(",
        "\\right)",
        "{",
        "}",
        "(",
        ")",
        "[",
    ),
    *(
        "]",
        "\\{",
        "\\}",
        "^",
        "_",
        "x",
        "e",
        "i",
        "\\pi",
        "\\log_",
        "\\sin ",
        "\\ln",
        "\\exp",
        "\\pm",
        "\\cup",
        "|",
        "!",
    ),
    *(
        "\\begin{pmatrix}",
        "\\\\",
        "&",
        "\\end{pmatrix}",
        "\\text{ cm}",
        "\\boxed{",
        ".\\overline{3}",
        "\\$",
        "\\,",
        "$",
    ),
    *(" million", " km", "%", "°", " and ", "<", "\\in", "=", "+", "*", "/", "9", "2^", "10^{99}", "0.5", "1e5", "½"),
    *("1 1/2", "1,000,000", "f(x)", "x_1", "sin", "pi", "∞", "≤", "therefore ", "Step 1: ", "let me ", ". ", "\n"),
)


def mathematics(rng, depth=0):
    """An expression in LaTeX that is well formed, at least before pieces are added."""
    if depth > 6 or rng.random() < 0.3:
        return rng.choice(["1", "2", "72", "x", "0.5", "\\pi", "e", "i", "-3", "10", "99", "y_1", "10^9"])
    one, other = mathematics(rng, depth + 1), mathematics(rng, depth + 1)
    forms = ["({})", "{{{}}}", "\\frac{{{}}}{{{}}}", "{}+{}", "{}-{}", "{}*{}", "{}/{}", "{}^{{{}}}", "\\sqrt{{{}}}"]
    forms += ["\\sqrt[{}]{{{}}}", "({},{})", "\\{{{},{}\\}}", "|{}|", "{}!", "\\sin({})", "\\log_{{{}}}({})", "\\pm {}"]
    forms += [
        "\\binom{{{}}}{{{}}}",
        "{}={}",
        "[{},{})",
        "\\begin{{pmatrix}}{}&{}\\end{{pmatrix}}",
        "\\exp({})",
        "{} {}",
    ]
    return rng.choice(forms).format(one, other)


def answer(rng):
    kind = rng.randrange(5)
    if kind == 0:
        return text(rng, PIECES)
    if kind == 1:
        return str(rng.choice([rng.randrange(-100, 100), rng.random(), Fraction(rng.randrange(99), 7)]))
    made = mathematics(rng)
    if kind == 2:
        return made
    at = rng.randrange(len(made) + 1)
    return made[:at] + text(rng, PIECES, longest=4) + made[at + rng.randrange(3) :]


def expected(rng):
    """An expected answer of any type that a data set may have."""
    kind = rng.randrange(8)
    if kind < 5:
        return answer(rng)
    numbers = [72, -1, 0, True, 10**30, 10**5000, 0.1, 1e-300, 1e300, float("nan"), float("inf"), Decimal("1.50")]
    return rng.choice([*numbers, Decimal("NaN"), Fraction(1, 3), None, ["72"], {"a": 1}, b"72", 1j])


def completion(rng, given):
    layout = rng.choice(["<reasoning>{}</reasoning> <answer>{}</answer>", "{}<answer>{}", "{}{}", "{}\n#### {}"])
    whole = layout.format(text(rng, PIECES, longest=40), given)
    if rng.random() < 0.1:
        parts = rng.choice([whole, [{"type": "text", "text": whole}], None, 7, [{"text": None}], [whole]])
        return [{"role": rng.choice(["assistant", "user", None]), "content": parts}]
    return whole


def same(one, other):
    return one == other and [type(a) for a in one] == [type(b) for b in other]


def test_every_reward_is_finite_in_its_range_and_the_same_again():
    def check(rng):
        wanted = expected(rng)
        given = str(wanted) if rng.random() < 0.3 and not isinstance(wanted, int) else answer(rng)
        completions = [completion(rng, given), completion(rng, answer(rng))]
        refused = set()
        for name, reward in ALL.items():
            try:
                values = reward(["?"] * 2, completions, answer=[wanted] * 2)
            except ValueError as error:
                check_refusal(error, "answer", "completions")
                refused.add(name)
                continue
            low, high = RANGES.get(name, (0, 1))
            assert len(values) == 2
            for number in values:
                sound = type(number) is float and math.isfinite(number) and low <= number <= high
                assert sound or number is None and wanted is None, (name, number)
            assert same(values, reward(["?"] * 2, completions, answer=[wanted] * 2)), name
            alone = reward(["?"], completions[1:], answer=[wanted])
            assert same(values[1:], alone), f"{name}: the other rows of a batch change a reward"
        good = isinstance(wanted, str | None) and all(isinstance(made, str) for made in completions)
        assert not (good and refused), f"texts were refused by {refused}"
        return "refused" if refused else "scored"

    fuzz("rewards", check, kinds=2)


def number(rng):
    """A number that is no whole one where it is written as a division, and one of the ways to write it."""
    made = Fraction(rng.randrange(-400, 400), rng.choice([1, 1, 2, 3, 4, 5, 7, 10, 100]))
    top, bottom = abs(made.numerator), made.denominator
    sign = "-" if made < 0 else ""
    forms = [f"{sign}{top}"] if bottom == 1 else [f"{sign}{top}/{bottom}", f"{sign}\\frac{{{top}}}{{{bottom}}}"]
    if 100 % bottom == 0:
        forms.append(f"{sign}{Decimal(top) / bottom:f}")
    form = rng.choice(forms)
    return made, rng.choice(["{}", "${}$", "\\boxed{{{}}}", " {} ", "\\({}\\)", "**{}**", "x = {}"]).format(form)


def test_answers_are_equal_where_they_have_one_value():
    def check(rng):
        one, other = answer(rng), answer(rng)
        assert math_equal(one, one), one
        assert math_equal(one, other) == math_equal(one, other)
        (value, written), (another, also_written) = number(rng), number(rng)
        if rng.random() < 0.5:
            another = value
            also_written = (
                f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else f"{value}.0"
            )
        equal = math_equal(written, also_written)
        assert equal == (value == another), (written, also_written)
        read = parse_number(one)
        assert read is None or find_numbers(one) == [read], one
        inside = extract_answer(f"<answer>{one}</answer>")
        assert inside == one.strip() or "answer>" in one
        return "equal" if equal else "different"

    fuzz("answers", check, kinds=2)
