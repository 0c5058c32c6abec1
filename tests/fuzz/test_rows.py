"""A file of rows is read as it was written, or refused in one line that names it; nothing in a row raises later."""

import bz2
import csv
import gzip
import io
import json
import math

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from fuzzing import check_refusal, fuzz, mutate, text, value

from tunix_torch.config.data import DataConfig
from tunix_torch.data.preference import SIDES
from tunix_torch.data.prompts import prepare_rows
from tunix_torch.data.rows import COMPLETION_IDS, NO_ANSWER, PROMPT, PROMPT_IDS, QUESTION, TURNS, columns_of
from tunix_torch.data.sources import load_data, load_rows
from tunix_torch.model import tiny
from tunix_torch.rewards import REWARDS
from tunix_torch.rewards.math_equal import math_equal_reward

pytestmark = pytest.mark.thorough

ENDS = (".json", ".jsonl", ".jsonl.gz", ".json.bz2", ".csv", ".tsv", ".csv.gz", ".parquet", ".arrow")
COLUMNS = ("question", "answer", "prompt", "completion", "messages", "text", "choices", "answerKey", "solution", "id")
COLUMNS += (
    "problem",
    "answers",
    "chosen",
    "rejected",
    "options",
    "A",
    "B",
    "prompt_ids",
    "tunix/x",
    "chat_template_kwargs",
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


def messages(rng):
    roles = rng.choice([["user"], ["user", "assistant"], ["system", "user", "assistant", "user"], ["assistant"], []])
    made = [{"role": role, "content": text(rng)} for role in roles]
    if made and rng.random() < 0.2:
        made[-1][rng.choice(["role", "content", "name"])] = value(rng)
    return made


def row(rng):
    """A row that mostly makes sense, with some columns of any value."""
    made = {"question": text(rng) or "6 x 12?", "answer": rng.choice(["72", 72, "#### 72", "1/2", 0.5, text(rng)])}
    for name in rng.sample(COLUMNS, rng.randrange(4)):
        sensible = {"messages": messages, "prompt": messages, "chosen": text, "rejected": text, "completion": text}
        sensible |= {"choices": lambda rng: ["iron", "gold", text(rng)]}
        made[name] = sensible.get(name, text)(rng) if rng.random() < 0.6 else value(rng)
    for name in [name for name in made if rng.random() < 0.1]:
        del made[name]
    return made


def rows_of_texts(rng):
    """Rows as CSV can hold them: texts, of which every row has all."""
    names = rng.sample(COLUMNS, rng.randrange(1, 5)) if rng.random() < 0.3 else ["question", "answer", "id"]
    return [{name: text(rng) for name in names} for _ in range(rng.randrange(1, 4))]


def is_utf8(words):
    return words.encode("utf-8", "replace") == words.encode("utf-8", "surrogatepass")


def table(rng):
    """A table of Arrow whose columns have types."""
    count = rng.randrange(1, 4)

    def encodable(rng):
        made = text(rng)
        return made if is_utf8(made) else "?"

    def of_messages(rng):
        return [{"role": rng.choice(["user", "assistant"]), "content": encodable(rng)} for _ in range(rng.randrange(3))]

    kinds = {
        pyarrow.string(): encodable,
        pyarrow.large_string(): encodable,
        pyarrow.int64(): lambda rng: rng.choice([0, 72, -(2**63), 2**63 - 1]),
        pyarrow.float64(): lambda rng: rng.choice([0.5, math.nan, math.inf, 72.0]),
        pyarrow.bool_(): lambda rng: rng.random() < 0.5,
        pyarrow.binary(): lambda rng: bytes(rng.randrange(256) for _ in range(3)),
        pyarrow.list_(pyarrow.string()): lambda rng: [encodable(rng) for _ in range(rng.randrange(3))],
        pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()})): of_messages,
        pyarrow.decimal128(10, 2): lambda rng: None,
        pyarrow.date32(): lambda rng: rng.choice([None, 0, 20000]),
    }
    arrays = {}
    for name in ["question", "answer", *rng.sample(COLUMNS, 2)]:
        kind = pyarrow.string() if name == "question" or rng.random() < 0.4 else rng.choice(list(kinds))
        made = [kinds[kind](rng) if rng.random() < 0.9 else None for _ in range(count)]
        arrays[name] = pyarrow.array(made, kind)
    return pyarrow.table(arrays)


def written(rng, end):
    """Rows, and the content of a file that holds them."""
    if end in (".parquet", ".arrow"):
        made, out = table(rng), io.BytesIO()
        if rng.random() < 0.2:  # with a description of the columns
            columns = {"question": ["a", "b"], "kind": [0, 1]}
            kinds = {"question": datasets.Value("string"), "kind": datasets.ClassLabel(names=["x", "y"])}
            made = datasets.Dataset.from_dict(columns, datasets.Features(kinds)).data.table
        if end == ".parquet":
            compression = rng.choice(["none", "snappy", "zstd"])
            pyarrow.parquet.write_table(made, out, compression=compression, write_page_checksum=True)
        else:
            opened = rng.choice([pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
            with opened(out, made.schema) as writer:
                writer.write_table(made)
        rows = made.to_pylist()
        return [row | ({"kind": "xy"[row["kind"]]} if "kind" in row else {}) for row in rows], out.getvalue()
    if end.startswith((".csv", ".tsv")):
        rows, out = rows_of_texts(rng), io.StringIO(newline="")
        writer = csv.DictWriter(out, list(rows[0]), dialect="excel" if end.startswith(".csv") else "excel-tab")
        writer.writeheader()
        writer.writerows(rows)
        content = out.getvalue()
    else:
        rows = [row(rng) for _ in range(rng.randrange(1, 4))]
        ascii_only = rng.random() < 0.5
        if end.startswith(".jsonl") or rng.random() < 0.5:
            content = "".join(json.dumps(made, ensure_ascii=ascii_only) + "\n" for made in rows)
        else:
            content = json.dumps(rows, ensure_ascii=ascii_only, indent=rng.choice([None, 1]))
    content = content.encode("utf-8", "surrogatepass")
    return rows, (b"\xef\xbb\xbf" if rng.random() < 0.1 else b"") + content


def packed(content, end):
    return {".gz": gzip.compress, ".bz2": bz2.compress}.get(end[end.rfind(".") :], bytes)(content)


def same(one, other):
    """Whether two values are equal, of equal types, and NaN where the other is NaN."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or one != one and other != other)


def refused(function, path, *arguments, **settings):
    """What a function returns, or None where it refuses the file in one line that names it."""
    try:
        return function(*arguments, **settings)
    except ValueError as error:
        check_refusal(error, str(path))
        return None


def test_a_file_is_read_as_it_was_written(tmp_path):
    def check(rng):
        end = rng.choice(ENDS)
        rows, content = written(rng, end)
        path = tmp_path / f"rows{end}"
        path.write_bytes(packed(content, end))
        found = refused(load_rows, path, str(path))
        valid = end in (".parquet", ".arrow") or is_utf8(content.decode("utf-8", "surrogatepass"))
        if found is None:
            assert not valid, f"a valid {end} file is refused"
            return "refused"
        assert valid, "what is no UTF-8 is read"
        if end.startswith(".json"):  # in JSON, two halves side by side are the one character that they make
            rows = json.loads(json.dumps(rows))
        assert same(found, rows), f"{found!r:.300} is not {rows!r:.300}"
        return "read"

    fuzz("written rows", check, kinds=2)


def strict(content):
    """Rows of a JSON text, by the letter; None where it has none."""

    def once(pairs):
        assert len({name for name, _ in pairs}) == len(pairs)
        return dict(pairs)

    try:
        words = content.decode("utf-8-sig")
        try:
            whole = json.loads(words, object_pairs_hook=once)
        except json.JSONDecodeError:
            whole = None
        if isinstance(whole, list):
            return whole
        return [json.loads(line, object_pairs_hook=once) for line in words.split("\n") if line.strip()]
    except (ValueError, AssertionError, RecursionError):
        return None


def test_a_damaged_file_is_refused_or_means_what_it_says(tmp_path):
    def check(rng):
        end = rng.choice(ENDS)
        rows, content = written(rng, end)
        path = tmp_path / f"rows{end}"
        if (
            end == ".parquet" and rng.random() < 0.5
        ):  # a bit of the data, which has checksums; the list of columns has none
            end_of_data = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
            damaged = bytearray(content)
            damaged[rng.randrange(4, end_of_data)] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            found = refused(load_rows, path, str(path))
            assert found is None or same(found, rows), "a flipped bit is read"
            return "refused" if found is None else "read"
        inside = rng.random() < 0.7
        damaged = mutate(rng, content) if inside else mutate(rng, packed(content, end))
        path.write_bytes(packed(damaged, end) if inside else damaged)
        found = refused(load_rows, path, str(path))
        if found is None:
            return "refused"
        assert found and all(isinstance(made, dict) and all(isinstance(name, str) for name in made) for made in found)
        if end.startswith(".json") and inside:
            assert same(found, strict(damaged)), f"{found!r:.300} is not {strict(damaged)!r:.300}"
        if end in (".csv", ".tsv"):
            names = list(found[0])
            assert all(list(made) == names and all(isinstance(v, str) for v in made.values()) for made in found)
        return "read"

    fuzz("damaged rows", check, kinds=2)


def test_rows_become_prompts_and_answers_or_are_refused(tmp_path, tokenizer):
    """Whatever a row holds, its own columns stay, its prompt holds its question, and its answer can be rewarded."""

    def check(rng):
        end = rng.choice([".json", ".jsonl", ".csv", ".parquet"])
        _, content = written(rng, end)
        path = tmp_path / f"rows{end}"
        path.write_bytes(content)
        supervised = rng.random() < 0.5
        if refused(load_rows, path, str(path)) is None:
            return "refused"
        plain = load_rows(str(path))
        loaded = refused(load_data, path, DataConfig(data_path=str(path)), 0, supervised=supervised)
        if loaded is None:
            return "refused"
        rows = loaded[0]
        assert len(rows) == len(plain)
        for made, own in zip(rows, plain, strict=True):
            assert same({name: made[name] for name in own}, own), "a column has changed"
        pairs = supervised and all(side in made for made in rows for side in SIDES)
        longest = 10**6 if supervised else None
        ready = refused(prepare_rows, path, rows, tokenizer, 10**6, longest, pairs=pairs)
        if ready is None:
            return "refused later"
        for made in ready:
            ids = made[PROMPT_IDS] + made.get(COMPLETION_IDS, [])
            assert ids and all(0 <= token < len(tokenizer) for token in ids)
            if not supervised and not made[TURNS]:
                assert made[QUESTION].strip() in made[PROMPT], (made[QUESTION], made[PROMPT])
        if all(not made[NO_ANSWER] for made in ready):
            columns = columns_of(ready)
            for reward in (*REWARDS.values(), math_equal_reward):
                values = reward([made[PROMPT] for made in ready], ["<answer>72</answer>"] * len(ready), **columns)
                assert all(value is None or math.isfinite(value) for value in values)
            return "rewarded"
        return "prepared"

    fuzz("prepared rows", check, kinds=4)
