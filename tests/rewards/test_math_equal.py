"""math_equal pays for the right value in any notation and for nothing else, and no text hangs, raises or is run."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.math_judges import read_triples
from tunix_torch.rewards import math_equal_reward
from tunix_torch.rewards.math_answer import agree, read_items
from tunix_torch.rewards.math_equal import MAX_CHARS, POINTS, math_equal
from tunix_torch.rewards.math_latex import Unreadable, simplify_latex
from tunix_torch.rewards.math_numbers import Part
from tunix_torch.rewards.math_written import variable

ROOT = Path(__file__).resolve().parent.parent.parent
TRIPLES = read_triples()
MATHEMATICS = st.recursive(
    st.sampled_from(["0", "1", "2", "7", "0.5", "100", "x", "y", "e", "\\pi", "1\\frac{1}{2}"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "^", ""]), inner).map(lambda t: "({}{}{})".format(*t)),
        inner.map("\\sqrt{{{}}}".format),
        inner.map("\\sin({})".format),
        inner.map("\\ln({})".format),
        st.tuples(inner, inner).map(lambda t: "\\frac{{{}}}{{{}}}".format(*t)),
    ),
    max_leaves=12,
)


def test_no_wrong_answer_of_the_triples_is_paid_and_95_percent_are_judged_right():
    paid = [triple for triple in TRIPLES if math_equal(triple.given, triple.expected) and not triple.is_right]
    assert not paid
    refused = [triple for triple in TRIPLES if not math_equal(triple.given, triple.expected) and triple.is_right]
    assert len(TRIPLES) > 1400 and len(refused) <= 0.05 * len(TRIPLES), refused


@pytest.mark.thorough
def test_delimiters_boxes_and_a_period_change_no_verdict(subtests):
    for look in ("${}$", "\\({}\\)", "\\[ {} \\]", "\\boxed{{{}}}", "$\\boxed{{{}}}$", " {}. ", "**{}**"):
        with subtests.test(look=look):
            for triple in TRIPLES:
                if not any(mark in triple.given for mark in ("$", "\\(", "\\[", "boxed", "**", "The", "Answer", "=> ")):
                    bare, dressed = (
                        math_equal(text, triple.expected) for text in (triple.given, look.format(triple.given))
                    )
                    assert dressed == bare, (look, triple)


def test_every_expected_answer_equals_itself_and_units_or_letters_do_not_depend_on_the_side():
    for triple in TRIPLES:
        assert math_equal(triple.expected, triple.expected)
    for letter_or_word in (
        "2x",
        "2xy",
        "2i",
        "2\\sqrt{3}",
        "2 quarters",
        "2 squared",
        "2 million",
        "2f(x)",
        "2^x",
    ):
        assert not math_equal(letter_or_word, "2") and not math_equal("2", letter_or_word)


def test_mathematics_is_judged_by_value(subtests):
    for given_answer, expected, equal in [
        ("1/2", "0.5", True),
        ("\\frac{1}{2}", "0.5", True),
        ("\\dfrac12", "1/2", True),
        ("$\\left(\\frac{1}{2}\\right)$", "#### 0.5", True),
        ("\\boxed{\\frac{3}{4}}", "0.75", True),
        ("-\\frac{1}{2}", "-0.5", True),
        ("1\\frac{1}{2}", "1.5", True),
        ("1 1/2", "\\frac{3}{2}", True),
        ("-1\\frac{1}{2}", "-0.5", False),
        ("2\\frac{x}{3}", "2x/3", True),
        ("1,000 + 234", "1234", False),
        ("0.333", "1/3", False),
        ("0." + "3" * 60, "\\frac{1}{3}", False),
        ("2^10", "1024", True),
        ("2**10", "1024", True),
        ("-2^2", "-4", True),
        ("(-2)^2", "4", True),
        ("2^{3^2}", "512", True),
        ("2^3^2", "512", True),
        ("2^{-1}", "0.5", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("\\sqrt8", "2 √2", True),
        ("sqrt(2)/2", "1/sqrt(2)", True),
        ("\\sqrt[3]{-8}", "-2", True),
        ("\\sqrt{2}", "1.41421356237", False),
        ("(\\sqrt{2}+1)(\\sqrt{2}-1)", "1", False),
        ("\\sqrt{-4}", "2\\sqrt{-1}", True),
        ("2\\pi", "π·2", True),
        ("\\pi", "3.14159", False),
        ("\\pi", "22/7", False),
        ("\\sin(\\pi)", "0", True),
        ("\\sin 2x", "2 \\sin x \\cos x", True),
        ("\\sin^2 x + \\cos^2 x", "1", False),
        ("\\tan^2 x + 1", "\\sec^2 x", True),
        ("sin(x)^2", "\\sin^2 x", True),
        ("\\log_2 8", "3", True),
        ("\\log 1000", "3", True),
        ("\\ln(e^2)", "2", True),
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+1", False),
        ("xy + 2", "2 + yx", True),
        ("\\frac{x^2-1}{x-1}", "x+1", True),
        ("\\sqrt{x^2}", "x", False),
        ("x", "y", False),
        ("x = 5", "5", True),
        ("x=5", "y=5.0", False),
        ("90^\\circ", "90", True),
        ("5\\text{ cm}", "5 cm", True),
        ("5\\text{ cm}", "5 km", False),
        ("50\\%", "50%", True),
        ("50\\%", "\\frac{1}{2}", False),
        ("(1, \\frac{1}{2})", "(1, 0.5)", True),
        ("(0.5, 1)", "(1, 0.5)", False),
        ("[1, 2)", "[1.0, 2)", True),
        ("[1, 2)", "(1, 2)", False),
        ("(-\\infty, 3]", "(-\\infty, 6/2]", True),
        ("\\frac{3}{2}, 1", "1, 1.5", True),
        ("2, 1", "1, \\frac{4}{2}", True),
        ("1, \\frac{4}{2}", "2, 1", False),
        ("\\{2, 1\\}", "\\{1, 2\\}", True),
        ("\\{1, 1\\}", "\\{1, 2\\}", False),
        ("1, 2", "1, 2, 3", False),
        ("New York", "new york", True),
        ("dog", "god", False),
        ("A", "B", False),
        ("1/0", "1/0", True),
        ("1/0", "2/0", False),
        ("0^0", "1", False),
        ("2 3", "6", False),
        ("1 +", "1", False),
        ("", "0", False),
    ]:
        with subtests.test(given_answer=given_answer, expected=expected, equal=equal):
            assert math_equal_reward(["?"], [f"<answer>{given_answer}</answer>"], answer=[expected]) == [float(equal)]


HOSTILE = [
    "9^9^9^9",
    "9**9**9",
    "(" * 60 + "1" + ")" * 60,
    "2^" * 100 + "2",
    "((((9^99)^99)^99)^99)",
    "(((x+9)^99)^99)^99",
    "e^{e^{e^{e^9}}}",
    "-" * 250 + "1",
    "10^{10^{10}}",
    "\\sqrt[1000000000]{2}",
    "2^{0.0000000001}^{-99}",
    "\\sin(10^{99}\\pi)",
    "\\ln(\\ln(\\ln(2)))",
    "1/(\\sqrt{2}-\\sqrt{2})",
    "100000!",
    "300!" * 70,
    "\\binom{300}{150}" * 18,
    "e^\\pi+" * 40 + "1",
    "\\{" + ",".join(f"e^{i}" for i in range(60)) + "\\}",
    "\\pm" * 90 + "1",
    "\\{(\\pm1," * 9 + "1" + ")\\}" * 9,  # each level doubles the number of values
    "__import__('os').system('false')",
    "{" * 150 + "}" * 150,
    "9" * 290,
    "9" * 10_000,
    "1" + " " * 297 + "x",
    "1" + "~" * 297 + "x",
    "$" * 298 + "1",
    "1+" * 5_000 + "1",
    "\\frac{" * 2_000,
    "x^e+" * 74 + "1",
    "2^{0.5}*" * 37 + "1",
    "\\sinh(10^{29})",
    "1e999*" * 49 + "1",
    "p(x)" * 74,
    "{1," * 100,
]


def test_a_float_equals_its_decimals(subtests):
    """Regression: Python writes 0.00001 as "1e-05", whose "e" was read as Euler's number."""
    for value, text, equal in [
        (0.00001, "0.00001", True),
        (0.00001, "1e-05", True),
        (0.00001, "10^{-5}", True),
        (1e16, "10000000000000000", True),
        (1e16, "16e", False),
        (2.5e-7, "0.00000025", True),
        (1e300, "10^{300}", True),
        (1e-300, "0", False),
    ]:
        with subtests.test(value=value, text=text, equal=equal):
            assert math_equal_reward(["?"], [f"<answer>{text}</answer>"], answer=[value]) == [float(equal)]


def test_a_value_that_is_too_small_is_unreadable_and_only_rounding_gives_0():
    for text in ("e^{-200}", "e^{-150}", "\\sqrt{2}\\cdot 10^{-80}"):
        with pytest.raises(Unreadable):
            read_items(simplify_latex(text))
    [item] = read_items("sqrt(2) + sqrt(3) - sqrt(2) - sqrt(3)")
    assert item.value == 0


def test_no_mathematics_hangs_raises_or_is_run(subtests):
    for bomb in HOSTILE:
        with subtests.test(bomb=bomb):
            math_equal("\\sqrt{2}", "\\sqrt{3}")  # imports mpmath before the clock starts
            for expected in (bomb + "+1", bomb[: MAX_CHARS - 2] + "+2", "\\sqrt{2}"):
                start = time.process_time()  # other processes do not count
                assert not math_equal(bomb, expected)
                assert time.process_time() - start < 0.1  # measured: below 0.02 s


def test_threads_judge_as_one_does():
    """Reward functions with a timeout run in threads, so they must not need signals or a precision that all share."""
    texts = [triple for triple in TRIPLES if "sqrt" in triple.expected or "pi" in triple.expected]
    verdicts = [[] for _ in range(4)]

    def judge(own):
        own += [math_equal(triple.given, triple.expected) for triple in texts]

    threads = [threading.Thread(target=judge, args=(own,)) for own in verdicts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [[triple.is_right for triple in texts]] * 4


@settings(deadline=None)
@given(MATHEMATICS, st.sampled_from(["({})", "{}+0", "1*{}", "\\frac{{{}}}{{1}}", "{}-1+1"]))
def test_a_neutral_element_changes_no_value(expression, written_otherwise):
    """Only values are compared, since an answer that is a calculation is not right where a number is expected."""
    texts = [simplify_latex(text) for text in (written_otherwise.format(expression), expression)]
    try:
        readings = [[read_items(text, point) for text in texts] for point in range(POINTS)]
    except Unreadable:
        return
    for given_items, expected_items in readings:
        assert agree(
            [item._replace(part=Part(item.value)) for item in given_items],
            [item._replace(part=Part(item.value)) for item in expected_items],
        )


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
@settings(deadline=None)
def test_a_fraction_in_latex_equals_itself_only(fraction, other):
    def written(number):
        return f"\\frac{{{number.numerator}}}{{{number.denominator}}}" if number.denominator > 1 else str(number)

    assert math_equal(written(fraction), str(fraction))
    assert math_equal(written(other), str(fraction)) == (fraction == other)


def test_every_variable_has_a_value_of_its_own():
    letters = "abcdfghjklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"  # "e" and "i" are constants
    for point in range(POINTS):
        values = [variable(letter, point) for letter in letters]
        assert len({abs(value) for value in values}) == len(letters)
        assert 0 not in values


def test_mpmath_is_imported_late_and_keeps_its_precision():
    code = (
        "import sys; from tunix_torch import rewards; assert 'mpmath' not in sys.modules\n"
        "rewards.math_equal_reward(['?'], ['<answer>sqrt(2)</answer>'], answer=['2'])\n"
        "import mpmath; print(mpmath.mp.dps)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "15"
