"""A row keeps its columns, and its question, answer and completion are found in every shape that is known."""

import datetime
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas
import pytest
import torch

from tunix_torch import rewards
from tunix_torch.data.expected import last_boxed
from tunix_torch.data.rows import (
    NO_ANSWER,
    PREFIX,
    QUESTION,
    WHERE,
    answer_of,
    answer_text,
    columns_of,
    has_column,
    prompt_of,
    with_answer,
)
from tunix_torch.data.shapes import completion_of, normalize_row

ARC = {
    "question": "Which is a metal?",
    "choices": {"text": ["iron", "salt"], "label": ["A", "B"]},
    "answerKey": "A",
}
ARC_IN_ROWS = {**ARC, "choices": [{"text": "iron", "label": "1"}, {"text": "salt", "label": "2"}], "answerKey": "2"}
MATH = {"problem": "Half of 1?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"}
MMLU = {"question": "2 + 2?", "subject": "arithmetic", "choices": ["3", "4", "5", "6"], "answer": 1}
ASKED = [{"role": "user", "content": "1 + 1?"}]


def normal(row, **settings):
    return normalize_row(row, 1, "file", **settings)


def no_answer(row):
    """Return why the row has no expected answer, after checking that it offers none to reward functions."""
    row = normal(row)
    assert not has_column(row, "answer") and answer_text(row) == ""
    return row[NO_ANSWER]


# ---- the data's own columns ----


def test_no_column_is_ever_replaced_and_twice_is_as_once(subtests):
    for row in [
        {"prompt": "1 + 1?", "question": "another", "answer": 72, "answers": ["x"], "expected_answers": {"a": 1}},
        {"question": "q", "answer": "so\n#### 7", "prompt_ids": [1], "completion_ids": [2], "completion": None},
        {"prompt": ASKED, "answer": {"value": 7}, "level": None},
        {"question": "q", "answers": ["7", "8"], "solution": 3},
        ARC,
        MATH,
        MMLU,
    ]:
        with subtests.test(row=row):
            once = normal(row)
            assert {name: value for name, value in once.items() if not name.startswith(PREFIX)} == row
            assert normalize_row(once, 2, "elsewhere") == once


def test_columns_by_any_of_their_names(subtests):
    for question in ("question", "prompt"):
        for column in ("answer", "answers", "expected_answers"):
            with subtests.test(column=column, question=question):
                row = normal({question: "1 + 1?", column: 2, "level": "easy"})
                assert (row[QUESTION], answer_of(row), row["level"]) == ("1 + 1?", 2, "easy")
                columns = columns_of([row], copies=2)
                names = {question, "question", "answer", "answers", "expected_answers", "level"}
                assert columns.keys() == names and columns["expected_answers"] == columns["answer"] == [2, 2]
                assert columns["question"] == ["1 + 1?"] * 2


def test_rewards_get_each_column_of_several_that_say_the_same():
    data = {"prompt": "1 + 1?", "question": "more", "answer": "2", "answers": ["two", "2"], "expected_answers": 3}
    assert columns_of([normal(data)]) == {name: [value] for name, value in data.items()}


def test_a_row_without_a_column_that_another_has_gives_none_and_answers_are_added_where_there_are_some():
    rows = [normal({"question": "a"}), normal({"question": "b", "answers": [7], "level": 3})]
    columns = columns_of(rows, 2)
    assert columns["level"] == [None, None, 3, 3] and columns["answer"] == [None, None, 7, 7]
    assert columns["answers"] == [None, None, [7], [7]] and columns["expected_answers"] == [None, None, 7, 7]
    assert columns_of(rows[:1]) == {"question": ["a"]}


def test_a_row_can_be_judged_by_another_answer(subtests):
    for row in ({"answer": "so\n#### 7"}, {"answer": 7, "answers": [7]}, {"expected_answers": 7}, {}):
        with subtests.test(row=row):
            other = with_answer(normal({"question": "q", **row}), "8")
            assert has_column(other, "answer") and answer_text(other) == "8"
            assert {tuple(columns_of([other])[name]) for name in ("answer", "answers", "expected_answers")} == {("8",)}


# ---- the question ----


def test_a_question_that_is_none_is_named_with_its_row(subtests):
    for row, message in [
        (
            {"answer": "1", "text": "q"},
            "row 1: no question; expected a column named prompt or question; it has answer, t",
        ),
        ({"messages": ASKED}, "no question.*put the messages before the answer into prompt"),
        ({"question": " \n\u3000"}, "row 1: the question is blank"),
        ({"prompt": 7}, "row 1: the question is a int, expected a text or a list of messages"),
        ({"prompt": float("nan")}, "row 1: the question is a float"),
        ({"question": "half \ud83d"}, r"row 1: the question has '\\ud83d' at character 6"),
        ({"prompt": []}, "row 1: the question is an empty list"),
        ({"prompt": ["1 + 1?"]}, "message 1 of the question is a str"),
        (
            {"prompt": [*ASKED, {"role": "robot", "content": "x"}]},
            "message 2 .* has the role 'robot'; known are system",
        ),
        ({"prompt": [{"role": "user", "content": None}]}, "message 1 .* has no text: its content is a NoneType"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "message 1 .* no text: its content is a list"),
        ({"prompt": [{"role": "user", "content": " "}]}, "message 1 of the question is blank"),
        ({"prompt": [{"role": "user", "content": "\udc00"}]}, r"row 1: message 1 of the question has '\\udc00'"),
        ({"prompt": [*ASKED, {"role": "assistant", "content": "x"}]}, "the last message .* is the assistant's"),
    ]:
        with subtests.test(row=row, message=message):
            with pytest.raises(ValueError, match=message):
                normal(row)


def test_messages_are_questions_and_rewards_get_them_as_they_are(subtests):
    for kind in (list, tuple, np.array):
        for name in ("prompt", "question", "query"):
            with subtests.test(name=name, kind=kind):
                messages = [{"role": "system", "content": "Be brief."}, *ASKED]
                row = normal({name: kind(messages)}, question_column=name if name == "query" else None)
                assert row[QUESTION] == "1 + 1?" and prompt_of(row) == messages


# ---- the answer ----


def test_the_expected_answer_has_the_value_and_type_of_the_data(subtests):
    for answer in (
        72,
        0,
        0.1,
        -1.5,
        True,
        "72",
        " 72 ",
        "1/2",
        np.float32(0.1),
        np.int64(7),
        Decimal("1.50"),
        Fraction(1, 3),
    ):
        with subtests.test(answer=answer):
            row = normal({"question": "q", "answer": answer})
            assert answer_of(row) == answer and type(answer_of(row)) is type(answer)
            assert answer_text(row) == str(answer).strip()
            assert rewards.correctness_reward(["?"], ["<answer>-7</answer>"], answer=[answer_of(row)]) == [0.0]


DAY, MOMENT = datetime.date(2024, 5, 6), datetime.datetime(2024, 5, 6, 12, 30)


def test_a_date_or_time_is_its_iso_text(subtests):
    """Regression: rows with dates were accepted, but reward functions refused the dates after the first rollout."""
    for column in ("answer", "answers"):
        for answer, text in [
            (DAY, "2024-05-06"),
            (MOMENT, "2024-05-06T12:30:00"),
            (datetime.time(12, 30), "12:30:00"),
            (pandas.Timestamp(MOMENT, tz="UTC"), "2024-05-06T12:30:00+00:00"),
            (np.datetime64(DAY), "2024-05-06"),
            (np.datetime64("2024-05"), "2024-05"),
            (np.datetime64(MOMENT, "ns"), "2024-05-06T12:30:00"),
            (np.datetime64("2024-05-06T12:30:00.250", "ns"), "2024-05-06T12:30:00.25"),
            (np.array(["2024-05-06"], dtype="datetime64[D]"), "2024-05-06"),
            (np.bool_(True), True),
        ]:
            with subtests.test(answer=answer, text=text, column=column):
                row = normal({"question": "q", column: answer})
                assert answer_of(row) == columns_of([row])["answer"][0] == text and type(answer_of(row)) is type(text)
                right = [f"<answer>{text}</answer>"]
                for reward in (rewards.correctness_reward, rewards.math_equal_reward, rewards.check_answer):
                    assert reward(["?"], right, answer=[answer_of(row)])[0] >= 1
                assert completion_of(row).endswith(f"<answer>{text}</answer>")


def test_a_list_of_one_answer_is_that_answer(subtests):
    for answer, expected in [
        (["7"], "7"),
        ([7], 7),
        ((0.5,), 0.5),
        (np.array([0.1], dtype=np.float32), 0.1),
        (np.array([7]), 7),
        (torch.tensor(7), 7),
        (torch.tensor([7]), 7),
    ]:
        with subtests.test(answer=answer, expected=expected):
            for column in ("answer", "answers"):
                found = answer_of(normal({"question": "q", column: answer}))
                assert found == expected and str(found) == str(expected)


def test_a_row_without_an_answer_is_taken_and_remembers_why(subtests):
    for row, why in [
        ({}, "no answer; expected a column named answer, answers, expected_answers"),
        ({"answer": None}, "no answer"),
        ({"answer": " "}, "no answer"),
        ({"answer": "48 + 24 = 72 ####"}, "no answer"),
        ({"answer": {"value": 7}}, "the answer is a dict, expected a text or a number"),
        ({"answer": b"7"}, "the answer is a bytes"),
        ({"answer": np.bytes_(b"7")}, "the answer is a bytes"),
        ({"answer": float("nan")}, "the answer is nan, which is no finite number"),
        ({"answer": np.float32("nan")}, "the answer is nan"),
        ({"answer": float("inf")}, "the answer is inf, which is no finite number"),
        ({"answer": np.float32("-inf")}, "the answer is -inf"),
        ({"answer": Decimal("Infinity")}, "the answer is Infinity"),
        ({"answer": Decimal("sNaN")}, "NaN"),
        ({"answer": 1j}, "the answer is a complex, expected a text or a number"),
        ({"answer": np.complex64(1)}, "the answer is a complex64"),
        ({"answer": datetime.timedelta(1)}, "the answer is a timedelta"),
        ({"answer": np.timedelta64(1, "D")}, "the answer is a timedelta64"),
        ({"answer": pandas.NaT}, "the answer is NaT, which is no date"),
        ({"answer": np.datetime64("NaT")}, "the answer is NaT"),
        ({"answers": ["7", "8"]}, "2 answers; expected one"),
        ({"answers": []}, "0 answers; expected one"),
        ({"answers": [float("nan")]}, "the answer is nan"),
        ({"answer": "\ud800"}, r"the text has '\ud800'"),
        ({"choices": ["3", "4"], "answer": 2}, "answer 2 is none of the choices A, B"),
        ({"choices": ["3", "4"], "answer": -1}, "answer -1 is none of the choices A, B"),
    ]:
        with subtests.test(row=row, why=why):
            assert why in no_answer({"question": "q", **row})
            assert normal({"question": "q", **row})[WHERE] == "file, row 1"


def test_gsm8k_answers_are_cut_at_their_mark_and_prose_is_not(subtests):
    for text, final, reasoning in [
        ("48/2 = 24 clips.\n48+24 = 72.\n#### 72", "72", "48/2 = 24 clips.\n48+24 = 72."),
        ("48+24 = 72. #### 72\n", "72", "48+24 = 72."),
        ("#### -$1,234.50", "-$1,234.50", ""),
        ("48/2 = 24. #### 72", "72", "48/2 = 24."),
        ("2 - 5 #### \u22123", "\u22123", "2 - 5"),
        ("Is it? (yes) #### 1/2", "1/2", "Is it? (yes)"),
        ("<<2*3=6>> #### .5%", ".5%", "<<2*3=6>>"),
        ("So: = #### $1,234.50", "$1,234.50", "So: ="),
        ("# Sum\nIt is 5.\n#### 5", "5", "# Sum\nIt is 5."),
        ("so\n  #### x + 1", "x + 1", "so"),
        ("a #### b. #### 3", "3", "a #### b."),
        ("a #### b #### 3", "a #### b #### 3", ""),
        ("Write #### 5", "Write #### 5", ""),
        ("It is 5. #### about 5", "It is 5. #### about 5", ""),
        ("It is 5.#### 5", "It is 5.#### 5", ""),
        ("# Title\n#### Heading", "# Title\n#### Heading", ""),
        ("## Title\ntext\n#### x", "## Title\ntext\n#### x", ""),
        ("text\n##### 5", "text\n##### 5", ""),
        ("#1 is first\n#### 5", "5", "#1 is first"),
        ("Write #### before the heading", "Write #### before the heading", ""),
        ("#### 72\nThe end.", "#### 72\nThe end.", ""),
        ("A ###### heading, or #### 5 times", "A ###### heading, or #### 5 times", ""),
    ]:
        with subtests.test(text=text, final=final, reasoning=reasoning):
            row = normal({"question": "q", "answer": text})
            assert answer_of(row) == final
            assert completion_of(row) == f"<reasoning>{reasoning}</reasoning>\n<answer>{final}</answer>"


def test_answer_is_what_the_last_box_holds(subtests):
    for text, answer in [
        (r"so \boxed{72}.", "72"),
        (r"\boxed{1} and then $\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{\left\{ x : x > 0 \right\}}", r"\left\{ x : x > 0 \right\}"),
        (r"\boxed{a \left\{ b}", r"a \left\{ b"),
        (r"$\boxed {5}$", "5"),
        (r"so $\boxed 2$ it is", "2"),
        (r"\fbox{3}", "3"),
        (r"no box", None),
        (r"\boxed{never closed", None),
    ]:
        with subtests.test(text=text, answer=answer):
            assert last_boxed(text) == answer


def test_math_rows_have_their_problem_and_what_the_solution_boxes():
    row = normal(MATH)
    assert (row[QUESTION], answer_of(row)) == ("Half of 1?", r"\frac{1}{2}")
    assert completion_of(row) == rf"<reasoning>{MATH['solution']}</reasoning>" + "\n" + r"<answer>\frac{1}{2}</answer>"
    assert answer_of(normal({**MATH, "answer": "0.5"})) == "0.5"
    assert r"or \boxed{...} in the solution" in no_answer({**MATH, "solution": "It is clear."})


def test_choices_stand_below_the_question_and_the_answer_is_a_label(subtests):
    for row, asked, answer in [
        (ARC, "A. iron\nB. salt", "A"),
        (ARC_IN_ROWS, "1. iron\n2. salt", "2"),
        (MMLU, "A. 3\nB. 4\nC. 5\nD. 6", "B"),
        ({**MMLU, "answer": "D"}, "A. 3\nB. 4\nC. 5\nD. 6", "D"),  # the name of a ClassLabel
        ({**MMLU, "answer": "6"}, "A. 3\nB. 4\nC. 5\nD. 6", "D"),
        ({"question": "?", "options": np.array(["x", "y"]), "answer": "B"}, "A. x\nB. y", "B"),  # MMLU-Pro
        ({"question": "?", "options": {"A": "x", "B": "y", "C": None}, "answer": "y"}, "A. x\nB. y", "B"),  # MedQA
        ({"question": "?", "choices": ("x", "y"), "answer": 1}, "A. x\nB. y", "B"),
        ({"question": "?", "choices": '["x", "y"]', "answer": "B"}, "A. x\nB. y", "B"),  # as a CSV file holds a list
        ({"question": "?", "A": "x", "B": "y", "C": "z", "answer": "C"}, "A. x\nB. y\nC. z", "C"),
        ({"question": "?", "A": "x", "B": "y", "D": "z", "answer": 1}, "A. x\nB. y", "B"),
        ({"question": "?", "A": 3, "B": 4.5, "answer": " B "}, "A. 3\nB. 4.5", "B"),
    ]:
        with subtests.test(row=row, asked=asked, answer=answer):
            found = normal(row)
            assert found[QUESTION] == f"{row['question']}\n{asked}" and answer_of(found) == answer
            assert columns_of([found])["question"] == [row["question"]] and columns_of([found])["answer"] == [answer]


def test_choices_that_can_not_be_shown_are_refused_or_left_alone():
    assert "answerKey 'E' is none of the choices A, B" in no_answer({**ARC, "answerKey": "E"})
    for choices, message in ((["a"] * 27, "up to 26 choices"), ([{"a": 1}, "b"], "choices that are texts")):
        with pytest.raises(ValueError, match=f"row 1: .*{message}"):
            normal({**MMLU, "choices": choices})
    with pytest.raises(ValueError, match="row 1: 2 choices with 1 labels"):
        normal({**ARC, "choices": {"text": ["iron", "salt"], "label": ["A"]}})
    for choices in ("['3' '4']", "{3, 4}"):
        with pytest.raises(ValueError, match="row 1: choices=.*: a text, expected a list, or one in JSON"):
            normal({**MMLU, "choices": choices})
    for row in ({"choices": {"first": 3, "second": 4}}, {"options": "3 or 4"}):
        with pytest.raises(ValueError, match="row 1: the answer is a letter, and .* are no list of choices"):
            normal({"prompt": "2 + 2?", "answer": "B", **row})


def test_choices_are_shown_once_where_the_answer_names_one(subtests):
    """Regression: choices beside a prompt were left out, so the model was asked for the letter of one it can't see."""
    for row, question, answer in [
        ({"prompt": "2 + 2?", "choices": ["3", "4"], "answer": 1}, "2 + 2?\nA. 3\nB. 4", "B"),
        ({"prompt": "2 + 2?", "choices": ["3", "4"], "answer": "B"}, "2 + 2?\nA. 3\nB. 4", "B"),
        ({"prompt": "2 + 2?", "A": "3", "B": "4", "answer": "B"}, "2 + 2?\nA. 3\nB. 4", "B"),
        ({"prompt": "2 + 2?\nA. 3\nB. 4", "choices": ["3", "4"], "answer": "B"}, "2 + 2?\nA. 3\nB. 4", "B"),
        ({"prompt": "2 + 2? (A) 3 (B) 4", "choices": ["3", "4"], "answer": 1}, "2 + 2? (A) 3 (B) 4", "B"),
        ({"question": "2 + 2? A: 3, B: 4", "choices": [3, 4], "answer": "B"}, "2 + 2? A: 3, B: 4", "B"),
        ({"prompt": "a) 3 b) 4", "choices": ["A", "B"], "answer": 1}, "a) 3 b) 4", "B"),
        ({"prompt": "3 or 4?", "choices": ["3", "4"], "answer": "4"}, "3 or 4?", "4"),
        ({"prompt": "2 + 2?", "choices": [3, 4], "answer": 4}, "2 + 2?", 4),
        # These choices are those of a chat API, and not answers to choose from.
        ({"prompt": "2 + 2?", "choices": [{"message": "4"}, {}], "answer": 4}, "2 + 2?", 4),
        ({"question": "A + B?", "A": 3, "B": 4, "answer": 7}, "A + B?", 7),
        ({"question": "A - B?", "A": 4, "B": 3, "answer": 1}, "A - B?", 1),
    ]:
        with subtests.test(row=row, question=question, answer=answer):
            assert (normal(row)[QUESTION], answer_of(normal(row))) == (question, answer)


def test_choices_stand_below_a_question_in_a_column_that_the_user_names():
    row = {"stem": "2 + 2?", "choices": ["3", "4"], "key": "4", "prompt": "?"}
    row = normal(row, question_column="stem", answer_column="key")
    assert (row[QUESTION], answer_of(row)) == ("2 + 2?\nA. 3\nB. 4", "B")


@pytest.mark.parametrize("column", ["prompt", "question"])
def test_messages_must_show_the_choices_that_the_answer_names(column):
    row = {column: ASKED, "choices": ["3", "2"], "answer": 1}
    assert "the messages don't show 'A. ...'" in no_answer(row)
    shown = [{"role": "user", "content": "1 + 1? A) 3 B) 2"}]
    assert answer_of(normal({**row, column: shown})) == "B" and prompt_of(normal({**row, column: shown})) == shown
    assert answer_of(normal({**row, "answer": "2"})) == "2"


def test_named_columns_decide_what_is_asked_and_expected_and_all_stay():
    data = {"prompt": 17, "query": "1 + 1?", "response": "so\n#### 2", "answer": "no", "answers": "never"}
    row = normal(data, question_column="query", answer_column="response")
    assert (row[QUESTION], answer_of(row)) == ("1 + 1?", "2")
    seen = {**data, "question": "1 + 1?", "answer": "2", "expected_answers": "2"}
    assert columns_of([row]) == {name: [value] for name, value in seen.items()}
    with pytest.raises(ValueError, match="answer_column='reply': not in file, row 1, which has prompt, query"):
        normal(data, answer_column="reply")


# ---- completions for supervised fine-tuning ----


def test_completions_are_the_datas_own_or_made_of_reasoning_and_answer(subtests):
    for row, completion in [
        ({"completion": "So 2.", "answer": 2}, "So 2."),
        ({"completion": [{"role": "assistant", "content": "So 2."}]}, "So 2."),
        ({"answer": 2}, "<reasoning></reasoning>\n<answer>2</answer>"),
        ({"answer": np.float32(0.1), "reasoning": " r "}, "<reasoning>r</reasoning>\n<answer>0.1</answer>"),
    ]:
        with subtests.test(row=row, completion=completion):
            assert completion_of(normal({"question": "1 + 1?", **row})) == completion


def test_a_row_without_a_completion_is_named(subtests):
    for row, message in [
        ({}, "row 1: no completion to learn from, and none can be made: no answer"),
        ({"answers": ["1", "2"]}, "none can be made: 2 answers"),
        ({"completion": None, "answer": 2}, "row 1: the completion is a NoneType"),
        ({"completion": []}, "row 1: the completion is a list, expected a text or one message of the assistant"),
        ({"completion": ASKED}, "row 1: the completion is a list"),
        ({"completion": ASKED * 2}, "row 1: the completion is a list"),
        ({"completion": "\udfff"}, r"row 1: the completion has '\\udfff'"),
    ]:
        with subtests.test(row=row, message=message):
            with pytest.raises(ValueError, match=message):
                completion_of(normal({"question": "q", **row}))
