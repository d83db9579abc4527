"""Evidence files and verification documents: a third person verifies again, offline."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.attest.record import Session, Verification, examine, read_record, to_file_bytes
from obfuscatune.attest.simulated import Simulated
from obfuscatune.documents import canonical, parse
from obfuscatune.errors import ConfigError, EvidenceError, VerificationFailed
from tests.attest.made import BINDING, CLAIMS, KEY, NOW, REPORT_DATA, policy

SESSION = Session(Simulated(KEY).attest(REPORT_DATA), CLAIMS, BINDING, NOW)
GOOD = examine(SESSION, policy(), NOW + 5)
BAD = examine(SESSION, policy(allow_simulated=False), NOW + 5)


def read_back(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    return read_record(path)


def test_a_session_is_read_back_and_verified(tmp_path):
    found = read_back(tmp_path, to_file_bytes(SESSION))
    assert found == SESSION
    assert found.verify(policy(), NOW).claims == CLAIMS
    with pytest.raises(VerificationFailed):
        replace(SESSION, obtained=NOW - 4000).verify(policy(), NOW)


@pytest.mark.parametrize("made", [GOOD, BAD])
def test_a_verification_is_read_back_and_repeated(tmp_path, made):
    found = read_back(tmp_path, to_file_bytes(made))
    assert isinstance(found, Verification)
    assert found == made
    assert found.repeat() == made
    assert (found.passed, found.simulated) == (made is GOOD, True)


def test_a_document_without_checks_has_not_passed():
    assert not replace(GOOD, checks=()).passed


def test_malformed_evidence_is_a_check_that_fails():
    evidence = replace(SESSION.evidence, quote=b"junk")
    found = examine(replace(SESSION, evidence=evidence), policy(), NOW)
    assert [(check.name, check.passed) for check in found.checks] == [("evidence", False)]


@pytest.mark.parametrize(
    "change",
    [
        {"passed": False},
        {"simulated": False},
        {"policy_digest": "00" * 32},
        {"checks": []},
        {"checks": [{"name": "x", "passed": True}]},
        {"policy": {}},
        {"policy": GOOD.policy.to_document() | {"allow_simulated": False}},
        {"time": "now"},
        {"version": 2},
        {"more": 1},
    ],
)
def test_a_document_that_contradicts_itself_is_refused(change):
    with pytest.raises(EvidenceError):
        Verification.from_document(GOOD.to_document() | change)


def test_checks_that_were_written_by_hand_are_found_out():
    forged = BAD.to_document()
    for check in forged["checks"]:
        check["passed"] = True
    found = Verification.from_document(forged | {"passed": True})
    assert found.passed
    assert found.repeat().checks != found.checks
    assert not found.repeat().passed


def test_checks_cannot_write_to_a_terminal():
    document = GOOD.to_document()
    document["checks"][0]["found"] = "\x1b[2J"
    assert all(str(check).isprintable() for check in Verification.from_document(document).checks)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"type": "other"}', b"[" * 9000, b" " * 5_000_000])
def test_what_is_no_record_is_refused(tmp_path, content):
    with pytest.raises(EvidenceError):
        read_back(tmp_path, content)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_record(tmp_path / "absent.json")


WHOLE = parse(canonical(GOOD.to_document()))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_document_with_junk_in_a_field_is_refused_or_read(data):
    document = json.loads(json.dumps(WHOLE))
    part = document
    while True:
        key = data.draw(st.sampled_from(sorted(part)))
        if not isinstance(part[key], dict) or not part[key] or data.draw(st.booleans()):
            break
        part = part[key]
    part[key] = data.draw(st.none() | st.booleans() | st.integers() | st.just("x") | st.just([]) | st.just({}))
    try:
        found = Verification.from_document(document)
    except EvidenceError:
        return
    found.repeat()
