"""CSV, Parquet, JSON arrays and saved data sets: the same records as from JSON Lines."""

import json
import sys

import pytest

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.training.data import Source
from obfuscatune.training.data_files import Completion, Conversation, Message


def records(path, split="train"):
    return list(Source.of(path, None, split).records())


@pytest.fixture
def table(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def test_csv_cells_are_text_as_it_stands(table):
    path = table("a.csv", b'\xef\xbb\xbfprompt,completion,id\r\n"Is ""it"",\nso?",007,1\r\n\r\nWhat?,NA,2\r\n')
    assert records(path) == [
        (f"{path}:2", Completion('Is "it",\nso?', "007")),
        (f"{path}:5", Completion("What?", "NA")),
    ]


def test_tsv_and_a_cell_larger_than_pythons_limit(table):
    path = table("a.tsv", b"text\tn\n" + b"a" * 200_000 + b"\t1\n")
    ((_, record),) = records(path)
    assert len(record.text) == 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no record"),
        (b"text\n", "holds no record"),
        (b"text,n\na\n", "a.csv:2: 1 cells, and the header has 2"),
        (b"text,text\na,b\n", "a.csv:1: the header names text twice"),
        (b"text,\na,b\n", "a.csv:1: column 2 of the header has no name"),
        (b'text\n"a\n', "a.csv:2: malformed CSV"),
        (b"text\n\xff\n", "not UTF-8"),
        (b"text\n \n", "a.csv:2: text is empty"),
    ],
)
def test_each_fault_of_a_csv_names_its_line(table, content, message):
    with pytest.raises(DataError, match=message):
        records(table("a.csv", content))


def test_a_json_array_is_read_with_line_numbers(table):
    rows = [{"instruction": "Who?", "output": "Lily"}, {"instruction": "Why?", "output": "Fun"}]
    path = table("a.json", b"\xef\xbb\xbf" + json.dumps(rows, indent=1).encode())
    found = records(path)
    assert [where for where, _ in found] == [f"{path}:2", f"{path}:6"]
    assert found[1][1] == Conversation((Message("user", "Why?"), Message("assistant", "Fun")))
    assert [record for _, record in records(table("a.jsonl", json.dumps(rows).encode()))] == [r for _, r in found]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "holds no record"),
        (b'[{"text": "a"}', "a.json:1: malformed JSON: expected a comma or the array's end"),
        (b'[{"text": "a"},\n3]', "a.json:2: expected a JSON object, found a number"),
        (b'[{"text": "a"},\n{"text":\n}]', "a.json:3: malformed JSON at column 1"),
        (b'[{"text": "a"}] 3', "malformed JSON"),
        (b'[{"text": "\\ud800"}]', "a.json:1: a .u escape"),
        (b'[{"text": "a", "text": "b"}]', "the key 'text' is given twice"),
        (b'["\n\n\xff"]', "a.json:3: not UTF-8: byte 1"),
        (b"\xff\xfe[\x00]\x00", "encoded in UTF-16; save it as UTF-8"),
    ],
)
def test_each_fault_of_an_array_names_its_line(table, content, message):
    with pytest.raises(DataError, match=message):
        records(table("a.json", content))


def test_parquet_holds_what_json_lines_hold(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Lily"}]},
        {"messages": [{"role": "assistant", "tool_calls": [call]}]},
    ]
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(path)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = records(path)
    assert [record for _, record in found] == [record for _, record in records(tmp_path / "a.jsonl")]
    assert [where for where, _ in found] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        records(path)


def test_a_saved_data_set_and_its_splits(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra `data` is not installed")
    one, other = (datasets.Dataset.from_list([{"prompt": "a", "completion": text}]) for text in ("b", "c"))
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(tmp_path / "both")
    one.save_to_disk(tmp_path / "one")
    for path, split, text in (("both", "train", "b"), ("both", "test", "c"), ("one", "test", "b")):
        assert [record for _, record in records(tmp_path / path, split)] == [Completion("a", text)]
    digests = {Source.of(tmp_path / name, None, "train").digest() for name in ("both", "one")}
    assert len(digests) == 2
    datasets.DatasetDict({"dev": one}).save_to_disk(tmp_path / "dev")
    with pytest.raises(DataError, match="has no split train, only dev"):
        records(tmp_path / "dev")


def test_without_the_extra_the_error_says_how_to_install_it(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"a.parquet: to read it, install the extra `data`: pip install"):
        records(table("a.parquet", b"PAR1"))
