"""Reward functions never raise on any text, stay in their stated ranges, and judge answers as a teacher would."""

import ast
import doctest
import importlib
import math
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tunix_torch.rewards import (
    PRESET_REWARDS,
    REWARDS,
    RewardBreakdown,
    RewardComponent,
    answers_match,
    composite_reward,
    correctness_reward,
    explanation_quality_reward,
    extract_answer,
    extract_reasoning,
    format_reward,
    get_reward,
    parse_number,
    reasoning_coherence_reward,
    score_with_breakdown,
    trajectory_reward,
)
from tunix_torch.rewards.answers import final_answer

ROOT = Path(__file__).resolve().parent.parent.parent
ALL_REWARDS = REWARDS | PRESET_REWARDS
FILES = (ROOT / "tunix_torch" / "rewards").glob("*.py")
MODULES = ["tunix_torch.rewards"] + [f"tunix_torch.rewards.{path.stem}" for path in FILES if path.stem != "__init__"]

# Arbitrary text almost never holds a tag or a number, so half of it is assembled from such pieces.
PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "####", "72", "-1", "1,000", ".5", "1/2", "/0", "1e9"]
PIECES += ["$", "%", " km", "+", "*", "=", " ", "\n", ".", "therefore", "\u2212", "²", "½", "٣"]
TEXT = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)
LAYOUT = "<reasoning>{}</reasoning> <answer>{}</answer>"


def test_docstring_examples_hold(subtests):
    for name in MODULES:
        with subtests.test(name=name):
            # The attribute rewards.correctness_reward is the function, so only import_module finds the module.
            results = doctest.testmod(importlib.import_module(name))
            assert results.attempted > 0
            assert results.failed == 0


def test_one_stated_number_is_parsed_exactly(subtests):
    for text, number in [
        ("72", 72),
        ("  72.\n", 72),
        ("-5", -5),
        ("\u22125", -5),
        ("+5", 5),
        ("3.25", Fraction(13, 4)),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("1,234", 1234),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("$72.50", Fraction(145, 2)),
        ("-$5", -5),
        ("$-5", -5),
        ("€ 5", 5),
        ("5€", 5),
        ("50%", 50),
        ("50 percent", 50),
        ("1/2", Fraction(1, 2)),
        ("-3 / 4", Fraction(-3, 4)),
        ("1 1/2 cups", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("72 km", 72),
        ("72km/h", 72),
        ("9 m^2", 9),
        ("9 µm", 9),
        ("72 clips in all.", 72),
        ("18 apples", 18),
        ("18 more apples", 18),
        ("3 cities", 3),
        ("24 zeros", 24),
        ("3 seats in row x", 3),
        ("5 percent", 5),
        ("5 (apples)", 5),
        ("72 m", 72),
        ("about 5 apples", 5),
        ("The answer is 5.", 5),
        ("= 5", 5),
        ("3 million", 3_000_000),
        ("2 dozen eggs", 24),
        ("48 / 2 = 24\n48 + 24 = 72\n#### 72", 72),
        ("#### -1,000", -1000),
    ]:
        with subtests.test(text=text, number=number):
            assert parse_number(text) == number


def test_what_is_not_one_number_is_none(subtests):
    for text in (
        [
            "",
            "many",
            "between 3 and 5",
            "3, 5",
            "3-5",
            "3 5",
            "5 and a half",
            "12:30",
            "1.2.3",
            "5/6/2024",
            "1,23",
            "--5",
        ]
        + [
            "3 quarters",
            "3 halves",
            "7 thirds",
            "5 squared",
            "5 cubed",
            "5 factorial",
            "half of 5",
            "5 dozen or so",
            "5 hundredths",
        ]
        + [
            "0.3 repeating",
            "5 doubled",
            "5 sevenths of it",
            "5 out of six",
            "5 less than ten",
            "5 at most",
            "2 hundred five",
            "3 quadrillion",
            "3 nines",
            "3 fourteenths",
            "3 basis points",
            "101 in binary",
            "12 isn't it",
            "12 isn’t it",
            "12 maybe",
            "12 never",
            "2 sinh x",
            "2 zeta",
            "2 gcd",
            "2 cm x",
        ]
        + [
            "2x",
            "2 x",
            "2x+y",
            "4a-2",
            "2xy",
            "3ab",
            "4sqrt2",
            "2pi",
            "2 sin x",
            "5k",
            "84/7",
            "4/2",
            "5 apples or six",
        ]
        + [
            "Apollo 11",
            "B5",
            "2^10",
            "5²",
            "5½",
            "2 + 3",
            "1/0",
            "0/0",
            "1e9999",
            "1e999999999",
            "9" * 5000,
            "nan",
            "inf",
        ]
    ):
        with subtests.test(text=text):
            assert parse_number(text) is None


def test_answers_match_as_a_teacher_would_judge(subtests):
    for given_answer, expected, match in [
        ("72", "#### 72", True),
        ("72.0", "72", True),
        ("27", "72", False),
        ("-72", "72", False),
        ("0.5", "1/2", True),
        ("0.33", "1/3", False),
        ("$72", "72 dollars", True),
        ("$72", "€72", False),
        ("$72 in total", "72 dollars", True),
        ("72 cents", "$72", False),
        ("72 km", "72", True),
        ("72", "72 km", True),
        ("72 km", "72 miles", False),
        ("1 mile", "1 Miles.", True),
        ("2 inches", "2 inch", True),
        ("2 ms", "2 m", False),
        ("9 m²", "9 m^2", True),
        ("9 m2", "9 m", False),
        ("50%", "50", True),
        ("50%", "50 percent", True),
        ("50%", "50 km", False),
        ("50%", "0.5", False),
        ("5 million", "5", False),
        ("3 quarters", "3", False),
        ("3", "3 quarters", False),
        ("5 squared", "5", False),
        ("2x", "2", False),
        ("47 + 38", "85", False),
        ("84/7", "12", False),
        ("between 3 and 5", "3", False),
        ("Between 3  and 5.", "between 3 and 5", True),
        ("Apollo 11", "Apollo 13", False),
        ("new\n York", "New York", True),
        ("", "0", False),
    ]:
        with subtests.test(given_answer=given_answer, expected=expected, match=match):
            assert answers_match(given_answer, expected) is match


def test_a_marker_counts_at_the_end_of_a_solution_only(subtests):
    """Regression: an expected answer in prose was cut wherever it contained "####"."""
    for solution, answer in [
        ("48 + 24 = 72\n#### 72", "72"),
        ("48 + 24 = 72\n#### 72\n\n", "72"),
        ("#### the answer is 72", "the answer is 72"),
        ("48 + 24 = 72. #### 72", "72"),
        ("48 + 24 = 72. #### -$1,234.50 ", "-$1,234.50"),
        ("#### 70\n#### 1/2", "1/2"),
        ("#### Sum\n#### 1/2", "#### Sum\n#### 1/2"),
        ("#### 70\nno. #### 1/2", "1/2"),
        ("48 + 24 = #### 72", "72"),
        ("<<48+24=72>> #### 72%", "72%"),
        ("<<48+24=72>>#### 72", "<<48+24=72>>#### 72"),
        ("# Title\n#### Heading", "# Title\n#### Heading"),
        ("## Title\nText\n#### 5", "## Title\nText\n#### 5"),
        ("## Title\nText.\n#### 5", "5"),
        ("#1 costs 5\n#### 5", "5"),
        ("Write #### 5", "Write #### 5"),
        ("##### 5", "##### 5"),
        ("The end. #### Plan", "The end. #### Plan"),
        ("48\n####", ""),
        ("#### 70 #### 72", "72"),
        ("a heading starts with #### in Markdown", "a heading starts with #### in Markdown"),
        ("#### Plan\nWrite a poem.", "#### Plan\nWrite a poem."),
        ("use #### 3 times", "use #### 3 times"),
        ("72", "72"),
    ]:
        with subtests.test(solution=solution, answer=answer):
            assert final_answer(solution) == answer


def test_the_last_complete_pair_of_tags_counts():
    assert extract_answer("<answer>1</answer><answer>2</answer></answer><answer>3") == "2"
    assert extract_answer("<answer>1<answer>2</answer>") == "2"
    assert extract_answer("</answer>2<answer>") is None
    assert extract_answer("<answer> </answer>") == ""
    assert extract_reasoning("<reasoning>a\nb</reasoning>") == "a\nb"


@given(TEXT, TEXT)
def test_parsing_never_raises_and_every_text_matches_itself(text, other):
    assert parse_number(text) is None or isinstance(parse_number(text), Fraction)
    assert answers_match(text, text)
    assert answers_match(text, other) == answers_match(other, text)


@given(st.fractions(), st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-1e9, max_value=1e9))
def test_a_printed_number_is_parsed_back(fraction, decimal):
    assert parse_number(str(fraction)) == fraction
    assert parse_number(f"${decimal:,}") == Fraction(decimal)


@given(TEXT, st.lists(st.sampled_from([" ", "\n", "\t", "\u00a0"]), min_size=1).map("".join))
def test_white_space_does_not_change_a_verdict(text, space):
    assume("####" not in text)  # white space decides whether it is a marker
    spaced = space + space.join(text.split(" ")) + space
    assert parse_number(spaced) == parse_number(text)
    assert answers_match(spaced, text)


@given(TEXT, TEXT, TEXT)
def test_rewards_stay_in_range(completion, reasoning, answer):
    completions = [completion, LAYOUT.format(reasoning, answer)]
    for reward_fn in REWARDS.values():
        rewards = reward_fn(["?"] * 2, completions, answer=[answer] * 2)
        assert len(rewards) == 2
        assert all(isinstance(reward, float) and 0.0 <= reward <= 1.0 for reward in rewards)


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_a_completion_is_scored_alone(completions):
    answers = ["72"] * len(completions)
    for reward_fn in REWARDS.values():
        together = reward_fn(completions, completions, answer=answers)
        assert together == [reward_fn([text], [text], answer=["72"])[0] for text in completions]


def test_no_pattern_backtracks_over_a_hostile_completion(subtests):
    for piece in [
        "<answer>",
        "</answer><answer>",
        "<reasoning>",
        " ",
        "\n",
        "1 + ",
        "1+1=2 ",
        "1,",
        "9",
        "9 / 7 ",
        "- ",
        "m2 ",
        "= ",
    ]:
        with subtests.test(piece=piece):
            hostile = piece * 20_000
            completions = [
                hostile,
                LAYOUT.format(hostile, hostile),
                LAYOUT.format(piece * (190 // len(piece)) + "=1", "1"),
            ]
            start = time.process_time()
            for reward_fn in REWARDS.values():
                reward_fn(["?"] * 3, completions, answer=[hostile] * 3)
            assert time.process_time() - start < 2.0  # CPU seconds: it takes about 0.1, backtracking takes minutes


def test_correctness_is_none_where_no_answer_is_known():
    completions = [LAYOUT.format("x", "72"), LAYOUT.format("x", "71"), "72", LAYOUT.format("x", "72")]
    assert correctness_reward(["?"] * 4, completions, answer=["72", "72", "72", None]) == [1.0, 0.0, 0.0, None]
    with pytest.raises(ValueError, match="answer has 1 values.* 4 completions"):
        correctness_reward(["?"] * 4, completions, answer=["72"])


def test_a_number_as_the_expected_answer_is_taken_as_its_text(subtests):
    for value, text in ((72, "72"), (145.0, "145.0"), (1e-05, "0.00001"), (-5, "-5"), (True, "True")):
        with subtests.test(value=value, text=text):
            completions = [LAYOUT.format("x", given_answer) for given_answer in (text, f" {text}", "7")]
            for name, reward_fn in ALL_REWARDS.items():
                of_value = reward_fn(["?"] * 3, completions, answer=[value] * 3)
                assert of_value == reward_fn(["?"] * 3, completions, answer=[text] * 3), name


@pytest.mark.parametrize("value, words", [(["72"], "is a list"), ({"a": 1}, "is a dict"), (math.nan, "finite")])
def test_an_expected_answer_that_is_no_text_or_number_is_refused(value, words):
    with pytest.raises(ValueError, match=rf"^answer=.*{words}"):
        correctness_reward(["?"], ["<answer>72</answer>"], answer=[value])


def test_every_reward_takes_conversations_and_gives_the_same():
    texts = [
        LAYOUT.format("First, 48 / 2 = 24.\nThen 48 + 24 = 72, because it is so.", "72 clips"),
        LAYOUT.format("wait", "60"),
        "<answer>72</answer>",
        "",
    ]
    prompts = [[{"role": "user", "content": "48 + 48 / 2?"}]] * 4
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    conversations[1] = [{"role": "assistant", "content": [{"type": "text", "text": texts[1]}]}]
    components = [RewardComponent(name, reward_fn) for name, reward_fn in ALL_REWARDS.items()]
    functions = [*ALL_REWARDS.values(), composite_reward(components), trajectory_reward(components, 0.5)]
    for reward_fn in functions:
        of_texts = reward_fn(prompts=["?"] * 4, completions=texts, answer=["72"] * 4)
        assert reward_fn(prompts=prompts, completions=conversations, answer=["72"] * 4) == of_texts
        assert reward_fn(prompts=prompts, completions=[*conversations[:2], *texts[2:]], answer=["72"] * 4) == of_texts
    assert score_with_breakdown(components, prompts, conversations, answer=["72"] * 4) == score_with_breakdown(
        components, prompts, texts, answer=["72"] * 4
    )
    for bad in (72, ["72"], None):
        with pytest.raises(ValueError, match="completions: .*expected a text or a list of messages"):
            format_reward(["?"], [bad])


def test_format_is_full_only_for_the_exact_layout(subtests):
    for completion, reward in [
        ("<reasoning>a</reasoning><answer>b</answer>", 1.0),
        ("\n<reasoning>\na\n</reasoning>\n\n<answer>b</answer>\n", 1.0),
        ("Sure! <reasoning>a</reasoning> <answer>b</answer>", 0.4),
        ("<reasoning>a</reasoning> so <answer>b</answer>", 0.4),
        ("<reasoning>a</reasoning> <answer>b</answer> Done.", 0.4),
        ("<answer>b</answer> <reasoning>a</reasoning>", 0.4),
        ("<reasoning> </reasoning> <answer>b</answer>", 0.4),
        ("<reasoning>a</reasoning> <answer></answer>", 0.4),
        ("<reasoning>a</reasoning> <answer>b", 0.3),
        ("<reasoning>a</reasoning> <answer>b</answer> <answer>b</answer>", 0.2),
        ("b", 0.0),
    ]:
        with subtests.test(completion=completion, reward=reward):
            assert format_reward(["?"], [completion]) == [reward]


def test_coherence_is_the_documented_sum(subtests):
    for reasoning, reward in [
        ("", 0.0),
        ("72", 0.25),
        ("2 + 3 = 5", 0.25 + 0.25 / 3 + 0.25),
        ("2 + 3 = 6", 0.25 + 0.25 / 3),
        ("2 + 3 = 5\n2 + 3 = 6", 0.25 + 0.5 / 3 + 0.125),
        ("- 2 + 3 = 5\n- 4 x $2 = $8", 0.25 + 0.5 / 3 + 0.25),
        ("1/0=3", 0.25),
        ("20/80=25%", 0.25),
        ("y + 3 + 4 = 9", 0.25 + 0.25 / 3),
        ("10 \u2212 2 × 3 = 8 ÷ 2 = 4", 0.25 + 0.25 / 3 + 0.25),
        ("So therefore hence", 0.25 + 0.25 / 3 + 0.25),
        ("so so", 0.25 + 0.125),
        ("We add two apples. " * 5, 0.25 + 0.25 / 3),
    ]:
        with subtests.test(reasoning=reasoning, reward=reward):
            assert reasoning_coherence_reward(["?"], [LAYOUT.format(reasoning, 1)]) == [pytest.approx(reward)]


def test_quality_falls_for_short_long_and_repetitive_reasoning():
    def quality(reasoning):
        return explanation_quality_reward(["?"], [LAYOUT.format(reasoning, 1)])[0]

    def by_length(num_words):
        return quality(" ".join(f"word{i}" for i in range(num_words)))

    assert [by_length(n) for n in (0, 5, 20, 150, 225, 300, 1000)] == [0.0, 0.25, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert quality("so it is " * 20) == 3 / 58
    assert explanation_quality_reward(["?"], ["no tags " * 20]) == [0.0]


def constant(*values):
    return lambda prompts, completions, **columns: list(values)


def test_composite_is_the_weighted_sum_of_the_clipped_parts_that_apply():
    components = [
        RewardComponent("clipped", constant(3.0, -3.0, None), weight=2.0, clip_range=(-1.0, 1.0)),
        RewardComponent("plain", constant(0.25, None, None)),
    ]
    assert score_with_breakdown(components, ["?"] * 3, ["a", "b", "c"]) == [
        RewardBreakdown(2.25, {"clipped": 1.0, "plain": 0.25}),
        RewardBreakdown(-2.0, {"clipped": -1.0, "plain": None}),
        RewardBreakdown(None, {"clipped": None, "plain": None}),
    ]
    assert composite_reward(components)(["?"] * 3, ["a", "b", "c"]) == [2.25, -2.0, None]


def test_composite_passes_the_columns_on_and_nests():
    inner = composite_reward([RewardComponent("correctness", correctness_reward, weight=2.0)])
    outer = composite_reward([RewardComponent("inner", inner, weight=0.5), RewardComponent("format", format_reward)])
    assert outer(["?"], [LAYOUT.format("x", "72")], answer=["72"], level=["easy"]) == [2.0]


def test_a_bad_component_is_refused(subtests):
    for arguments, message in [
        ({"weight": math.nan}, "weight of 'c' is nan; .* finite"),
        ({"weight": math.inf}, "weight of 'c' is inf; .* finite"),
        ({"clip_range": (1.0, 0.0)}, r"clip_range of 'c' is \(1.0, 0.0\); .*low < high"),
        ({"clip_range": (math.nan, 1.0)}, "clip_range of 'c' is .*low < high"),
    ]:
        with subtests.test(arguments=arguments, message=message):
            with pytest.raises(ValueError, match=message):
                RewardComponent("c", constant(1.0), **arguments)


def test_a_bad_composite_is_refused_when_it_is_made():
    with pytest.raises(ValueError, match=r"named \['a', 'a'\]; every name has to be different"):
        composite_reward([RewardComponent("a", constant(1.0)), RewardComponent("a", constant(0.0))])
    with pytest.raises(ValueError, match="at least one RewardComponent"):
        composite_reward([])


def test_a_bad_reward_function_is_named_and_its_exceptions_pass_through():
    def score(reward_fn, **arguments):
        return score_with_breakdown([RewardComponent("mine", reward_fn, **arguments)], ["?"], ["a"])

    with pytest.raises(ValueError, match="'mine' gave 2 values.* 1 completions"):
        score(constant(1.0, 2.0))
    with pytest.raises(ValueError, match="'mine' gave nan"):
        score(constant(math.nan), clip_range=(0.0, 1.0))
    assert score(constant(math.inf), clip_range=(0.0, 1.0))[0].total == 1.0
    with pytest.raises(ZeroDivisionError):
        score(lambda prompts, completions: [1 / 0])


def test_get_reward_names_the_nearest():
    assert all(get_reward(name) is reward_fn for name, reward_fn in REWARDS.items())
    with pytest.raises(ValueError, match="'fromat' is unknown; the names are correctness, .*; did you mean 'format'"):
        get_reward("fromat")


def test_importing_rewards_imports_only_the_standard_library():
    names = "{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names"
    code = f"import sys; from tunix_torch import rewards; print({names})"
    # -S leaves out site-packages, whose .pth files may import anything.
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(ast.literal_eval(result.stdout)) - {"__main__"} == {"tunix_torch"}


def test_example_prints_the_expected_rows():
    command = [sys.executable, "rewards_example.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["right", "1.00", "1.00", "1.00", "1.00"] in rows
    assert ["malformed", "1.00", "0.20", "0.00", "0.00"] in rows
    assert [row[0] for row in rows if row and row[0] in ("right", "malformed", "wrong", "rambling")] == (
        ["right", "malformed", "wrong", "rambling"] * 2
    )


def test_a_whole_number_beyond_the_range_of_a_float_is_judged_exactly():
    """Regression: it was an OverflowError. Beyond what Python writes as a text, it is refused."""
    number = 10**400 + 1
    for wanted, equal in ((number, 1.0), (number + 1, 0.0)):
        assert correctness_reward(["?"], [f"<answer>{number}</answer>"], answer=[wanted]) == [equal]
    with pytest.raises(ValueError, match="answer: a number of more than 4,000 digits"):
        correctness_reward(["?"], ["<answer>1</answer>"], answer=[10**5000])
