"""Canonical documents and their signatures."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.documents import canonical, digest, has_fields, is_hex, is_whole, parse, read, sign, verify
from obfuscatune.errors import IntegrityError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
DOCUMENTS = st.dictionaries(
    TEXT,
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXT,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=8,
    ),
    max_size=4,
)


@given(DOCUMENTS)
def test_the_canonical_bytes_are_read_back_and_are_the_only_ones(document):
    data = canonical(document)
    assert parse(data) == document
    assert canonical(parse(json.dumps(document, indent=1).encode())) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"1",
        b'{"a": 1, "a": 2}',
        b'{"a": 1.5}',
        b'{"a": NaN}',
        b'{"a": 1} {}',
        b'{"a": "\\ud800"}',
        b"\xff",
        b'{"a":' * 40 + b"1" + b"}" * 40,
        b"[" * 100_000,
    ],
)
def test_what_is_no_document_is_refused(data):
    with pytest.raises(IntegrityError):
        parse(data)


def test_a_document_that_is_too_long_is_not_parsed():
    with pytest.raises(IntegrityError, match="at most 10"):
        parse(b'{"a": "123456789"}', most_bytes=10)


def test_fractions_have_no_one_encoding_and_are_no_part_of_documents():
    with pytest.raises(ValueError, match="float"):
        canonical({"a": 0.5})


def test_a_signature_holds_for_its_document_its_key_and_its_purpose():
    key, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    trusted = {key.public_key().public_bytes_raw().hex()}
    signed = sign({"n": 1}, "receipt", key)
    assert verify(parse(canonical(signed)), "receipt", trusted) == {"n": 1}
    changed = [
        (signed, "grant", trusted),
        (signed, "receipt", {other.public_key().public_bytes_raw().hex()}),
        (signed, "receipt", set()),
        (signed | {"document": {"n": 2}}, "receipt", trusted),
        (signed | {"document": []}, "receipt", trusted),
        (signed | {"signature": "?"}, "receipt", trusted),
        (signed | {"signature": 5}, "receipt", trusted),
        (signed | {"key": []}, "receipt", trusted),
        (signed | {"more": 1}, "receipt", trusted),
        (sign({"n": 1}, "receipt", other) | {"key": signed["key"]}, "receipt", trusted),
    ]
    for document, purpose, keys in changed:
        with pytest.raises(IntegrityError):
            verify(document, purpose, keys)
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 2, "b": 2})


def test_a_file_is_read_as_far_as_a_document_may_go(tmp_path):
    path = tmp_path / "document.json"
    path.write_bytes(b'{"a": 1}')
    assert read(path) == {"a": 1}
    assert read(path, most_bytes=8) == {"a": 1}
    with pytest.raises(IntegrityError, match="at most 7 are read"):
        read(path, most_bytes=7)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


@pytest.mark.parametrize(
    ("value", "has"),
    [
        ({"n": 1, "text": "a"}, True),
        ({"n": True, "text": "a"}, False),
        ({"n": 1, "text": None}, False),
        ({"n": 1}, False),
        ({"n": 1, "text": "a", "more": 2}, False),
        ([("n", 1), ("text", "a")], False),
    ],
)
def test_fields_are_those_and_each_of_its_type(value, has):
    assert has_fields(value, {"n": int, "text": str}) is has


@pytest.mark.parametrize(
    ("value", "whole"), [(0, True), (3, True), (4, False), (-1, False), (True, False), ("1", False)]
)
def test_a_whole_number_is_in_its_range_and_no_bool(value, whole):
    assert is_whole(value, 0, 3) is whole


@pytest.mark.parametrize(
    "value", ["0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", "０" * 64, " " + "0" * 63, 0, None, b"0" * 64]
)
def test_what_is_no_lower_case_hex_of_that_size_is_refused(value):
    assert not is_hex(value)
    assert is_hex("0f" * 32) and is_hex("0f" * 16, 16) and not is_hex("0f" * 32, 16)
