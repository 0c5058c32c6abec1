"""Generates questions of several types with computed answers for GRPO, and with reasoning for SFT too.

python generate_training_data.py --count 1000 --output reasoning_training_data.json --seed 42
python generate_training_data.py --types math,code --difficulty easy --with_reasoning --val_fraction 0.1
"""

import argparse
import difflib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

import utils
from training_data import DIFFICULTIES, TEMPLATES, Template

MAX_MISSES = 1000  # after so many duplicates in a row, a template counts as used up
PROGRESS_FROM = 5000  # from so many rows on, a progress bar shows

Row = dict[str, str]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command line, checked and completed by `check_args`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: utils.fail(message)
    parser.add_argument("--count", type=int, default=1000, help="rows, the validation rows among them")
    parser.add_argument("--output", help="file to write (default: reasoning_training_data.json, or .jsonl)")
    parser.add_argument("--seed", type=int, default=42, help="same seed, same file")
    parser.add_argument("--types", default=",".join(TEMPLATES), help="in equal shares (default: %(default)s)")
    parser.add_argument("--difficulty", default=",".join(DIFFICULTIES), help="in equal shares (default: %(default)s)")
    parser.add_argument(
        "--format", choices=["json", "jsonl"], help="a list, or an object a line (default: as --output ends, else json)"
    )
    parser.add_argument("--with_reasoning", action="store_true", help="add a reasoning column: steps to the answer")
    parser.add_argument(
        "--val_fraction", type=float, default=0.0, help="share of the rows that goes to a second file, NAME_val.json"
    )
    return check_args(parser.parse_args(argv))


def check_args(args: argparse.Namespace) -> argparse.Namespace:
    """Check the arguments, and complete them by `num_val` and `val_output`, the size and the file of the second part.

    Raises:
        ValueError: an argument is out of its range, or a file can't be written.
    """
    args.types = choose("types", args.types, list(TEMPLATES))
    args.difficulty = choose("difficulty", args.difficulty, DIFFICULTIES)
    if args.count < 1:
        raise ValueError(f"count={args.count}: must be at least 1")
    if not 0 <= args.val_fraction < 1:
        raise ValueError(f"val_fraction={args.val_fraction}: must be in [0, 1)")
    args.num_val = round(args.count * args.val_fraction)
    if args.val_fraction and not 0 < args.num_val < args.count:
        raise ValueError(
            f"val_fraction={args.val_fraction}: {args.num_val} of {args.count} rows; both files need at least one"
        )
    args.format = args.format or ("jsonl" if args.output and Path(args.output).suffix.lower() == ".jsonl" else "json")
    args.output = Path(args.output or f"reasoning_training_data.{args.format}")
    args.val_output = args.output.with_name(f"{args.output.stem}_val{args.output.suffix}") if args.num_val else None
    # The endings by which `load_rows` recognises the format.
    endings = {"json": (".json",), "jsonl": (".jsonl", ".json")}[args.format]
    if args.output.suffix.lower() not in endings:
        what = "a JSON list has to end in .json; or give --format jsonl and a name in .jsonl"
        what = what if args.format == "json" else "an object a line has to end in .jsonl"
        raise ValueError(f"output={str(args.output)!r}: {what}")
    for path in filter(None, (args.output, args.val_output)):
        check_new_file(path)
    return args


def choose(field: str, text: str, known: Sequence[str]) -> list[str]:
    """The names of a comma-separated list, in the order of `known`.

    Raises:
        ValueError: a name is not known or stands there twice, or there is no name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"{field}={text!r}: {name!r} is unknown; choose among {','.join(known)}{hint}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{field}={text!r}: name each of {','.join(known)} at most once, and at least one")
    return [name for name in known if name in names]


def check_new_file(path: Path) -> None:
    """Check that a new file can be written.

    Raises:
        ValueError: the file exists, or its folder does not exist or can't be written.
    """
    if os.path.lexists(path):
        raise ValueError(f"output={str(path)!r}: exists already; nothing is overwritten")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"output={str(path)!r}: its folder does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"output={str(path)!r}: its folder may not be written")


def normalized(question: str) -> str:
    """The question in the form in which duplicates are found: without case and with single spaces."""
    return " ".join(question.casefold().split())


class Supply:
    """Supplies different questions of one type and difficulty from its templates, which take turns until used up."""

    def __init__(self, name: str, templates: Sequence[Template], rng: random.Random, seen: set[object]):
        self.name, self.templates, self.rng = name, list(templates), rng
        self.seen = seen  # normalised texts and problems; all supplies share this set
        self.num_made = self.num_skipped = 0

    def next(self) -> Row | None:
        """The next row, with question, answer and reasoning; None when all templates are used up."""
        while self.templates:
            template = self.templates[0]
            for _ in range(MAX_MISSES):
                made = template(self.rng)
                text = normalized(made.text)
                keys = {text, (template.__qualname__, made.problem or text)}
                if self.seen.isdisjoint(keys):
                    self.seen |= keys
                    self.num_made += 1
                    self.templates.append(self.templates.pop(0))
                    return {"question": made.text, "answer": made.answer, "reasoning": made.reasoning}
                self.num_skipped += 1
            del self.templates[0]
        return None


def generate(
    count: int,
    seed: int,
    types: Sequence[str],
    difficulties: Sequence[str],
    templates: Mapping[str, Mapping[str, Sequence[Template]]] = TEMPLATES,
) -> tuple[list[Row], int]:
    """Generate rows. Types and difficulties take turns, so that every part of the rows has equal shares, up to one row.

    Returns:
        the rows, with question, answer, reasoning, type and difficulty; and the number of duplicates that were drawn
        and dropped.

    Raises:
        ValueError: there are not so many different questions.
    """
    rng = random.Random(f"training data {seed}")  # seeded by a text, because Random(-1) equals Random(1)
    seen: set[object] = set()
    cells = [(kind, difficulty) for difficulty in difficulties for kind in types]
    supplies = [Supply(f"type {k}, difficulty {d}", templates[k][d], rng, seen) for k, d in cells]
    rows = []
    for i in tqdm(range(count), desc="Questions", unit="row", file=sys.stderr, disable=count < PROGRESS_FROM):
        supply, (kind, difficulty) = supplies[i % len(cells)], cells[i % len(cells)]
        row = supply.next()
        if row is None:
            raise ValueError(
                f"count={count}: the templates of {supply.name} are used up after {supply.num_made} different "
                f"questions; with this seed, these types and difficulties at most {i} rows can be made in equal shares"
            )
        rows.append({**row, "type": kind, "difficulty": difficulty})
    return rows, sum(supply.num_skipped for supply in supplies)


def split(rows: Sequence[Row], num_val: int, num_cells: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into training and validation rows, both in random order.

    Both parts have equal shares of the `num_cells` pairs of type and difficulty, which take turns in `rows`.
    """
    rng = random.Random(f"split {seed}")
    rounds = [rows[i : i + num_cells] for i in range(0, len(rows), num_cells)]
    *whole, last = rounds
    rng.shuffle(whole)  # because the first rounds have all questions of templates that are used up soon
    ordered = [row for turn in [*whole, last] for row in turn]
    validation, train = ordered[:num_val], ordered[num_val:]
    rng.shuffle(validation)
    rng.shuffle(train)
    return train, validation


def write_rows(path: Path, rows: Sequence[Row], columns: Sequence[str], style: str) -> None:
    """Write these columns of the rows to a new file, as a list (style "json") or one object a line ("jsonl")."""
    chosen = [{column: row[column] for column in columns} for row in rows]
    if style == "json":
        text = json.dumps(chosen, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
    with open(path, "x", encoding="utf-8", newline="\n") as file:
        file.write(text)


def print_statistics(rows: Sequence[Row], num_skipped: int) -> None:
    """Print the rows by type and difficulty, the mean length of the questions, and the number of duplicates."""
    counts = Counter((row["type"], row["difficulty"]) for row in rows)
    types = [kind for kind in TEMPLATES if any(kind == key[0] for key in counts)]
    difficulties = [difficulty for difficulty in DIFFICULTIES if any(difficulty == key[1] for key in counts)]
    print(f"{'rows':<14}" + "".join(f"{difficulty:>9}" for difficulty in [*difficulties, "all"]))
    for kind in types:
        numbers = [counts[kind, difficulty] for difficulty in difficulties]
        print(f"{kind:<14}" + "".join(f"{number:>9}" for number in [*numbers, sum(numbers)]))
    totals = [sum(counts[kind, difficulty] for kind in types) for difficulty in difficulties]
    print(f"{'all':<14}" + "".join(f"{number:>9}" for number in [*totals, sum(totals)]))
    mean_length = sum(len(row["question"]) for row in rows) / len(rows)
    print(f"mean question length: {mean_length:.1f} characters")
    print(f"duplicates skipped: {num_skipped}")


def main() -> None:
    args = parse_args(sys.argv[1:])
    rows, num_skipped = generate(args.count, args.seed, args.types, args.difficulty)
    train, validation = split(rows, args.num_val, len(args.types) * len(args.difficulty), args.seed)
    columns = ["question", "answer", "type", "difficulty", *(["reasoning"] if args.with_reasoning else [])]
    print_statistics(rows, num_skipped)
    for path, part in ((args.val_output, validation), (args.output, train)):
        if path is not None:
            write_rows(path, part, columns, args.format)
            print(f"wrote {len(part)} rows to {path}")


if __name__ == "__main__":
    utils.run_script(main)
