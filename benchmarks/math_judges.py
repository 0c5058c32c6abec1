"""What judges of mathematical answers say of the triples in tests/rewards: wrong ones paid, right ones refused, time.

`python -m benchmarks.math_judges`. With `--math_verify`, Hugging Face's math-verify too, alone and after ours; it is no
requirement: `pip install math-verify`, in an environment of its own if you like.
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

Judge = Callable[[str, str], bool]  # (given, expected) -> equal?


class Triple(NamedTuple):
    """A given answer, the expected one, and whether the two are equal."""

    given: str
    expected: str
    is_right: bool


def read_triples(path: Path = TRIPLES) -> list[Triple]:
    """The triples of a file, whose first lines say how it is written."""
    triples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            expected, answers = line[2:].split(ARROW)
            triples += [Triple(given, expected, line[0] == "+") for given in answers.split(SEPARATOR)]
    return triples


def math_verify_judge() -> Judge:
    """math-verify with its settings for LaTeX and plain expressions; an answer without delimiters gets dollar signs."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    library = importlib.import_module("math_verify")
    targets = [library.LatexExtractionConfig(boxed_match_priority=0), library.ExprExtractionConfig()]

    def parse(text: str) -> list:
        is_delimited = any(mark in text for mark in ("$", "\\(", "\\[", "boxed"))
        return library.parse(text if is_delimited else f"${text}$", targets)

    return lambda given, expected: library.verify(parse(expected), parse(given))


def after_ours(judge: Judge) -> Judge:
    """Ours, and where it can't read one of the two answers, `judge`."""

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
    """Print a row of the table; give the wrong answers that were paid and the right ones that were refused."""
    judge("\\sqrt{2}", "\\sqrt{3}")  # imports what it needs
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
