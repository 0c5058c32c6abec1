"""Compare judges of mathematical answers: wrong answers that they accept, right ones that they refuse, and their time.

Run it as `python -m benchmarks.math_judges`. The answers are those of tests/rewards/math_triples.txt. With
`--math_verify`, Hugging Face's math-verify is compared as well, alone and after this library's `math_equal`. The
library does not need math-verify; install it with `pip install math-verify`, in another environment if you like.
"""

import argparse
import importlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tunix_torch.rewards.answers import answers_match
from tunix_torch.rewards.math_answer import read_items
from tunix_torch.rewards.math_equal import math_equal
from tunix_torch.rewards.math_latex import Unreadable, simplify_latex

TRIPLES = Path(__file__).resolve().parent.parent / "tests" / "rewards" / "math_triples.txt"
ARROW, SEPARATOR = " => ", " ;; "

Judge = Callable[[str, str], bool]  # (given answer, expected answer) -> whether they are equal


class Triple(NamedTuple):
    """A given answer, the expected one, and whether the two are equal."""

    given: str
    expected: str
    is_right: bool


def read_triples(path: Path = TRIPLES) -> list[Triple]:
    """Return the triples of a file, whose first lines describe its format."""
    triples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            expected, answers = line[2:].split(ARROW)
            triples += [Triple(given, expected, line[0] == "+") for given in answers.split(SEPARATOR)]
    return triples


def math_verify_judge() -> Judge:
    """Return math-verify as a judge, with its settings for LaTeX and plain expressions.

    An answer without delimiters gets dollar signs, since math-verify would not read it otherwise.
    """
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    library = importlib.import_module("math_verify")
    targets = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]

    def parse(text: str) -> list:
        is_delimited = any(mark in text for mark in ("$", "\\(", "\\[", "boxed"))
        return library.parse(text if is_delimited else f"${text}$", targets)

    return lambda given, expected: library.verify(parse(expected), parse(given))


def after_ours(judge: Judge) -> Judge:
    """Return a judge that asks `math_equal`, and then `judge` when `math_equal` cannot read one of the two answers."""

    def is_readable(text: str) -> bool:
        try:
            read_items(simplify_latex(text))
        except Unreadable:
            return False
        return True

    def both(given: str, expected: str) -> bool:
        if math_equal(given, expected):
            return True
        return not (is_readable(given) and is_readable(expected)) and judge(given, expected)

    return both


def measure(name: str, judge: Judge, triples: list[Triple]) -> tuple[list[Triple], list[Triple]]:
    """Print a judge's row of the table. Returns the wrong answers that it accepted, and the right ones it refused."""
    judge("\\sqrt{2}", "\\sqrt{3}")  # the first call imports libraries, which is not timed
    paid, refused, seconds = [], [], []
    for triple in triples:
        started = time.perf_counter()
        verdict = judge(triple.given, triple.expected)
        seconds.append(time.perf_counter() - started)
        if verdict != triple.is_right:
            (paid if verdict else refused).append(triple)
    agreement = 1 - (len(paid) + len(refused)) / len(triples)
    middle, worst = sorted(seconds)[len(seconds) // 2], max(seconds)
    print(f"| {name} | {len(paid)} | {len(refused)} | {agreement:.1%} | {1e3 * middle:.2f} | {1e3 * worst:.0f} |")
    return paid, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--math_verify", action="store_true", help="measure math-verify as well; it has to be installed"
    )
    parser.add_argument("--show", action="store_true", help="print the triples on which math_equal is wrong")
    args = parser.parse_args()
    judges: dict[str, Judge] = {"`math_equal`": math_equal, "`correctness` (no mathematics)": answers_match}
    if args.math_verify:
        judges["math-verify"] = math_verify_judge()
        judges["`math_equal`, then math-verify where it can't read"] = after_ours(judges["math-verify"])
    triples = read_triples()
    num_right = sum(triple.is_right for triple in triples)
    print(f"{len(triples)} triples, {num_right} of them right\n")
    print("| judge | wrong answers paid | right ones refused | agreement | median ms | worst ms |")
    print("|---|---|---|---|---|---|")
    mistakes = {name: measure(name, judge, triples) for name, judge in judges.items()}
    if args.show:
        for triple in sum(mistakes["`math_equal`"], []):
            print(triple)


if __name__ == "__main__":
    main()
