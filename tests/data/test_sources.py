"""Rows are read from files, data sets and hubs (copies made here), split and streamed, and mistakes are one line."""

import importlib.util
import itertools
import json
import threading
import types

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch

from tunix_torch import DataConfig, GRPOConfig, ModelConfig
from tunix_torch.config.data import KNOWN_DATASETS
from tunix_torch.data.readers import load_rows, stream_rows
from tunix_torch.data.rows import QUESTION, answer_of
from tunix_torch.data.shapes import COLUMNS, normalize_row
from tunix_torch.data.sources import KNOWN, evaluation_rows, load_data, load_eval_rows, training_rows
from tunix_torch.run.job import train

ROWS = [{"question": f"{i} + 0?", "answer": str(i)} for i in range(10)]
ARC = {
    "question": "Which is a metal?",
    "choices": {"text": ["iron", "salt"], "label": ["A", "B"]},
    "answerKey": "A",
}
MATH = {"problem": "Half of 1?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"}


def write(path, text):
    path.write_text(text)
    return str(path)


def write_rows(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_json_list_json_lines_and_jsonl_hold_the_same_rows(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    assert load_rows(write(tmp_path / "a.json", json.dumps(rows))) == rows
    assert load_rows(write(tmp_path / "b.json", lines)) == rows
    assert load_rows(write(tmp_path / "c.jsonl", lines)) == rows


def test_pretty_printed_json_object_is_refused_with_a_line(tmp_path):
    with pytest.raises(ValueError, match="line 3"):
        load_rows(write(tmp_path / "a.json", '[\n{"question": "1"},\n{"question" 2}\n]'))


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"question": "1", "answer": "1"}\n{"question": }\n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", "", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.json", "[1, 2]", "row 1: expected an object"),
        ("a.jsonl", '"text"\n', "row 1: expected an object"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "a.jsonl, line 2: not valid JSON: the name 'a' is there twice"),
        ("a.json", "[" * 100_000, "a.json: not valid JSON: nested too deeply"),
        ("a.jsonl", f'{{"a": {"9" * 5000}}}\n', "a.jsonl, line 1: not valid JSON: .*4300"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / name, text))


def test_a_damaged_arrow_file_is_one_line_and_does_not_end_the_process(tmp_path):
    """Regression: an offset of a text that points beyond the texts was a segmentation fault."""
    table, path = pyarrow.table({"question": ["a" * 63, "b"]}), tmp_path / "a.arrow"
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    content, offset = path.read_bytes(), (63).to_bytes(4, "little")  # where the second text begins
    assert content.count(offset) == 1
    path.write_bytes(content.replace(offset, b"\xff\xff\xff\x7f"))
    with pytest.raises(ValueError, match="a.arrow': damaged"):
        load_rows(str(path))


def test_a_flipped_bit_in_parquet_is_noticed_where_there_are_checksums(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"question": ["six times twelve"]})
    kept = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pyarrow.parquet.write_table(table, path, write_page_checksum=True, **kept)
    content = path.read_bytes()
    assert content.count(b"six times") == 1
    path.write_bytes(content.replace(b"six times", b"sip times"))
    with pytest.raises(ValueError, match="a.parquet': damaged"):
        load_rows(str(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_rows(str(tmp_path / "missing.jsonl"))


def test_generated_rows_never_share_a_question_with_the_held_out_set():
    train, evaluation = load_data(DataConfig(), seed=3)
    assert len(evaluation) == 256 and len(train) == 4096
    assert not {row["question"] for row in train} & {row["question"] for row in evaluation}


def test_json_lines_end_at_newlines_only(tmp_path):
    text = '{"question": "0 + 1?", "answer": "1", "note": "a\u2028b"}\n{"question": "1 + 1?", "answer": "2"}\n'
    assert [row["answer"] for row in load_rows(write(tmp_path / "a.jsonl", text))] == ["1", "2"]


def test_a_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"question": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="val_data_path=.*a.jsonl.*not UTF-8"):
        load_rows(str(tmp_path / "a.jsonl"), setting="val_data_path")


# ---- files ----


def test_csv_and_parquet_hold_the_same_rows_and_csv_keeps_the_text(tmp_path):
    path = write(tmp_path / "a.csv", '\ufeffquestion,answer,note\n"1, 2,\n3?",007,5.10\nb,1,\n')
    rows = [{"question": "1, 2,\n3?", "answer": "007", "note": "5.10"}, {"question": "b", "answer": "1", "note": ""}]
    assert load_rows(path) == rows
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet")) == rows


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "question,answer\n1,2,3\n", "a.csv, line 2: expected the fields question, answer"),
        ("a.csv", "question,answer\n1\n", "a.csv, line 2: expected the fields"),
        ("a.csv", "question,answer\n", "no rows"),
        ("a.csv", 'question,answer\n"1,2\n', "a.csv, line 2: not valid CSV"),
        ("a.csv", "question,answer,question\n1,2,3\n", "a.csv, line 1: the column 'question' is there 2 times"),
        ("a.parquet", "question", "a.parquet': damaged, or no .parquet file, after row 0"),
        ("a.arrow", "question", "a.arrow': damaged, or no .arrow file, after row 0"),
        ("a.jsonl.gz", "question", "a.jsonl.gz': damaged, or no .jsonl.gz file"),
        (
            "a.xlsx",
            "PK",
            "a.xlsx, line 1: not valid JSON: .*; files that are read end in .json, .jsonl, .csv, .tsv, .pa",
        ),
    ],
)
def test_bad_tables_are_one_clear_line(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message) as error:
        load_rows(write(tmp_path / name, text))
    assert "\n" not in str(error.value)


TEXTS = {
    ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    ".json": json.dumps(ROWS, indent=1),
    ".csv": "question,answer\r\n" + "".join(f"{row['question']},{row['answer']}\r\n" for row in ROWS),
    ".tsv": "question\tanswer\n" + "".join(f"{row['question']}\t{row['answer']}\n" for row in ROWS),
}


PACKED = {"": None, ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
TABLES = (".parquet", ".arrow", "_file.arrow")


@pytest.mark.parametrize("end, packed", [*itertools.product(TEXTS, PACKED), *itertools.product(TABLES, [""])])
@pytest.mark.parametrize("capitals", [False, True])
def test_every_format_is_read_in_capitals_compressed_and_with_a_byte_order_mark(tmp_path, end, packed, capitals):
    path = tmp_path / (f"a{end}{packed}".upper() if capitals else f"a{end}{packed}")
    table = datasets.Dataset.from_list(ROWS).data.table
    if end in TEXTS:
        with pyarrow.output_stream(path, PACKED[packed]) as file:
            file.write(("\ufeff" + TEXTS[end]).encode())
    elif end == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        new = pyarrow.ipc.new_stream if end == ".arrow" else pyarrow.ipc.new_file
        with new(path, table.schema) as file:
            file.write_table(table)
    assert load_rows(str(path)) == ROWS and list(stream_rows(str(path))) == ROWS
    assert len(load_data(DataConfig(data_path=str(path), train_fraction=0.5), seed=0)[0]) == 5


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_damaged_parquet_is_one_line_also_where_it_shows_late(tmp_path, where, cut, compression):
    rows = [{"question": f"{i} + {i}?" * 9, "answer": str(2 * i)} for i in range(5000)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500, compression=compression)
    data = (tmp_path / "a.parquet").read_bytes()
    i = int(len(data) * where)
    (tmp_path / "a.parquet").write_bytes(data[:i] if cut else data[:i] + bytes([255]) * 3000 + data[i + 3000 :])
    for load in (load_rows, lambda path: list(stream_rows(path))):
        with pytest.raises(ValueError, match="a.parquet'.*(damaged|not UTF-8)") as error:
            load(str(tmp_path / "a.parquet"))
        assert "\n" not in str(error.value)


def classes_and_short_numbers():
    """Return rows with classes and with numbers of 16 and 32 bits, and the same rows as they were meant."""
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["no", "yes"]),
            "number": datasets.Value("float32"),
            "numbers": datasets.List(datasets.Value("float16")),
            "nested": {"label": datasets.ClassLabel(names=["a"]), "text": datasets.Value("string")},
        }
    )
    row = {"question": "1?", "answer": 1, "number": 0.1, "numbers": [0.1, None], "nested": {"label": 0, "text": "t"}}
    meant = {**row, "answer": "yes", "nested": {"label": "a", "text": "t"}}
    return datasets.Dataset.from_list([row], features), [meant]


@pytest.mark.parametrize("kind", ["a.parquet", "a.arrow", "saved"])
def test_classes_become_names_and_float32_what_was_meant(tmp_path, kind):
    data, meant = classes_and_short_numbers()
    path = str(tmp_path / kind)
    if kind == "a.parquet":
        data.to_parquet(path)
    elif kind == "a.arrow":
        with pyarrow.ipc.new_file(path, data.data.table.schema) as file:
            file.write_table(data.data.table)
    else:
        data.save_to_disk(path)
    assert load_rows(path) == meant and list(stream_rows(path)) == meant
    assert answer_of(load_data(DataConfig(data_path=path), seed=0)[0][0]) == "yes"


# ---- data sets that a caller has at hand ----


class OfTorch(torch.utils.data.Dataset):
    """This data set raises no IndexError at its end, so only its length says where it ends."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return ROWS[i % len(ROWS)]


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return itertools.cycle(ROWS)


class WithoutLength(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return ROWS[0]


COLUMNS_OF_ROWS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


def test_data_sets_of_every_kind_are_taken(subtests):
    for rows in [
        ROWS,
        tuple(ROWS),
        map(types.MappingProxyType, ROWS),
        OfTorch(),
        torch.utils.data.Subset(OfTorch(), range(len(ROWS))),
        COLUMNS_OF_ROWS,
        {name: np.array(values) for name, values in COLUMNS_OF_ROWS.items()},
        pandas.DataFrame(ROWS),
        pandas.DataFrame(ROWS, index=range(10, 20)),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS).with_transform(lambda batch: batch),
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])),
        {"train": pandas.DataFrame(ROWS), "test": pandas.DataFrame(ROWS[:1])},
        datasets.IterableDatasetDict(train=datasets.Dataset.from_list(ROWS).to_iterable_dataset()),
    ]:
        with subtests.test(rows=rows):
            assert list(training_rows(rows)) == ROWS


def test_evaluation_takes_the_split_that_is_for_it_and_reads_a_stream_to_its_end():
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:3])
    for name in ("test", "validation"):
        assert list(evaluation_rows(datasets.DatasetDict({"train": train, name: test}))) == ROWS[:3]
    assert list(evaluation_rows(test.to_iterable_dataset())) == ROWS[:3]


def test_each_of_several_evaluation_sets_is_rows_under_its_name(subtests):
    one, two = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:3])
    for several in [
        {"a": ROWS, "b": ROWS[:3]},
        {"a": one, "b": two},
        {"a": one.to_iterable_dataset(), "b": pandas.DataFrame(ROWS[:3])},
        datasets.DatasetDict(a=one, b=two),
        datasets.IterableDatasetDict(a=one.to_iterable_dataset(), b=two.to_iterable_dataset()),
        {"test": one, "validation": two},
    ]:
        with subtests.test(several=several):
            rows = evaluation_rows(several)
            assert list(rows) == list(several) and [list(part) for part in rows.values()] == [ROWS, ROWS[:3]]
    columns = {"prompt": [[{"role": "user", "content": "1 + 1?"}]], "extra": [{"a": 1}]}
    assert evaluation_rows(columns) == [{"prompt": columns["prompt"][0], "extra": {"a": 1}}], "a dict of columns"


class Counted(torch.utils.data.IterableDataset):
    """A stream that holds what can't be pickled, as those that read a file or a socket do."""

    def __init__(self, rows):
        self.rows, self.lock = rows, threading.Lock()

    def __iter__(self):
        with self.lock:
            yield from self.rows


@pytest.mark.parametrize("stream", [Endless(), Counted(ROWS)], ids=["without an end", "with a lock"])
def test_iterable_data_sets_of_pytorch_are_streams(stream):
    rows = training_rows(stream)
    assert isinstance(rows, datasets.IterableDataset)
    for _ in range(2):
        assert list(itertools.islice(rows, 10)) == ROWS
    with pytest.raises(ValueError, match="train_dataset, row 2: a str, expected a dict"):
        list(training_rows(Counted([ROWS[0], "1 + 1?"])))


def split_into(*names):
    return datasets.DatasetDict(dict.fromkeys(names, datasets.Dataset.from_list(ROWS)))


def test_what_is_no_data_set_is_one_line(subtests):
    for take, rows, message in [
        (training_rows, split_into("a", "b"), r"train_dataset: has the splits a, b; give one .* train_dataset\['a'\]"),
        (
            evaluation_rows,
            split_into("train", "test", "validation"),
            "eval_dataset: has the splits train, test, validat",
        ),
        (evaluation_rows, split_into("train"), "eval_dataset: has the splits train"),
        (training_rows, "openai/gsm8k", "train_dataset='openai/gsm8k': expected a datasets.Dataset, a list of dicts"),
        (training_rows, 7, "train_dataset=7: expected"),
        (training_rows, OfTorch, "train_dataset=<class .*OfTorch'>: expected"),
        (training_rows, pandas.DataFrame([["1 + 1?", "2"]]), "train_dataset, row 1: a column is named 0"),
        (training_rows, ["1 + 1?"], "train_dataset, row 1: a str, expected a dict"),
        (training_rows, [*ROWS, None], "train_dataset, row 11: a NoneType, expected a dict"),
        (training_rows, ROWS[0], r"train_dataset\['question'\]='0 \+ 0\?': expected a column"),
        (training_rows, {"question": ["a", "b"], "answer": ["1"]}, "different lengths: {'question': 2, 'answer': 1}"),
        (training_rows, WithoutLength(), "train_dataset: a WithoutLength without a length"),
    ]:
        with subtests.test(take=take, rows=rows, message=message):
            with pytest.raises(ValueError, match=message) as error:
                take(rows)
            assert "\n" not in str(error.value)


def test_numbers_of_a_data_frame_are_what_was_meant_and_its_empty_cells_none():
    frame = pandas.DataFrame({"question": ["a", "b"], "n": np.array([0.1, np.nan], np.float32), "i": [1, 2]})
    frame["text"], frame["big"] = ["x", None], pandas.array([2**60, None], dtype="Int64")
    first, second = training_rows(frame)
    assert first == {"question": "a", "n": 0.1, "i": 1, "text": "x", "big": 2**60}
    assert second == {"question": "b", "n": None, "i": 2, "text": None, "big": None} and type(second["i"]) is int


# ---- hubs ----


def test_folders_and_saved_data_sets_are_read_as_hugging_face_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_rows(tmp_path / "plain" / "train.jsonl")
    write_rows(tmp_path / "plain" / "test.jsonl", ROWS[:3])
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for name in ("plain", "saved"):
        path = str(tmp_path / name)
        assert load_rows(path) == ROWS
        assert load_rows(path, split="test") == ROWS[:3]
        assert list(stream_rows(path, split="test")) == ROWS[:3]
    with pytest.raises(ValueError, match="data_path=.*saved.*it has the splits train, test"):
        load_rows(str(tmp_path / "saved"), split="validation")


def test_hub_out_of_reach_says_what_was_asked_and_where_to_put_a_copy(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as error:
        load_data(DataConfig(dataset="gsm8k"), seed=0)
    assert "\n" not in str(error.value)
    for words in ("dataset='gsm8k': data_path='openai/gsm8k'", "'main'", "'train'", "such as --data_path rows.jsonl"):
        assert words in str(error.value)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """The folder of an array_record data set that TFDS has written, with ARC's columns, classes and numbers."""
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class TunixArc(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["A", "B"])
            columns = {"text": tfds.features.Text(), "label": label}
            features = {
                "question": tfds.features.Text(),
                "choices": tfds.features.Sequence(columns),
                "answerKey": label,
                "grade": tfds.features.Scalar(dtype=np.int64),
                "scores": tfds.features.Tensor(shape=(2,), dtype=np.float32),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download_manager):
            return {"train": self._generate_examples(4), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {**ARC, "question": f"Métal {i}?", "grade": i, "scores": [0.5, 2.0]}

    folder = tmp_path_factory.mktemp("tfds")
    builder = TunixArc(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


@pytest.mark.parametrize("below", ["", "tunix_arc", "tunix_arc/1.0.0"])
def test_tfds_rows_come_without_tensorflow_as_plain_python(tfds_folder, below):
    rows = load_rows(str(tfds_folder / below), source="tfds")
    expected = [{**ARC, "question": f"Métal {i}?", "grade": i, "scores": [0.5, 2.0]} for i in range(4)]
    assert sorted(rows, key=lambda row: row["grade"]) == expected
    assert {type(row["grade"]) for row in rows} == {int}
    streamed = stream_rows(str(tfds_folder / below), split="test", source="tfds")
    assert [row["question"] for row in streamed] == ["Métal 0?"]


def test_tfds_data_set_by_name_is_found_in_its_data_folder(tfds_folder, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tfds_folder))
    config = DataConfig(data_path="tunix_arc", data_source="tfds", dataset="arc", num_eval_rows=5)
    train, evaluation = load_data(config, seed=0)
    assert len(train) == 4 and len(evaluation) == 1, "a name with --dataset: evaluated on its test split"
    assert answer_of(train[0]) == "A" and train[0][QUESTION].endswith("?\nA. iron\nB. salt")


def test_tfds_mistakes_are_one_line(tfds_folder, tmp_path):
    for path, split, words in (
        (str(tfds_folder), "nosuch", "Unknown split 'nosuch'"),
        (str(tmp_path), "train", "found none"),
        ("no_such_data_set", "train", "Dataset no_such_data_set not found"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            load_rows(path, split=split, source="tfds")
        assert "\n" not in str(error.value) and "--data_path rows.jsonl" in str(error.value)


def test_kaggle_splits_are_files_by_name(tmp_path):
    write_rows(tmp_path / "a" / "main_train.jsonl")
    write(tmp_path / "a" / "main_test.csv", "question,answer\n1?,1\n")
    write(tmp_path / "a" / "readme.md", "train")
    assert load_rows(str(tmp_path / "a"), source="kaggle") == ROWS
    assert load_rows(str(tmp_path / "a"), split="test", source="kaggle") == [{"question": "1?", "answer": "1"}]
    assert list(stream_rows(str(tmp_path / "a"), source="kaggle")) == ROWS
    write_rows(tmp_path / "a" / "train.jsonl", ROWS[:2])
    assert load_rows(str(tmp_path / "a"), source="kaggle") == ROWS[:2], "the very name goes first"


def test_kaggle_folder_with_one_file_is_training_rows_and_nothing_else(tmp_path):
    write_rows(tmp_path / "a" / "gsm8k.jsonl")
    assert load_rows(str(tmp_path / "a"), source="kaggle") == ROWS
    with pytest.raises(ValueError, match="no file for split 'test'.*gsm8k.jsonl"):
        load_rows(str(tmp_path / "a"), split="test", source="kaggle")


def test_kaggle_configurations_are_never_mixed(tmp_path):
    write_rows(tmp_path / "main" / "train.jsonl")
    write_rows(tmp_path / "socratic" / "train.jsonl", ROWS[:2])
    with pytest.raises(ValueError, match="files in several folders.*main/train.jsonl, socratic/train.jsonl"):
        load_rows(str(tmp_path), source="kaggle")
    assert load_rows(str(tmp_path), "socratic", source="kaggle") == ROWS[:2]


def test_kaggle_handle_is_downloaded(tmp_path, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")
    write_rows(tmp_path / "versions" / "1" / "train.jsonl")
    asked = []
    monkeypatch.setattr(kagglehub, "dataset_download", lambda handle: asked.append(handle) or str(tmp_path))
    assert load_rows("someone/gsm8k", source="kaggle") == ROWS
    assert asked == ["someone/gsm8k"]


def test_kaggle_out_of_reach_is_one_line(monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")

    def fail(handle):
        raise ConnectionError("Failed to resolve 'api.kaggle.com'\nmore")

    monkeypatch.setattr(kagglehub, "dataset_download", fail)
    with pytest.raises(ValueError, match="data_path='a/b'.*api.kaggle.com.*--data_path rows.jsonl") as error:
        load_rows("a/b", source="kaggle")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source, package", [("tfds", "tensorflow-datasets"), ("kaggle", "kagglehub")])
def test_missing_package_is_said_with_the_command(monkeypatch, source, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        load_rows("a/b", source=source)


# ---- shapes ----


def test_known_data_sets_are_those_of_the_config():
    assert tuple(KNOWN) == tuple(COLUMNS) == KNOWN_DATASETS


@pytest.mark.parametrize(
    "dataset, row, words",
    [
        ("gsm8k", MATH, "no column 'question'; it has problem, solution"),
        ("gsm8k", ROWS[0], "no '####'"),
        ("math", ROWS[0], "no column 'problem'; it has question, answer"),
        ("arc", ROWS[0], "no column 'choices'"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_local_copy_that_is_another_data_set_is_refused(tmp_path, dataset, row, words, streaming):
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=f"a.jsonl, row 1: no row of dataset='{dataset}'.*{words}"):
        load_data(DataConfig(data_path=path, dataset=dataset, streaming=streaming), seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_named_columns_take_the_place_of_those_looked_for(tmp_path, streaming):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": 17, "query": "1 + 1?", "response": "2", "answer": "no"}])
    names = {"question_column": "query", "answer_column": "response", "streaming": streaming}
    train, _ = load_data(DataConfig(data_path=path, **names), seed=0)
    row = normalize_row(next(iter(train)), 1, "a")
    assert (row[QUESTION], answer_of(row)) == ("1 + 1?", "2")
    with pytest.raises(ValueError, match="question_column='task': not in .*a.jsonl, row 1, which has prompt, query"):
        load_data(DataConfig(data_path=path, **names | {"question_column": "task"}), seed=0)


# ---- training and evaluation ----


def test_parts_share_no_row_and_hang_on_the_seed_alone(tmp_path):
    path = write_rows(tmp_path / "a.jsonl")
    config = DataConfig(data_path=path, train_fraction=0.7)
    train, evaluation = load_data(config, seed=1)
    questions = [[row["question"] for row in part] for part in (train, evaluation)]
    assert len(train) == 7 and len(evaluation) == 3
    assert sorted(questions[0] + questions[1]) == [row["question"] for row in ROWS]
    assert all(part == sorted(part) for part in questions), "each part keeps the order of the file"
    assert load_data(config, seed=1) == (train, evaluation) != load_data(config, seed=2)


def test_a_question_is_in_one_part_only(tmp_path):
    rows = [{"question": f"{n % 10}?", "answer": str(n)} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    train, evaluation = load_data(DataConfig(data_path=str(path), train_fraction=0.7), seed=3)
    assert not {row["question"] for row in train} & {row["question"] for row in evaluation}
    assert len(train) == 28 and len(train) + len(evaluation) == 40


def test_own_evaluation_rows_need_not_be_rows_of_the_data_set(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "1 + 1 = 2\\n#### 2"}')
    (tmp_path / "own.jsonl").write_text('{"prompt": "2 + 2?", "answer": 4}')
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "own")}
    _, evaluation = load_data(DataConfig(dataset="gsm8k", data_path=paths["train"], val_data_path=paths["own"]), seed=0)
    assert [answer_of(row) for row in evaluation] == [4]


def test_kaggle_split_is_a_word_of_the_name_and_not_a_part_of_one(tmp_path):
    for name in ("train", "latest_scores"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}')
    with pytest.raises(ValueError, match="no file for split 'test'"):
        load_rows(str(tmp_path), None, "test", source="kaggle")
    (tmp_path / "arithmetic_test.jsonl").write_text('{"question": "2 + 2?", "answer": "4"}')
    assert [row["answer"] for row in load_rows(str(tmp_path), None, "test", source="kaggle")] == ["4"]


def test_limits_hold_after_the_split(tmp_path):
    path = write_rows(tmp_path / "a.jsonl")
    whole = load_data(DataConfig(data_path=path, train_fraction=0.5), seed=1)
    limited = load_data(DataConfig(data_path=path, train_fraction=0.5, num_train_samples=2, num_test_samples=1), seed=1)
    assert limited == (whole[0][:2], whole[1][:1])
    with pytest.raises(ValueError, match="train_fraction=0.05: leaves a part of 10 questions empty"):
        load_data(DataConfig(data_path=path, train_fraction=0.05), seed=0)


def test_local_copy_of_a_known_data_set_is_not_evaluated_on_unless_asked(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [MATH] * 4)
    assert load_data(DataConfig(data_path=path, dataset="math"), seed=0)[1] == []
    config = DataConfig(data_path=path, dataset="math", val_data_path=path, num_eval_rows=3)
    assert len(load_data(config, seed=0)[1]) == 3


def test_known_data_set_is_evaluated_on_its_test_split(monkeypatch):
    asked = []

    def load(path, config_name, split, streaming):
        asked.append((path, config_name, split))
        return datasets.Dataset.from_list([ARC] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it is not asked whether it answers
    train, evaluation = load_data(DataConfig(dataset="arc"), seed=0)
    assert len(train) == len(evaluation) == 2
    assert asked == [("allenai/ai2_arc", "ARC-Challenge", "train"), ("allenai/ai2_arc", "ARC-Challenge", "test")]
    assert load_eval_rows(DataConfig(dataset="arc")) == evaluation


def test_evaluation_rows_alone(tmp_path):
    path = write_rows(tmp_path / "a.jsonl")
    assert len(load_eval_rows(DataConfig(num_eval_rows=5))) == 5
    rows = load_eval_rows(DataConfig(val_data_path=path, num_eval_rows=2, data_source="file"))
    assert [row["answer"] for row in rows] == ["0", "1"]


def test_settings_that_exclude_each_other(subtests):
    for settings, words in [
        ({"data_path": "a", "train_fraction": 0.5, "val_data_path": "b"}, "train_fraction=0.5: val_data_path='b'"),
        ({"data_path": "a", "train_fraction": 0.5, "streaming": True}, "train_fraction=0.5.*give val_data_path"),
        ({"train_fraction": 0.5}, "train_fraction=0.5: generated rows"),
        ({"streaming": True}, "streaming=True: generated rows"),
        ({"data_source": "tfds"}, "data_source='tfds': of what. Give data_path"),
        (
            {"data_source": "kaggle", "dataset": "gsm8k"},
            "data_source='kaggle': has no known 'gsm8k'; say with data_path",
        ),
        ({"data_source": "file", "dataset": "math"}, "data_source='file': has no known 'math'"),
        ({"data_source": "file", "data_path": "nowhere"}, "data_path='nowhere': no such file"),
    ]:
        with subtests.test(settings=settings, words=words):
            with pytest.raises(ValueError, match=words):
                load_data(DataConfig(**settings), seed=0)


# ---- streams ----


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_stream_holds_the_rows_of_the_list(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif suffix == ".csv":
        write(path, "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    else:
        write_rows(path)
    assert list(stream_rows(str(path))) == load_rows(str(path)) == ROWS


def test_stream_is_shuffled_by_seed_and_epoch_and_limited_before(tmp_path):
    path = write_rows(tmp_path / "a.jsonl")

    def drawn(seed, epoch=0):
        stream, _ = load_data(DataConfig(data_path=path, streaming=True, num_train_rows=8), seed)
        stream.set_epoch(epoch)
        return [row["question"] for row in stream]

    assert sorted(drawn(0)) == [row["question"] for row in ROWS[:8]]
    assert drawn(0) == drawn(0) and drawn(0) != drawn(1) and drawn(0) != drawn(0, epoch=1)


def test_stream_reads_no_more_than_is_drawn_and_its_window(tmp_path, monkeypatch):
    monkeypatch.setattr("tunix_torch.data.sources.SHUFFLE_BUFFER", 10)
    path, pulled = write_rows(tmp_path / "a.jsonl", ROWS * 1000), []
    monkeypatch.setattr(
        "tunix_torch.data.files.parse_json", lambda line: pulled.append(line) or {"question": "q", "answer": "1"}
    )
    stream, _ = load_data(DataConfig(data_path=path, streaming=True), seed=0)
    assert len(pulled) <= 2
    for _, _ in zip(stream, range(20), strict=False):
        pass
    assert len(pulled) <= 40


@pytest.mark.parametrize(
    "use_grpo, message", [(True, "'correctness_reward' takes 'answer'"), (False, "completion to learn")]
)
def test_a_stream_without_what_training_takes_is_told_before_anything_is_moved(
    model_folder, tmp_path, use_grpo, message
):
    """Regression: a missing answer or completion was reported only at the first step, when files had been moved."""
    path, out = write_rows(tmp_path / "a.jsonl", [{"question": "1 + 1?"}] * 9), tmp_path / "out"
    out.mkdir()
    (out / "metrics.jsonl").write_text("of an earlier run")
    with pytest.raises(ValueError, match=f"a.jsonl, row 1: no .*{message}"):
        settings = {"use_grpo": use_grpo, "max_steps": 1, "report_to": "none", "eval_strategy": "no"}
        data = DataConfig(data_path=path, streaming=True, reward_funcs=["correctness"])
        train(ModelConfig(model_name=model_folder), data, GRPOConfig(output_dir=str(out), **settings))
    assert [file.name for file in out.iterdir()] == ["metrics.jsonl"]


def test_wrong_stream_is_told_when_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_data(DataConfig(data_path=str(tmp_path / "a.jsonl"), streaming=True), seed=0)
    with pytest.raises(ValueError, match="b.jsonl, row 1: no question"):
        load_data(DataConfig(data_path=write_rows(tmp_path / "b.jsonl", [{"answer": "1"}]), streaming=True), seed=0)
