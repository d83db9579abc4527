"""Canonical documents and their signatures."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.documents import canonical, digest, parse, sign, verify
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
