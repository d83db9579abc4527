"""docs/spec/wire.md says what the code does: its vectors, its limits, its tables of messages and errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from obfuscatune import errors
from obfuscatune.errors import WireError
from obfuscatune.protocol import limits
from obfuscatune.protocol.framing import recv_body, recv_header
from obfuscatune.protocol.messages import FORMS, HEADER_BYTES, REPLIES, REQUESTS, ErrorCode, Header, MessageType
from obfuscatune.protocol.payloads import Attachment, Hello, Offer, Step, Welcome, error_text
from obfuscatune.protocol.tensors import DType
from obfuscatune.protocol.transport import NEVER, Deadline

SPEC = (Path(__file__).parents[2] / "docs" / "spec" / "wire.md").read_text()
VECTORS = {
    name: (direction, expected, bytes.fromhex(digits))
    for name, direction, expected, digits in re.findall(
        r"^([\w-]+) (request|reply) (\w+)\n((?: {4}[0-9a-f]+\n)+)",
        SPEC.split("```vectors\n")[1].split("```")[0],
        re.MULTILINE,
    )
}


class _Tape:
    """The bytes of one vector."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def send(self, buffers: object, deadline: Deadline) -> None:
        raise NotImplementedError

    def recv_into(self, view: memoryview, deadline: Deadline) -> int:
        came = min(len(view), len(self._data))
        view[:came] = self._data[:came]
        self._data = self._data[came:]
        return came

    def stop_sending(self) -> None: ...

    def shutdown(self) -> None: ...

    def close(self) -> None: ...


def parse(direction: str, data: bytes) -> tuple[Header, bytes]:
    tape = _Tape(data)
    header = recv_header(tape, REQUESTS if direction == "request" else REPLIES)
    body = recv_body(tape, header, NEVER)
    if header.type is MessageType.HELLO:
        Hello.unpack(body)
    elif header.type is MessageType.WELCOME:
        Welcome.unpack(body)
    elif header.type is MessageType.OFFER:
        Offer.unpack(body)
    elif header.type is MessageType.ATTACH:
        Attachment.unpack(body, header.cols)
    elif header.type is MessageType.STEP:
        Step.unpack(body)
    elif header.type is MessageType.ERROR:
        error_text(body)
    return header, body


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name: str) -> None:
    direction, expected, data = VECTORS[name]
    if expected == "ok":
        header, body = parse(direction, data)
        assert header.pack() + body == data
        return
    with pytest.raises(WireError) as caught:
        parse(direction, data)
    assert type(caught.value).__name__ == expected


def test_the_crossing_in_the_vectors_is_right() -> None:
    """[1 1] times [[1 2 3] [4 5 6]]."""
    import struct

    assert struct.unpack("<6f", VECTORS["store"][2][HEADER_BYTES:]) == (1, 2, 3, 4, 5, 6)
    assert struct.unpack("<2f", VECTORS["multiply"][2][HEADER_BYTES:]) == (1, 1)
    assert struct.unpack("<3f", VECTORS["product"][2][HEADER_BYTES:]) == (5, 7, 9)


def test_vectors_cover_every_message_and_error() -> None:
    kinds = {data[5] for _, expected, data in VECTORS.values() if expected == "ok"}
    replies = {MessageType.HAVE}  # the same as WANT, but for its code
    assert kinds | replies == set(MessageType)
    named = {expected for _, expected, _ in VECTORS.values()} - {"ok"}
    assert named == {"BadMagic", "UnsupportedVersion", "MalformedMessage", "LimitExceeded", "Truncated"}
    assert all(issubclass(getattr(errors, name), errors.ProtocolError) for name in named)


def _table(heading: str) -> list[list[str]]:
    section = re.split(r"\n##+ ", SPEC.split(f"# {heading}\n")[1])[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


def test_limits_are_those_of_the_code() -> None:
    stated = {name: float(value) for name, value, *_ in _table("Limits")}
    units = {"KIB", "MIB", "GIB", "VERSION"}
    assert stated == {
        name: float(getattr(limits, name)) for name in vars(limits) if name.isupper() and name not in units
    }


def test_messages_and_errors_are_those_of_the_code() -> None:
    assert {name: int(code) for code, name, *_ in _table("Messages")} == {kind.name: kind.value for kind in MessageType}
    for _, name, side, *_ in _table("Messages"):
        assert (MessageType[name] in REQUESTS) == (side == "enclave")
    assert {name: int(code) for code, name, *_ in _table("Errors")} == {code.name: code.value for code in ErrorCode}
    assert set(FORMS) == set(MessageType)


def test_layout_is_that_of_the_code() -> None:
    rows = _table("Layout")
    offset = 0
    for at, size, *_ in rows:
        assert int(at) == offset
        offset += int(size)
    assert offset == HEADER_BYTES
    codes = dict(re.findall(r"(\d) (\w+)", next(row[3] for row in rows if row[2] == "dtype")))
    assert {int(code): name.upper() for code, name in codes.items()} == {code.value: code.name for code in DType}
