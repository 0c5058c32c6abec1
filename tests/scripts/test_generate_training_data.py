"""generate_training_data.py writes what it promises, refuses mistakes, and its answers are worked out a second time."""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest

import generate_training_data as script
from training_data import DIFFICULTIES, TEMPLATES, Question, common_sense_questions
from training_data.code_questions import run as run_traced
from tunix_torch.data.readers import load_rows
from tunix_torch.data.rows import QUESTION, answer_of
from tunix_torch.data.shapes import completion_of, normalize_row
from tunix_torch.rewards import answers_match, extract_answer, extract_reasoning, format_reward
from tunix_torch.rewards.reasoning_coherence_reward import _judge_equations

ROOT = Path(__file__).parent.parent.parent
TYPES = ["math", "logic", "science", "common_sense", "code"]
COLUMNS = ["question", "answer", "type", "difficulty"]


def run(*args, cwd, **environment):
    command = [sys.executable, str(ROOT / "generate_training_data.py"), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def refused(result, *words):
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words), line


def normal(question):
    return re.sub(r"\s+", " ", question.strip()).lower()


@pytest.fixture(scope="module")
def rows():
    return script.generate(6000, 42, TYPES, DIFFICULTIES)[0]


# ---- the script, end to end ----


def test_json_is_what_the_library_loads_and_statistics_are_printed(tmp_path):
    command = "--count 90 --output reasoning_training_data.json --seed 42".split()
    result = run(*command, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    rows = load_rows(str(tmp_path / "reasoning_training_data.json"))
    assert [list(row) for row in rows] == [COLUMNS] * 90
    for number, row in enumerate(rows, start=1):
        normal_row = normalize_row(row, number, "file")
        assert (normal_row[QUESTION], answer_of(normal_row)) == (row["question"], row["answer"])
    assert re.search(r"^math +6 +6 +6 +18$", result.stdout, re.MULTILINE)
    assert re.search(r"^all +30 +30 +30 +90$", result.stdout, re.MULTILINE)
    mean = sum(len(row["question"]) for row in rows) / 90
    assert f"mean question length: {mean:.1f} characters" in result.stdout
    assert "duplicates skipped: " in result.stdout
    assert os.listdir(tmp_path) == ["reasoning_training_data.json"]


def test_jsonl_with_reasoning_makes_demonstrations_for_sft(tmp_path):
    result = run("--count", 45, "--output", "d.jsonl", "--with_reasoning", "--types", "code, math", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "d.jsonl").read_text().splitlines()) == 45
    rows = load_rows(str(tmp_path / "d.jsonl"))
    assert {row["type"] for row in rows} == {"code", "math"}
    for number, row in enumerate(rows, start=1):
        assert list(row) == [*COLUMNS, "reasoning"]
        completion = completion_of(normalize_row(row, number, "file"))
        assert format_reward([""], [completion]) == [1.0]
        assert extract_reasoning(completion) == row["reasoning"] and extract_answer(completion) == row["answer"]


@pytest.mark.parametrize("style", ["json", "jsonl"])
def test_split_shares_no_question_and_each_part_has_equal_shares(tmp_path, style):
    result = run("--count", 300, "--format", style, "--val_fraction", 0.1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    train, validation = (
        load_rows(str(tmp_path / f"reasoning_training_data{name}.{style}")) for name in ("", "_val")
    )  # fmt: skip
    assert (len(train), len(validation)) == (270, 30)
    questions = [normal(row["question"]) for row in train + validation]
    assert len(set(questions)) == 300
    for part, share in ((train, 18), (validation, 2)):
        assert set(Counter((row["type"], row["difficulty"]) for row in part).values()) == {share}


def test_same_seed_same_bytes_whatever_the_hash_seed_and_other_seeds_differ(tmp_path):
    for name, seed, hash_seed in (("a", 7, "1"), ("b", 7, "2"), ("c", 8, "1"), ("d", -7, "1")):
        args = ("--count", 150, "--seed", seed, "--with_reasoning", "--val_fraction", 0.2, "--output", f"{name}.json")
        assert run(*args, cwd=tmp_path, PYTHONHASHSEED=hash_seed).returncode == 0
    a, b, c, d = ((tmp_path / f"{name}.json").read_bytes() for name in "abcd")
    assert a == b and len({a, c, d}) == 3
    assert (tmp_path / "a_val.json").read_bytes() == (tmp_path / "b_val.json").read_bytes()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--count", "0"], ["count=0", "at least 1"]),
        (["--count", "many"], ["--count", "many"]),
        (["--types", "math,logik"], ["types=", "'logik'", "did you mean 'logic'"]),
        (["--types", ""], ["types=''", "at least one"]),
        (["--difficulty", "easy,easy"], ["difficulty='easy,easy'", "at most once"]),
        (["--format", "csv"], ["--format", "csv"]),
        (["--format", "json", "--output", "rows.jsonl"], ["output='rows.jsonl'", ".json", "--format jsonl"]),
        (["--format", "jsonl", "--output", "rows.csv"], ["output='rows.csv'", "an object a line", ".jsonl"]),
        (["--output", "rows.csv"], ["output='rows.csv'", ".json"]),
        (["--val_fraction", "1"], ["val_fraction=1.0", "[0, 1)"]),
        (["--val_fraction", "nan"], ["val_fraction=nan", "[0, 1)"]),
        (["--count", "3", "--val_fraction", "0.1"], ["val_fraction=0.1", "0 of 3 rows"]),
        (["--output", "nowhere/rows.json"], ["output='nowhere/rows.json'", "folder does not exist"]),
        (["--seeds", "1"], ["--seeds"]),
    ],
)
def test_wrong_flags_are_refused_in_one_line_and_nothing_is_written(tmp_path, args, words):
    refused(run(*args, cwd=tmp_path), *words)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("existing", ["rows.json", "rows_val.json"])
def test_existing_files_are_never_overwritten(tmp_path, existing):
    (tmp_path / existing).write_text("mine")
    args = ("--count", 30, "--output", "rows.json", "--val_fraction", 0.2)
    refused(run(*args, cwd=tmp_path), repr(existing), "exists already")
    assert os.listdir(tmp_path) == [existing] and (tmp_path / existing).read_text() == "mine"


def test_script_starts_without_torch():
    code = (
        "import sys, generate_training_data; print([n for n in ('torch', 'transformers', 'numpy') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# ---- rows ----


def test_no_question_twice_and_no_problem_twice_in_other_words():
    def greets(rng):
        name, number = rng.choice(["Ann", "Bob"]), rng.randrange(5)
        return Question(f"{name}  asks: {number}?", str(number), [], (number,))

    def shouts(rng):
        return rng.choice([Question("ONE   two", "3", []), Question("one two", "3", [])])

    templates = {"math": {"easy": [greets, shouts]}}
    rows, num_skipped = script.generate(6, 0, ["math"], ["easy"], templates)
    assert len({row["answer"] for row in rows if "asks" in row["question"]}) == 5
    assert sum(normal(row["question"]) == "one two" for row in rows) == 1
    assert num_skipped >= script.MAX_MISSES
    with pytest.raises(ValueError, match=r"count=7: .*type math, difficulty easy.* 6 different.* at most 6 rows"):
        script.generate(7, 0, ["math"], ["easy"], templates)


def test_types_and_difficulties_have_equal_shares_and_no_question_is_there_twice(rows):
    counts = Counter((row["type"], row["difficulty"]) for row in rows)
    assert counts == {(kind, difficulty): 400 for kind in TYPES for difficulty in ("easy", "medium", "hard")}
    assert len({normal(row["question"]) for row in rows}) == len(rows)


def test_each_type_and_difficulty_has_several_templates_and_enough_different_questions():
    assert list(TEMPLATES) == TYPES
    for kind in TYPES:
        for difficulty in DIFFICULTIES:
            assert len(TEMPLATES[kind][difficulty]) >= 3
            rows, _ = script.generate(2000, 1, [kind], [difficulty])
            commonest = Counter(row["answer"] for row in rows).most_common(1)[0][1]
            assert commonest < 500, f"{kind}, {difficulty}: one answer is right too often"


@pytest.mark.parametrize("template", [t for levels in TEMPLATES.values() for ts in levels.values() for t in ts])
def test_a_template_is_a_function_of_its_generator_alone(template):
    first = [template(random.Random(i)) for i in range(20)]
    assert first == [template(random.Random(i)) for i in range(20)]
    assert len({question.text for question in first}) > 10


def test_reasoning_is_true_and_ends_in_the_answer(rows):
    num_equations = 0
    for row in rows:
        assert row["reasoning"].splitlines()[-1] == f"So the answer is {row['answer']}."
        assert len(row["reasoning"].splitlines()) >= 2
        verdicts = _judge_equations(row["reasoning"])
        assert all(verdicts), row
        num_equations += len(verdicts)
    assert num_equations > len(rows)


def test_answers_are_short_texts_that_rewards_can_compare(rows):
    for row in rows:
        assert isinstance(row["answer"], str) and row["answer"] == row["answer"].strip() != ""
        assert answers_match(row["answer"], row["answer"]) and "####" not in row["answer"]
        assert not answers_match(row["answer"] + "1", row["answer"])


# ---- answers, worked out again from the words of the question ----


def answered(rows, kind, pattern, at_least=40):
    """Return (groups, answer) of each question that the pattern fits; there must be some, all of this type."""
    found = [(match, row["answer"]) for row in rows if (match := re.fullmatch(pattern, row["question"], re.DOTALL))]
    assert len(found) >= at_least and all(row["type"] == kind for row in rows if re.fullmatch(pattern, row["question"]))
    return [([int(g) if g.isdigit() else g for g in match.groups()], answer) for match, answer in found]


def test_math_percentages(rows):
    for (percent, base), answer in answered(rows, "math", r"What is (\d+)% of (\d+)\?"):
        assert Fraction(answer) == Fraction(percent, 100) * base


def test_math_equations_hold_with_the_answer_put_in(rows):
    found = answered(rows, "math", r"Solve for x: (\S+) ([+-]) (\d+) = (-?\d+)x ([+-]) (\d+)\.")
    for (left, sign, b, c, other_sign, d), answer in found:
        a, x = int(left.removesuffix("x")), int(answer)
        assert a * x + int(f"{sign}{b}") == c * x + int(f"{other_sign}{d}")


def test_math_tickets_by_trying_every_number(rows):
    pattern = (
        r".* adult tickets at \$(\d+) and child tickets at \$(\d+)\. .* sells (\d+) tickets for \$(\d+) in total.*"
    )
    for (adult, child, num, total), answer in answered(rows, "math", pattern):
        assert [n for n in range(num + 1) if n * adult + (num - n) * child == total] == [int(answer)]


def test_logic_race_has_one_solution(rows):
    for (people, clues, place), answer in answered(
        rows, "logic", r"(.*) ran a race without ties\. (.*)\. Who .* (\d).*"
    ):
        people, fitting = re.split(", | and ", people), []
        for order in permutations(people):
            at = {name: i for i, name in enumerate(order)}
            checks = []
            for clue in clues.split(". "):
                a, relation, b = re.fullmatch(r"(\w+) finished (before|after|directly after) (\w+)", clue).groups()
                difference = at[a] - at[b]
                checks.append(
                    {"before": difference < 0, "after": difference > 0, "directly after": difference == 1}[relation]
                )
            if all(checks):
                fitting.append(order)
        assert len(fitting) == 1 and fitting[0][place - 1] == answer


def test_logic_knights_and_knaves_have_one_solution(rows):
    def is_true(words, me, knights, people):
        if match := re.fullmatch(r"exactly 1 of us \d is a (knight|knave)", words):
            return 1 == sum((name in knights) == (match[1] == "knight") for name in people)
        (other,) = (name for name in people if name != me and name in words)
        both = {me, other} & knights
        return {
            f"{other} is a knight": other in knights,
            f"{other} is a knave": other not in knights,
            f"{other} and I are of the same kind": len(both) != 1,
            f"{other} and I are of different kinds": len(both) == 1,
            f"at least one of {other} and me is a knave": len(both) < 2,
            f"{other} and I are both knaves": not both,
        }[words]

    for (_, speeches), answer in answered(rows, "logic", r"On an island .* You meet (.*?)\. (.*) Who are the .*"):
        said = dict(re.findall(r'(\w+) says: "([^"]*)\."', speeches))
        people, solutions = list(said), []
        for flags in product((True, False), repeat=len(people)):
            knights = {name for name, flag in zip(people, flags, strict=True) if flag}
            if all(is_true(words, name, knights, people) == (name in knights) for name, words in said.items()):
                solutions.append(", ".join(sorted(knights)) or "none")
        assert solutions == [answer]


def test_logic_syllogisms_by_every_choice_of_members(rows):
    sets = [frozenset(i for i in range(3) if bits >> i & 1) for bits in range(1, 8)]

    def is_true(words, members):
        form, a, negation, b = re.fullmatch(r"(All|No|Some) (\w+)s are (not )?(\w+)s", words).groups()
        a, b = members[a], members[b]
        return {"All": a <= b, "No": not a & b, "Some": bool(a - b if negation else a & b)}[form]

    pattern = r"There is at least one (\w+), one (\w+) and one (\w+)\. ([^.]*)\. ([^.]*)\. Is it true that \"(.*)\"\?.*"
    for (*kinds, first, second, last), answer in answered(rows, "logic", pattern):
        worlds = [dict(zip(kinds, members, strict=True)) for members in product(sets, repeat=3)]
        seen = {is_true(last, world) for world in worlds if is_true(first, world) and is_true(second, world)}
        assert answer == {(True,): "yes", (False,): "no"}.get(tuple(seen), "unknown")


def test_science_speed_resistance_and_energy(rows):
    for (_, speed, seconds), answer in answered(rows, "science", r"A (\w+) goes at (\d+) km/h\..* in (\d+) seconds\?"):
        assert Fraction(answer) * 36 == speed * 10 * seconds
    for (mass, slow, fast), answer in answered(rows, "science", r"A cart of (\d+) kg .* from (\d+) m/s to (\d+) m/s.*"):
        assert 2 * int(answer) == mass * (fast**2 - slow**2)
    pattern = r"A current of (\d+) mA .* resistor of (\d+) ohms.*voltage.*"
    for (milliamperes, ohms), answer in answered(rows, "science", pattern, at_least=20):
        assert Fraction(answer) * 1000 == milliamperes * ohms


def test_common_sense_dates_and_clocks(rows):
    def read(text):
        return datetime.strptime(text, "%d %B %Y")

    for (start, end), answer in answered(rows, "common_sense", r"How many days are there from (.*) to (.*)\?"):
        assert int(answer) == (read(end) - read(start)).days
    pattern = r"(\d+ \w+ \d+) is a (\w+)\. What day of the week is (.*)\?"
    for (start, weekday, end), answer in answered(rows, "common_sense", pattern):
        assert (f"{read(start):%A}", f"{read(end):%A}") == (weekday, answer)
    pattern = r".* starts at (\d\d):(\d\d) and takes (\d+) minutes\..*"
    for (hour, minute, minutes), answer in answered(rows, "common_sense", pattern):
        end = hour * 60 + minute + minutes
        assert answer == f"{end // 60:02}:{end % 60:02}"


def test_common_sense_largest_coins_first_is_best_for_every_amount_that_is_asked():
    for coins in common_sense_questions.COINS:
        for cents, fewest in enumerate(common_sense_questions._fewest(coins)):
            rest, num = cents, 0
            for coin in coins:
                num, rest = num + rest // coin, rest % coin
            assert num == fewest and rest == 0


def test_code_returns_what_the_shown_text_returns(rows):
    for (call, source), answer in answered(rows, "code", r"What does `(.*?)` return.*```python\n(.*)\n```", 1200):
        scope = {}
        exec(source, scope)
        assert str(eval(call, scope)) == answer


def test_trace_of_code_shows_each_round_and_leaves_the_debugger_as_it_was():
    before = sys.gettrace()
    source = "def f(word):\n    n = 0\n    for c in word:\n        if c == 'o':\n            n += 1\n    return n"
    result, steps = run_traced(source, ("oox",))
    assert result == 2 and sys.gettrace() is before
    assert steps == [
        "First, the call is f('oox'), so word = 'oox'.",
        "Then n = 0.",
        "Then c = 'o', n = 1.",
        "Then c = 'o', n = 2.",
        "Then c = 'x'.",
        "Finally `return n` returns 2.",
    ]
    with pytest.raises(NameError):
        run_traced("def f():\n    return open('file')", ())
