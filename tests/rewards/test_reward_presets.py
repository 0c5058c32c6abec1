"""Rewards of other systems give the numbers that those give, and no text raises, hangs or leaves the range."""

import math
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunix_torch import rewards
from tunix_torch.rewards import (
    PRESET_REWARDS,
    PRESETS,
    RewardComponent,
    check_answer,
    check_numbers,
    composite_reward,
    conciseness_reward,
    find_numbers,
    format_reward,
    gemma2_accuracy_reward,
    gemma2_format_reward,
    gemma2_length_bonus,
    gemma2_logic_reward,
    gemma2_self_correction_bonus,
    get_preset,
    get_reward,
    jaccard_correctness_reward,
    match_format_approximately,
    match_format_exactly,
    notebook_correctness_reward,
    notebook_format_reward,
    notebook_reasoning_quality_reward,
    reasoning_coherence_reward,
    score_steps,
    score_trajectory,
    score_with_breakdown,
    structure_reward,
    trajectory_reward,
)
from tunix_torch.rewards.math_equal import MAX_CHARS

RANGES = {
    "match_format_exactly": (0, 3),
    "match_format_approximately": (-2, 2),
    "check_answer": (-1, 3),
    "check_numbers": (0, 1.5),
    "gemma2_self_correction": (0, 0.1),
    "gemma2_length": (0, 0.05),
}  # all others give numbers in (0, 1)
NEED_AN_ANSWER = {
    "check_answer",
    "check_numbers",
    "notebook_correctness",
    "gemma2_accuracy",
    "jaccard_correctness",
    "math_equal",
}

# Arbitrary text almost never holds a tag or mathematics, so half of it is assembled from such pieces.
PIECES = ["<reasoning>", "</reasoning>", "<answer>", "</answer>", "####", "72", "-1", "1,000", ".5", "1/2", "/0", "1e9"]
PIECES += [
    "$",
    "%",
    " km",
    "+",
    "*",
    "=",
    " ",
    "\n",
    ". ",
    "therefore ",
    "step 1",
    "wait",
    "\u2212",
    "²",
    "½",
    "٣",
    ",",
]
PIECES += [
    "\\frac",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    "\\{",
    "\\}",
    "\\sqrt",
    "^",
    "_",
    "x",
    "e",
    "\\pi",
    "\\log",
    "sin ",
    "\\",
]
PIECES += [
    "\\pm",
    "\\begin{pmatrix}",
    "\\\\",
    "&",
    "\\end{pmatrix}",
    "\\cup",
    "|",
    "!",
    "f(",
    "°",
    " and ",
    "<",
    "\\in",
]
PIECES += ["\\binom", "\\text{ cm}", "\\boxed{", ".\\overline{3}", "\\$", "\\,", " million", " quarters", ":", ";"]
TEXT = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)
LAYOUT = "<reasoning>{}</reasoning> <answer>{}</answer>"


def one(reward_fn, completion, expected=None):
    columns = {} if expected is None else {"answer": [expected]}
    [reward] = reward_fn(["?"], [completion], **columns)
    return reward


def answered(reward_fn, given_answer, expected):
    return one(reward_fn, f"<answer>{given_answer}</answer>", expected)


# ---- every reward ----


@settings(deadline=None)
@given(TEXT, TEXT, TEXT, TEXT)
def test_no_text_raises_or_leaves_the_range(completion, reasoning, answer, expected):
    completions = [completion, LAYOUT.format(reasoning, answer), LAYOUT.format(reasoning, expected)]
    for name, reward_fn in PRESET_REWARDS.items():
        low, high = RANGES.get(name, (0, 1))
        for answers in ([expected] * 3, [answer] * 3):
            values = reward_fn(["?"] * 3, completions, answer=answers)
            assert len(values) == 3
            assert all(isinstance(value, float) and low <= value <= high for value in values), (name, values)


@settings(deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_a_completion_is_scored_alone(rows):
    completions = [completion for completion, _ in rows]
    answers = [expected for _, expected in rows]
    for reward_fn in PRESET_REWARDS.values():
        together = reward_fn(completions, completions, answer=answers)
        alone = [reward_fn([text], [text], answer=[expected])[0] for text, expected in rows]
        assert together == alone == reward_fn(completions, completions, answer=answers)


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
        "1,000,",
        "9",
        "9 / 7 ",
        "- ",
    ] + ["step ", "step 1 ", "x", "(", "\\frac{", "\\text{", "{", "^", "2^", "-", "let me ", "as a ", ". ", "a b. "]:
        with subtests.test(piece=piece):
            hostile = piece * 5_000
            short = piece * (MAX_CHARS // len(piece))
            completions = [hostile, LAYOUT.format(hostile, hostile), LAYOUT.format(short, short)]
            start = time.process_time()
            for reward_fn in PRESET_REWARDS.values():
                for expected in (hostile + "1", short + "1"):
                    reward_fn(["?"] * 3, completions, answer=[expected] * 3)
            assert time.process_time() - start < 4.0  # CPU seconds: it takes under 1, backtracking takes minutes


def test_a_reward_of_the_answer_is_none_where_none_is_known(subtests):
    for name in sorted(NEED_AN_ANSWER):
        with subtests.test(name=name):
            assert get_reward(name)(["?"], ["<answer>72</answer>"], answer=[None]) == [None]
            with pytest.raises(ValueError, match="answer has 1 values.* 2 completions"):
                get_reward(name)(["?"] * 2, ["a", "b"], answer=["72"])


def test_a_reward_of_the_form_needs_no_answer(subtests):
    for name in sorted(set(PRESET_REWARDS) - NEED_AN_ANSWER):
        with subtests.test(name=name):
            assert isinstance(one(get_reward(name), LAYOUT.format("a", "b")), float)


def test_full_marks_are_within_reach():
    text = (
        "Step 1: First, multiply 2 * 3 = 6, because it equals 6. Step 2: Second, add 1 + 1 = 2, since 2 - 1 = 1 and so "
    )
    text += "3 / 3 = 1. Step 3: Then, finally, therefore, subtract 5 - 4 = 1. Thus the rest is 72."
    completion = LAYOUT.format(text, "72")
    for preset, total in (("agent_tunix", 9.5), ("notebook", 1.0), ("gemma2_grpo", 1.02)):
        values = [weight * one(reward_fn, completion, "72") for reward_fn, weight in get_preset(preset)]
        assert sum(values) == pytest.approx(total), (preset, values)


def test_a_stuffed_wrong_answer_earns_what_the_docs_say(subtests):
    """docs/rewards.md names these loopholes, which come from the formulas of the other systems."""
    for preset, answer, total in [
        ("agent_tunix", "10", 4.0),
        ("agent_tunix", "many", 4.5),
        ("agent_tunix", "2024-05-06", 4.5),
        ("agent_tunix", "60", 5.25),
        ("agent_tunix", "70", 5.5),
        ("agent_tunix", "72, 5 or 7", 6.0),
        ("notebook", "60", 0.5),
        ("notebook", "60 " * 8 + "72", 0.5),
        ("gemma2_grpo", "60", 0.7),
        ("gemma2_grpo", "60 " * 8 + "72", 0.7),
    ]:
        with subtests.test(preset=preset, answer=answer, total=total):
            steps = [
                f"Step {i}: First, second, third, wait, actually, therefore add {i} + 1 = 9, because then so."
                for i in (1, 2, 3)
            ]
            text = (
                " ".join(steps)
                + " Correction: let me redo this, since 2 * 3 = 6 and calculate, compute, subtract, thus hence. "
            )
            completion = LAYOUT.format(text + "So it goes on and on. " * 10, answer)
            stuffed = sum(weight * one(reward_fn, completion, "72") for reward_fn, weight in get_preset(preset))
            assert stuffed == pytest.approx(total, abs=0.01)


# ---- finding numbers ----


def test_numbers_are_found_in_text(subtests):
    for text, numbers in [
        ("from -5 to 5", [-5, 5]),
        ("1,234 and 1,234,567.5", [1234, Fraction(2469135, 2)]),
        ("10-3 or 10 - 3", [10, 3, 10, 3]),
        ("\u22125 or -$5 or $-5!", [-5, -5, -5]),
        ("150 × 4 = 600.", [150, 4, 600]),
        ("1,2345", [1, 2345]),
        ("x2, m3, 2nd", [2]),
        ("1e3 is 1e1234", [1000, 1]),
        ("x", []),
        ("9" * 5000 + " 7", [7]),
    ]:
        with subtests.test(text=text, numbers=numbers):
            assert find_numbers(text) == numbers


# ---- agent-tunix ----


def test_agent_tunix_judges_the_format(subtests):
    for completion, exactly, approximately in [
        ("<reasoning>a</reasoning><answer>b</answer>", 3.0, 2.0),
        ("\n<reasoning>\na\n</reasoning>\n so \n<answer>b</answer>\n", 3.0, 2.0),
        ("Sure! <reasoning>a</reasoning><answer>b</answer>", 0.0, 2.0),
        ("<reasoning>a</reasoning><answer>b</answer> Done.", 0.0, 2.0),
        ("<answer>b</answer><reasoning>a</reasoning>", 0.0, 2.0),
        ("<reasoning> </reasoning><answer>b</answer>", 0.0, 2.0),
        ("<reasoning>a</reasoning><answer></answer>", 0.0, 2.0),
        ("<reasoning>a</reasoning><answer>b", 0.0, 1.0),
        ("<reasoning>a</reasoning><answer>b</answer><answer>b</answer>", 0.0, 0.0),
        ("b", 0.0, -2.0),
    ]:
        with subtests.test(completion=completion, exactly=exactly, approximately=approximately):
            assert one(match_format_exactly, completion) == exactly
            assert one(match_format_approximately, completion) == approximately


def test_agent_tunix_grades_the_answer(subtests):
    for given_answer, expected, points in [
        ("72", "72", 3.0),
        ("72", "48 + 24 = 72\n#### 72", 3.0),
        (" 72\n", "72", 1.5),
        ("72", " 72", 1.5),
        ("New York", "New York", 3.0),
        ("72.0", "72", 1.5),
        ("145", "145.0", 1.5),
        ("145", 145.0, 1.5),
        ("1,234", "1234", 1.5),
        ("$72", "72", 1.5),
        ("110", "100", 0.5),
        ("90", "100", 0.5),
        ("89.9", "100", 0.25),
        ("120", "100", 0.25),
        ("-95", "-100", 0.5),
        ("120.1", "100", -1.0),
        ("-5", "5", -1.0),
        ("0.1", "0", -1.0),
        ("0.0", "0", 1.5),
        ("many", "72", -0.5),
        ("Boston", "New York", -0.5),
        ("", "72", 0.0),
    ]:
        with subtests.test(given_answer=given_answer, expected=expected, points=points):
            assert answered(check_answer, given_answer, expected) == points


def test_agent_tunix_reads_the_number_with_its_sign_and_separators(subtests):
    for given_answer, expected, points in [
        ("-5", "-5", 1.5),
        ("-5", "5", 0.0),
        ("1,234", "1234", 1.5),
        ("1,234", "1", 0.0),
        ("She has 72 clips, not 70.", "72", 1.5),
        ("$72.00", "#### 72", 1.5),
        ("1/2", "0.5", 1.5),
        ("71", "72", 0.0),
        ("many", "72", 0.0),
        ("72", "many", 0.0),
        ("3rd grade", "3", 1.5),
    ]:
        with subtests.test(given_answer=given_answer, expected=expected, points=points):
            assert answered(check_numbers, given_answer, expected) == points


def test_agent_tunix_gives_nothing_without_an_answer():
    assert one(check_answer, "It is 72.", "72") == one(check_numbers, "It is 72.", "72") == 0.0


def test_a_number_that_is_negated_or_bounded_is_not_stated(subtests):
    """Regression: "not 72" was paid as 72: agent_tunix 6.0 of 9.5, notebook 0.65 of 1.0, gemma2_grpo 0.70 of 1.15."""
    for text in [
        "not 72",
        "it is not 72",
        "72th of 5",
        "at least 72",
        "72 at most",
        "no more than $72",
        "over 72",
        "x >= 72",
        "x > 72",
    ] + ["72 is wrong", "72 isn't it", "It can't be 72.", "nearly 72", "72 quadrillion", "between 72", "x \\ge 72"]:
        with subtests.test(text=text):
            for reward_fn in (check_numbers, notebook_correctness_reward, gemma2_accuracy_reward):
                assert answered(reward_fn, text, "72") == 0.0, reward_fn.__name__
            assert answered(check_answer, text, "72") == -0.5
            for sentence in ("She has 72 left over.", "72 more than Tom has", "That makes 72 in all."):
                assert answered(notebook_correctness_reward, sentence, "72") in (0.7, 1.0)
                assert answered(check_numbers, sentence, "72") == 1.5


# ---- the notebook ----


def test_notebook_format_counts_the_parts():
    assert one(notebook_format_reward, LAYOUT.format("a", "b")) == 1.0
    assert one(notebook_format_reward, "<reasoning>a</reasoning> b") == 0.5
    assert one(notebook_format_reward, "<answer>b") == 0.0


def test_notebook_correctness(subtests):
    for given_answer, expected, reward in [
        ("36", "36", 1.0),
        ("$36.00", "36 dollars", 1.0),
        ("36.009", "36", 1.0),
        ("36.01", "36", 0.0),
        ("New york", "New York", 1.0),
        ("in New York, I think", "New York", 0.7),
        ("that makes 36 in all", "#### 36", 0.7),
        ("12 * 3 = 36", "36", 0.7),
        (" ".join(map(str, range(201))), "36", 0.0),
        ("36, 37 or 38", "36", 0.0),
        ("36 quarters of it", "36", 0.0),
        ("Paris " * 30 + "New York", "New York", 0.0),
        ("-36 or so", "36", 0.0),
        ("1 3 6", "36", 0.0),
        ("between 3 and 6", "36", 0.0),
        ("368 in all", "36", 0.0),
        ("anything", "?", 0.0),
        ("", "36", 0.0),
    ]:
        with subtests.test(given_answer=given_answer, expected=expected, reward=reward):
            assert answered(notebook_correctness_reward, given_answer, expected) == reward


def test_notebook_quality_is_the_documented_sum(subtests):
    for reasoning, reward in [
        ("", 0.0),
        ("a b c d e", 0.0),
        ("a b c d e f", 0.1),
        ("a " * 10, 0.3),
        ("a " * 200, 0.3),
        ("a " * 201, 0.1),
        ("also addressing the stepfather", 0.0),
        ("First then NEXT, finally", 0.3),
        ("so so so", 0.1),
        ("3 x 4", 0.1),
        ("add 3 * 4 = 12", 0.3),
        ("0.15 and 0.16", 0.0),
        ("One. Two.", 0.2),
        ("One\nTwo", 0.2),
    ]:
        with subtests.test(reasoning=reasoning, reward=reward):
            assert one(notebook_reasoning_quality_reward, f"<reasoning>{reasoning}</reasoning>") == reward


# ---- gemma2-grpo-reasoning ----


def test_gemma2_format(subtests):
    for completion, reward in [
        (LAYOUT.format("a", "b"), 1.0),
        ("Hm. <reasoning>a</reasoning> so <answer>b</answer>.", 1.0),
        ("<answer>b</answer> <reasoning>a</reasoning>", 0.5),
        ("<reasoning>a</reasoning> b", 0.3),
        ("<answer>b</answer>", 0.3),
        ("<reasoning> <answer>", 0.0),
        ("", 0.0),
    ]:
        with subtests.test(completion=completion, reward=reward):
            assert one(gemma2_format_reward, completion) == reward


def test_gemma2_logic_is_the_documented_sum(subtests):
    for reasoning, reward in [
        ("", 0.0),
        ("also", 0.0),
        ("because", 0.05),
        ("because because", 0.05),
        ("therefore because since so thus hence first second third", 0.4),
        ("step 1, step 1", 0.15),
        ("step 1, step 2, step 3, step 4", 0.35),
        ("10 + 20 + 30", 0.1),
        ("1+1 2-2 3*3 4/4 5×5", 0.2),
        ("= equals ==", 0.08),
        ("= = = = = = =", 0.1),
    ]:
        with subtests.test(reasoning=reasoning, reward=reward):
            assert one(gemma2_logic_reward, f"<reasoning>{reasoning}</reasoning>") == reward


def test_gemma2_accuracy(subtests):
    for given_answer, expected, reward in [
        ("600", "600", 1.0),
        ("1,234", "1234", 1.0),
        ("150 × 4 = 600", "600", 1.0),
        ("600 of 700", "600", 0.0),
        ("600 of 700", "700", 0.0),
        ("She pays 600 dollars.", "600", 1.0),
        (" ".join(map(str, range(601))), "600", 0.0),
        ("1 2 3", "7, 5, 3", 0.0),
        ("7, 5, 3", "7, 5, 3", 1.0),
        ("9:45", "8:45", 0.0),
        ("8:45", "8:45", 1.0),
        ("2023-01-06", "2024-05-06", 0.0),
        ("12:45", "45", 0.0),
        ("606", "600", 0.9),
        ("594", "600", 0.9),
        ("607", "600", 0.5),
        ("-660", "-600", 0.5),
        ("661", "600", 0.0),
        ("-600", "600", 0.0),
        ("0.001", "0", 0.0),
        ("0", "0.0", 1.0),
        ("yes", "Yes.", 1.0),
        ("6", "Yes", 0.0),
        ("none", "600", 0.0),
    ]:
        with subtests.test(given_answer=given_answer, expected=expected, reward=reward):
            assert answered(gemma2_accuracy_reward, given_answer, expected) == reward


def test_gemma2_bonuses_are_capped():
    assert one(gemma2_self_correction_bonus, "I am awaiting a waiter.") == 0.0
    assert one(gemma2_self_correction_bonus, "Wait, wait, WAIT") == 0.03
    assert one(gemma2_self_correction_bonus, "Wait. Actually, that\u2019s not right") == 0.09
    assert one(gemma2_self_correction_bonus, "wait actually correction rechecking let me redo") == 0.1
    by_length = [one(gemma2_length_bonus, "word " * n) for n in (0, 49, 50, 99, 100, 400, 401, 600, 601)]
    assert by_length == [0, 0, 0.02, 0.02, 0.05, 0.05, 0.02, 0.02, 0]


# ---- the hackathon trainer ----


def test_jaccard_correctness(subtests):
    for given_answer, expected, reward in [
        ("72.0", "#### 72", 1.0),
        ("new york", "New York", 1.0),
        ("the big apple", "the apple", 0.4 * 2 / 3),
        ("73 km", "72 km", 0.4 / 3),
        ("73", "72", 0.0),
        ("", "72", 0.0),
    ]:
        with subtests.test(given_answer=given_answer, expected=expected, reward=reward):
            assert answered(jaccard_correctness_reward, given_answer, expected) == pytest.approx(reward)


def test_structure_falls_with_steps_too_many_too_short_or_unconnected():
    def structure(*steps):
        return one(structure_reward, f"<reasoning>{chr(10).join(steps)}</reasoning>")

    assert structure("then we add them up.") == 1.0
    assert structure(*["then we add them up."] * 10) == 1.0
    assert structure(*["then we add them up."] * 12) == pytest.approx(0.9)
    assert structure(*["then we add them up."] * 40) == 0.0
    assert structure("then we add them up.", "we add them up.") == pytest.approx(0.75)
    assert structure("thenabouts, we add.", "we add them up.") == pytest.approx(0.5)
    assert structure("we") == pytest.approx((1 + (0.2 + 0.5) / 2) / 2)
    assert structure("") == 0.0


def test_conciseness_prefers_clear_complete_and_tidy_text():
    good = (
        "First, she sold half as many clips in May, because 48 / 2 = 24.\nTherefore, the total is 48 + 24 = 72 clips."
    )
    worse = [good.replace("First, ", ""), good.lower(), good.replace("\n", " "), good.replace(", because", ". Yes:")]
    worse += ["72", good * 30]
    rewards_of = [one(conciseness_reward, f"<reasoning>{text}</reasoning>") for text in (good, *worse)]
    assert all(0.0 < reward < rewards_of[0] for reward in rewards_of[1:])
    assert one(conciseness_reward, good) == 0.0


# ---- presets and names ----


def test_the_presets_have_their_documented_weights():
    assert {name: [weight for _, weight in get_preset(name)] for name in PRESETS} == {
        "agent_tunix": [1.0, 1.0, 1.0, 1.0],
        "notebook": [0.3, 0.5, 0.2],
        "gemma2_grpo": [0.25, 0.30, 0.45, 1.0, 1.0],
        "composite": [0.5, 0.3, 0.2],
    }
    for name in PRESETS:
        names = [reward_fn.__name__ for reward_fn, _ in get_preset(name)]
        assert len(set(names)) == len(names)


def test_an_unknown_preset_or_reward_names_the_nearest():
    with pytest.raises(ValueError, match="preset 'gemma2' is unknown; the names are agent_tunix, .*mean 'gemma2_grpo'"):
        get_preset("gemma2")
    with pytest.raises(ValueError, match="reward 'check_anser' is unknown; .*; did you mean 'check_answer'"):
        get_reward("check_anser")
    with pytest.raises(ValueError, match="preset 'zzz' is unknown; the names are .*composite$"):
        get_preset("zzz")


def test_every_name_is_exported():
    assert all(get_reward(name) is reward_fn for name, reward_fn in PRESET_REWARDS.items())
    assert all(hasattr(rewards, name) for name in rewards.__all__)
    assert {reward_fn.__name__ for reward_fn in PRESET_REWARDS.values()} <= set(rewards.__all__)


# ---- the composite's normalisation and the scores of steps ----


def constant(*values):
    return lambda prompts, completions, **columns: list(values)


def test_normalize_maps_the_clip_range_to_0_and_1():
    component = RewardComponent("c", constant(-2.0, -1.0, 1.0, 3.0, None), 2.0, True, (-1.0, 3.0), {"source": "mine"})
    rows = score_with_breakdown([component], ["?"] * 5, ["a"] * 5)
    assert [row.parts["c"] for row in rows] == [0.0, 0.0, 0.5, 1.0, None]
    assert composite_reward([component])(["?"] * 5, ["a"] * 5) == [0.0, 0.0, 1.0, 2.0, None]
    assert component.metadata == {"source": "mine"}
    assert isinstance(hash(component), int)


@pytest.mark.parametrize("clip_range", [None, (-math.inf, 1.0), (0.0, math.inf)])
def test_normalize_needs_a_finite_clip_range(clip_range):
    with pytest.raises(ValueError, match="normalize of 'c' is True .*finite"):
        RewardComponent("c", constant(1.0), normalize=True, clip_range=clip_range)


STEPS = [
    RewardComponent("coherence", reasoning_coherence_reward),
    RewardComponent("structure", structure_reward, weight=0.5),
]


def test_steps_are_scored_as_completions_of_their_own():
    steps = ["First, 48 / 2 = 24.", "Then 48 + 24 = 62."]
    together = score_steps(STEPS, "?", steps)
    assert together == [score_with_breakdown(STEPS, ["?"], [f"<reasoning>{step}</reasoning>"])[0] for step in steps]
    assert together[0].parts["coherence"] > together[1].parts["coherence"]  # since 48 + 24 is not 62
    assert score_steps(STEPS, "?", []) == []


def test_the_trajectory_discounts_later_steps():
    completion = LAYOUT.format("First, 48 / 2 = 24.\nThen 48 + 24 = 72. So 72.", "72")
    whole = [RewardComponent("format", format_reward), RewardComponent("answer", get_reward("correctness"))]
    score = score_trajectory(STEPS, "?", completion, 0.5, whole, {"answer": "72"})
    totals = [step.total for step in score.steps]
    assert len(totals) == 3
    assert score.discounted == [totals[0], totals[1] / 2, totals[2] / 4]
    assert score.mean == pytest.approx(sum(score.discounted) / 3)
    assert score.whole.total == 2.0
    assert score_trajectory(STEPS, "?", completion).whole is None
    assert score_trajectory(STEPS, "?", completion).discounted == totals


def test_a_trajectory_leaves_out_steps_that_no_component_judges():
    component = RewardComponent("c", lambda prompts, completions, **columns: [None, 1.0, 1.0][: len(completions)])
    score = score_trajectory([component], "?", "<reasoning>a\nb\nc</reasoning>", 0.5)
    assert (score.discounted, score.mean) == ([None, 0.5, 0.25], 0.375)
    assert score_trajectory([component], "?", "<reasoning>a</reasoning>").mean is None
    assert score_trajectory([component], "?", "no steps").mean == 0.0


def test_a_discount_outside_0_and_1_is_refused():
    for discount in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"discount is .*in \[0, 1\]"):
            trajectory_reward(STEPS, discount)


@settings(deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3))
def test_the_trajectory_reward_stays_in_range_and_scores_alone(texts):
    reward_fn = trajectory_reward(STEPS, 0.9)
    completions = [f"<reasoning>{text}</reasoning>" for text in texts]
    # The column `steps` has the name of one of our parameters, as a data set's column may.
    together = reward_fn(prompts=completions, completions=completions, answer=["72"] * len(texts), steps=texts)
    assert together == [reward_fn([text], [text], answer=["72"])[0] for text in completions]
    assert all(0.0 <= value <= 1.5 for value in together)
