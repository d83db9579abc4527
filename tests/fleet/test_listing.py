"""A list that is not exactly what an operator's tool writes is refused, by one error, whatever it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.errors import DiscoveryError
from obfuscatune.fleet.listing import MAX_LIST_BYTES, MAX_MEMBERS, format_list, parse_list
from tests.fleet.lists import certificate, document, entry, member

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


def test_what_is_formatted_is_parsed() -> None:
    members = [member(number) for number in range(3)]
    assert parse_list(format_list(members, ["cpu", "cuda:1", None])) == tuple(members)


def test_what_may_be_left_out_may_be_left_out() -> None:
    (found,) = parse_list(document(entry(memory=..., device=...)))
    assert found.memory is None


def two_certificates() -> str:
    return (certificate(0) + certificate(1)).decode()


@pytest.mark.parametrize(
    "changes",
    [
        {"address": "unix:/run/worker.sock"},
        {"address": "device:cuda:0"},
        {"address": "tcp:127.0.0.1:0"},
        {"address": "tcp:host name:7600"},
        {"address": "tcp:host\n:7600"},
        {"address": "tcp:" + "a" * 300 + ":7600"},
        {"address": ["tcp:127.0.0.1:7600"]},
        {"certificate": ""},
        {"certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"},
        {"certificate": two_certificates()},
        {"certificate": certificate(0).decode() + "and more"},
        {"certificate": certificate(0).decode().replace("\n", "\r\n")},
        {"certificate": None},
        {"operator": ""},
        {"operator": "cloud a"},
        {"operator": "x" * 41},
        {"party": "both"},
        {"party": ["compute"]},
        {"memory": 0},
        {"memory": True},
        {"memory": 2**60},
        {"memory": 1.5},
        {"memory": "1GiB"},
        {"device": "tpu"},
        {"device": 0},
        {"operator": ...},
        {"group": "a"},
    ],
    ids=lambda changes: str(changes)[:40],  # the beginning: a certificate is another one in each process
)
def test_a_field_outside_its_range_is_refused(changes: dict[str, Any]) -> None:
    parse_list(document(entry()))
    with pytest.raises(DiscoveryError):
        parse_list(document(entry(**changes)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"\x80\x04K\x01.",
        b'{"version": 1}',
        json.dumps({"version": True, "members": [entry()]}).encode(),
        b'{"version": 1, "version": 1, "members": []}',
        document(),
        json.dumps({"version": 2, "members": [entry()]}).encode(),
        json.dumps({"version": 1, "members": [entry()], "signature": ""}).encode(),
        document(*[entry()] * 2),
        document(entry(0), entry(1, address="tcp:127.0.0.1:7600")),
        document(entry(0), entry(0, address="tcp:127.0.0.1:7601")),
        document(*[entry()] * (MAX_MEMBERS + 1)),
        document(entry()) + b" " * MAX_LIST_BYTES,
        b"[" * 100_000,
    ],
    ids=lambda data: str(data[:30]),
)
def test_what_is_no_list_is_refused(data: bytes) -> None:
    with pytest.raises(DiscoveryError):
        parse_list(data)


def test_a_key_of_another_kind_is_refused_by_nothing_but_the_policy() -> None:
    """The list is of any certificates; which keys are trusted, the policy says."""
    from tests.protocol.test_authority import self_signed

    (found,) = parse_list(document(entry(certificate=self_signed(ec.generate_private_key(ec.SECP256R1())).decode())))
    assert found.certificate is not None


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_list_or_an_error(data: bytes) -> None:
    with pytest.raises(DiscoveryError):
        parse_list(data)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([*entry(), "other"]), value=json_values)
def test_any_value_of_any_field_is_a_member_or_an_error(name: str, value: Any) -> None:
    try:
        (found,) = parse_list(document(entry(**{name: value})))
    except DiscoveryError as error:
        assert str(error).isprintable()  # what a list holds is printed on a terminal
    else:
        assert found.party in ("compute", "mask")
        assert found.address.startswith("tcp:")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_list_that_was_damaged_is_a_list_or_an_error(draw: st.DataObject) -> None:
    data = bytearray(document(entry(0), entry(1)))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        parse_list(bytes(data))
    except DiscoveryError:
        return
