"""JSON Lines: what is read is what was written, and every fault names its line."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import DataError
from obfuscatune.training.data_files import MAX_LINE_BYTES, file_digest, read_jsonl

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(), json_values, max_size=4)


@given(
    st.lists(objects, min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n", b"\n\n \n"]),
    st.booleans(),
)
def test_reads_what_was_written(tmp_path_factory, records, ascii_only, ending, ended):
    path = tmp_path_factory.mktemp("jsonl") / "records.jsonl"
    lines = [json.dumps(record, ensure_ascii=ascii_only).encode() for record in records]
    path.write_bytes(ending.join(lines) + (ending if ended else b""))
    assert [line.fields for line in read_jsonl(path)] == records


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_with_their_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("jsonl") / "any.jsonl"
    path.write_bytes(content)
    try:
        for line in read_jsonl(path):
            json.dumps(line.fields, allow_nan=False).encode()
    except DataError as error:
        assert str(path) in str(error)


def test_a_byte_order_mark_in_front_is_passed_over(jsonl: Callable[..., Path]):
    path = jsonl(b'\xef\xbb\xbf{"a": 1}\r\n{"b": 2}\r\n')
    assert [line.fields for line in read_jsonl(path)] == [{"a": 1}, {"b": 2}]
    with pytest.raises(DataError, match="encoded in UTF-16; save it as UTF-8"):
        list(read_jsonl(jsonl('{"a": 1}\n'.encode("utf-16"))))


def test_a_nul_is_a_character_and_no_end(jsonl: Callable[..., Path]):
    assert next(read_jsonl(jsonl({"text": "a\0b"}))).fields == {"text": "a\0b"}
    with pytest.raises(DataError, match="1: malformed JSON"):
        list(read_jsonl(jsonl(b'{"text": "a\0b"}\n')))


def test_line_numbers_count_empty_lines(jsonl: Callable[..., Path]):
    path = jsonl({"a": 1}, b"\n", b"  \r\n", {"b": 2})
    assert [line.where for line in read_jsonl(path)] == [f"{path}:1", f"{path}:4"]


def test_unicode_line_separators_do_not_end_a_line(jsonl: Callable[..., Path]):
    path = jsonl('{"text": "a\u2028b\u0085c"}'.encode())
    assert next(read_jsonl(path)).fields == {"text": "a\u2028b\u0085c"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b'{"text": "a"', "malformed JSON at column 13"),
        (b'{"text": "a",}', "malformed JSON at column"),
        (b"{'text': 'a'}", "malformed JSON at column 2"),
        (b"plain words", "malformed JSON at column 1"),
        (b'{"text": NaN}', "NaN is not JSON"),
        (b'{"text": -Infinity}', "-Infinity is not JSON"),
        (b'{"text": "a", "text": "b"}', "the key 'text' is given twice"),
        (b'{"text": "\xff"}', "not UTF-8: byte 11 of the line is 0xff"),
        (b'\xef\xbb\xbf{"text": "a"}', "malformed JSON at column 1: Unexpected UTF-8 BOM"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'["text"]', "expected a JSON object, found an array"),
        (b'"text"', "expected a JSON object, found a string"),
        (b"null", "expected a JSON object, found null"),
        (b"3", "expected a JSON object, found a number"),
        (b"true", "expected a JSON object, found a boolean"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "malformed JSON: Exceeds the limit"),
    ],
)
def test_each_malformed_line_is_named(jsonl: Callable[..., Path], bad: bytes, message: str):
    path = jsonl({"text": "fine"}, bad)
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_a_surrogate_pair_is_a_character(jsonl: Callable[..., Path]):
    assert next(read_jsonl(jsonl(b'{"text": "\\ud83d\\ude00"}'))).fields == {"text": "\U0001f600"}


def test_a_line_without_end_is_refused_before_it_is_read_whole(jsonl: Callable[..., Path]):
    path = jsonl(b'{"text": "' + b"a" * MAX_LINE_BYTES + b'"}')
    with pytest.raises(DataError, match=f"longer than {MAX_LINE_BYTES} bytes"):
        list(read_jsonl(path))


@pytest.mark.parametrize("content", [b"", b"\n\n", b" \r\n"])
def test_an_empty_set_is_refused(jsonl: Callable[..., Path], content: bytes):
    with pytest.raises(DataError, match="holds no record"):
        list(read_jsonl(jsonl(content)))


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            list(read_jsonl(path))
        with pytest.raises(DataError, match="cannot be read"):
            file_digest(path)


def test_digest_is_of_the_bytes(jsonl: Callable[..., Path]):
    path = jsonl({"text": "a"})
    assert file_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
