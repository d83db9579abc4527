"""docs/spec/attested-channel.md says what the code does: its vectors and its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.attest.binding import Binding
from obfuscatune.attest.claims import Claims
from obfuscatune.channel.hpke import SEALED_BYTES, SECRET_BYTES, release_info, seal, unseal
from obfuscatune.channel.messages import (
    ERRORS,
    HEADER_BYTES,
    KINDS,
    MOST_BYTES,
    MOST_REQUESTS,
    REFUSALS,
    Hello,
    MessageType,
    Reply,
    Request,
    pack,
    pack_error,
    parse_error,
    parse_header,
)
from obfuscatune.channel.server import ServerLimits
from obfuscatune.channel.session import EXPORTER_LABEL, PROTOCOL
from obfuscatune.errors import ChannelError

SPEC = (Path(__file__).parents[2] / "docs" / "spec" / "attested-channel.md").read_text("utf-8")
VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text("utf-8"))


def parse(data: bytes, expected: MessageType) -> Any:
    kind, length = parse_header(data[:HEADER_BYTES], frozenset({expected, MessageType.ERROR}))
    body = data[HEADER_BYTES:]
    assert len(body) == length
    if kind is MessageType.ERROR:
        return parse_error(body)
    if kind is MessageType.HELLO:
        return Hello.parse(body)
    return Request.parse(body, 1) if kind is MessageType.REQUEST else Reply.parse(body, 1)


@pytest.mark.parametrize("vector", VECTORS["messages"], ids=lambda it: it["name"].replace(" ", "-"))
def test_messages(vector: dict[str, Any]) -> None:
    data, expected = bytes.fromhex(vector["bytes"]), MessageType[vector["expected"]]
    if vector["error"] is None:
        found = parse(data, expected)
        assert (pack_error(*found) if expected is MessageType.ERROR else found.pack()) == data
    else:
        with pytest.raises(ChannelError, match=re.escape(vector["error"])):
            parse(data, expected)


def test_report_data() -> None:
    vector = VECTORS["report_data"]
    binding = Binding(*(bytes.fromhex(vector[name]) for name in ("exporter", "attester", "verifier", "nonce")))
    assert binding.report_data(Claims.from_bytes(vector["claims"].encode())).hex() == vector["report_data"]


def test_release() -> None:
    vector = VECTORS["release"]
    report_data = bytes.fromhex(vector["report_data"])
    info = release_info(vector["kind"], report_data, vector["sequence"], vector["document"].encode())
    key = X25519PrivateKey.from_private_bytes(bytes.fromhex(vector["private_key"]))
    assert info.hex() == vector["info"]
    assert unseal(bytes.fromhex(vector["sealed"]), key, info).hex() == vector["secret"]


def test_tables() -> None:
    messages = re.findall(r"^\| (\d) \| ([A-Z]+) \| \w+ \| (\d+) \| ([a-z, ]+) \|$", SPEC, re.MULTILINE)
    assert [(int(code), name, int(most)) for code, name, most, _ in messages] == [
        (it.value, it.name, MOST_BYTES[it]) for it in MessageType
    ]
    for (_, _, _, names), data in zip(
        messages,
        (
            Hello("enclave", bytes(32)).pack(),
            pack(MessageType.EVIDENCE, {"claims": {}, "evidence": {}}),
            Request(1, "status", {}, None).pack(),
            Reply(1, {}).pack(),
            pack_error("deadline", ""),
        ),
        strict=True,
    ):
        assert set(names.split(", ")) == set(json.loads(data[HEADER_BYTES:]))
    table = SPEC.split("| kind | from | sealed | document |\n|---|---|---|---|\n")[1].split("\n\n")[0]
    kinds = {row.split(" | ")[0].strip("| "): bool(row.split("|")[3].strip()) for row in table.splitlines()}
    assert kinds == KINDS
    for code in (*ERRORS, *REFUSALS):
        assert f"`{code}`" in SPEC
    limits = dict(re.findall(r"^\| (connections|step|idle|session|requests) \| (\d+)", SPEC, re.MULTILINE))
    found = ServerLimits()
    assert {name: float(value) for name, value in limits.items()} == {
        "connections": found.connections,
        "step": found.step_s,
        "idle": found.idle_s,
        "session": found.session_s,
        "requests": MOST_REQUESTS,
    }
    assert f"`{PROTOCOL.decode()}`" in SPEC and f'"{EXPORTER_LABEL.decode()}"' in SPEC
    assert f"{SEALED_BYTES} bytes" in SPEC and f"A secret MUST be {SECRET_BYTES} bytes" in SPEC


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=600), st.sampled_from(MessageType))
def test_any_bytes_are_a_message_or_refused(data: bytes, expected: MessageType) -> None:
    header = data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
    for parser in (
        lambda: parse_header(header, frozenset({expected})),
        lambda: Hello.parse(data),
        lambda: Request.parse(data, 1),
        lambda: Reply.parse(data, 1),
        lambda: parse_error(data),
    ):
        try:
            parser()
        except ChannelError as error:
            assert len(str(error)) < 700


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=1200))
def test_any_text_is_told_in_printable_ascii(text: str) -> None:
    code, told = parse_error(pack_error("internal", text)[HEADER_BYTES:])
    assert code == "internal" and len(told) <= 512 and all(" " <= it <= "~" for it in told)


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 79), st.integers(1, 255), st.binary(max_size=40))
def test_a_sealed_secret_opens_unchanged_alone(secret: bytes, place: int, change: int, info: bytes) -> None:
    key = X25519PrivateKey.generate()
    sealed = seal(secret, key.public_key().public_bytes_raw(), info)
    assert unseal(sealed, key, info) == secret
    changed = bytearray(sealed)
    changed[place] ^= change
    for wrong in (
        lambda: unseal(sealed, key, info + b"x"),
        lambda: unseal(sealed, X25519PrivateKey.generate(), info),
        lambda: unseal(sealed[:-1], key, info),
    ):
        with pytest.raises(ChannelError):
            wrong()
    if (place, change) != (31, 0x80):  # X25519 ignores the highest bit of a point (RFC 7748, section 5)
        with pytest.raises(ChannelError):
            unseal(bytes(changed), key, info)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_secret_of_another_length_is_not_sealed(size: int) -> None:
    with pytest.raises(ChannelError, match="32 bytes"):
        seal(bytes(size), X25519PrivateKey.generate().public_key().public_bytes_raw(), b"")


@pytest.mark.parametrize("public_key", [bytes(32), b"\1" + bytes(31), bytes(31)])
def test_a_key_of_small_order_is_none(public_key: bytes) -> None:
    with pytest.raises(ChannelError, match="no X25519 key"):
        seal(bytes(32), public_key, b"")


def test_a_message_that_is_too_long_is_not_sent() -> None:
    with pytest.raises(ChannelError, match="at most 262,144"):
        Request(1, "status", {"x": "y" * 2**18}, None).pack()
