"""Claims, evidence and binding: one encoding, read strictly."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.attest.binding import Binding
from obfuscatune.attest.checks import Checks
from obfuscatune.attest.claims import Claims
from obfuscatune.attest.evidence import KINDS, MOST_BYTES, Evidence
from obfuscatune.documents import canonical
from obfuscatune.errors import EvidenceError
from tests.attest.made import BINDING, CLAIMS, KEY, REPORT_DATA

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PARTS = st.builds(
    Evidence,
    st.sampled_from(KINDS),
    st.binary(max_size=40),
    st.lists(st.binary(max_size=20), max_size=3).map(tuple),
    st.dictionaries(TEXT, TEXT, max_size=3),
)
EVIDENCE = st.builds(replace, PARTS, parts=st.lists(PARTS, max_size=3).map(tuple))
CLAIMS_MADE = st.builds(
    lambda arguments, environment, profile: replace(
        CLAIMS, arguments=arguments, environment=environment, profile=profile
    ),
    st.lists(TEXT, max_size=3).map(tuple),
    st.dictionaries(TEXT, TEXT, max_size=3),
    st.sampled_from(["paper", "private", "guarded", "enclave"]),
)


@settings(max_examples=50, deadline=None)
@given(EVIDENCE)
def test_evidence_is_read_back(evidence):
    assert Evidence.from_bytes(evidence.to_bytes()) == evidence


@settings(max_examples=50, deadline=None)
@given(CLAIMS_MADE)
def test_claims_are_read_back_and_their_digest_is_of_the_bytes(claims):
    data = claims.to_bytes()
    assert Claims.from_bytes(data) == claims
    assert claims.digest == hashlib.sha256(data).digest()


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_document_are_refused(data):
    for read in (Evidence.from_bytes, Claims.from_bytes):
        with pytest.raises(EvidenceError):
            read(data)


_JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT, lambda it: st.lists(it, max_size=2) | st.dictionaries(TEXT, it)
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(CLAIMS.to_document())), _JUNK)
def test_claims_with_any_other_value_in_a_field_are_refused_or_read_as_they_are(name, junk):
    data = canonical(CLAIMS.to_document() | {name: junk})
    with contextlib.suppress(EvidenceError):
        assert Claims.from_bytes(data).to_bytes() == data


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["version", "kind", "quote", "certificates", "collateral", "parts"]), _JUNK)
def test_evidence_with_any_other_value_in_a_field_is_refused_or_read_as_it_is(name, junk):
    document = Evidence("tdx", b"quote").to_document() | {name: junk}
    with contextlib.suppress(EvidenceError):
        assert Evidence.from_bytes(canonical(document)).to_document() == document


@pytest.mark.parametrize("name", sorted(CLAIMS.to_document()))
def test_claims_take_every_field_and_no_other(name):
    document = CLAIMS.to_document()
    with pytest.raises(EvidenceError, match="unknown field"):
        Claims.from_bytes(canonical(document | {name + "x": 1}))
    del document[name]
    with pytest.raises(EvidenceError, match="missing field"):
        Claims.from_bytes(canonical(document))


def test_other_bytes_of_the_same_claims_are_refused():
    with pytest.raises(EvidenceError, match="canonical"):
        Claims.from_bytes(json.dumps(CLAIMS.to_document()).encode())


def test_claims_that_are_too_large_are_refused():
    with pytest.raises(EvidenceError, match="more than"):
        replace(CLAIMS, arguments=("x" * 300_000,))


@pytest.mark.parametrize("name", ["configuration", "http_key", "hpke_key", "signing_key", "boot"])
@pytest.mark.parametrize("value", ["", "00", "AA" * 32, "00" * 32 + "\n", "zz" * 32])
def test_keys_and_digests_are_32_bytes_of_lower_case_hex(name, value):
    with pytest.raises(EvidenceError, match=name):
        replace(CLAIMS, **{name: value})


def test_evidence_is_bounded():
    with pytest.raises(EvidenceError, match="at most"):
        Evidence("tdx", bytes(MOST_BYTES)).to_bytes()
    with pytest.raises(EvidenceError, match="at most"):
        Evidence.from_bytes(b" " * (MOST_BYTES + 1))
    with pytest.raises(EvidenceError, match="parts"):
        Evidence("tdx", b"", parts=(Evidence("nvidia", b""),) * 17)
    with pytest.raises(EvidenceError, match="no parts"):
        Evidence("tdx", b"", parts=(Evidence("nvidia", b"", parts=(Evidence("tpm", b""),)),))


def test_the_report_data_is_over_length_prefixed_fields():
    fields = [b"obfuscatune/attest/v1", b"enclave", b"\1" * 32, b"\2" * 32, b"\3" * 32, b"\4" * 32, CLAIMS.digest]
    joined = b"".join(len(it).to_bytes(4, "big") + it for it in fields)
    assert hashlib.sha512(joined).digest() == REPORT_DATA


@pytest.mark.parametrize("name", ["exporter", "attester", "verifier", "nonce"])
def test_every_field_changes_the_report_data(name):
    assert replace(BINDING, **{name: b"\xff" * 32}).report_data(CLAIMS) != REPORT_DATA
    assert BINDING.report_data(replace(CLAIMS, boot="00" * 32)) != REPORT_DATA
    with pytest.raises(EvidenceError, match=name):
        replace(BINDING, **{name: b"short"})


def test_a_binding_is_read_back_strictly():
    document = BINDING.to_document()
    assert Binding.from_document(document) == BINDING
    for broken in ({"label": "other"}, {"nonce": "zz"}, {"nonce": 1}, {"more": ""}):
        with pytest.raises(EvidenceError):
            Binding.from_document(document | broken)


def test_what_an_attester_sends_cannot_write_to_a_terminal():
    checks = Checks()
    checks.one_of("key", "\x1b[2J\u202e" + "x" * 1000, ["good"])
    line = str(checks.all[0])
    assert line.isascii() and line.isprintable() and len(line) < 600


def test_a_producer_takes_64_bytes():
    from obfuscatune.attest.simulated import Simulated

    with pytest.raises(EvidenceError, match="64 bytes"):
        Simulated(KEY).attest(bytes(63))
