"""The messages of docs/spec/attested-channel.md: a header of 12 bytes, then one canonical JSON object.

Pure functions over bytes; a header is checked whole before its body is read.
"""

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from obfuscatune import documents
from obfuscatune.channel.hpke import SEALED_BYTES
from obfuscatune.errors import ChannelError, IntegrityError

MAGIC = b"OBAC"
VERSION = 1
_HEADER = struct.Struct(">4sBBHI")
HEADER_BYTES = _HEADER.size
MOST_TEXT = 512
"""Characters of an error's text."""
MOST_REQUESTS = 256
"""In one session."""


class MessageType(IntEnum):
    """The five messages, in the order in which a session has them."""

    HELLO = 1
    EVIDENCE = 2
    REQUEST = 3
    REPLY = 4
    ERROR = 5


MOST_BYTES = {
    MessageType.HELLO: 512,
    MessageType.EVIDENCE: 2**20,
    MessageType.REQUEST: 2**18,
    MessageType.REPLY: 2**20,
    MessageType.ERROR: 4096,
}
"""Of a body. Who has not verified, or has not been verified, cannot make the other side allocate more."""

KINDS = {"grant": True, "owner-key": True, "revoke": False, "consent": False, "status": False}
"""Of a request, and whether a sealed secret comes with it."""

REFUSALS = ("terms", "integrity", "refused", "internal")
"""Codes of a request that was understood and refused; the session goes on."""
ERRORS = ("malformed", "deadline", "evidence", "stopping", "internal")
"""Codes of an ERROR; the session is over."""


def pack(kind: MessageType, body: Mapping[str, Any]) -> bytes:
    """A message, whole.

    Raises:
        ChannelError: it is longer than one of its type may be.
    """
    data = documents.canonical(dict(body))
    if len(data) > MOST_BYTES[kind]:
        raise ChannelError(f"{kind.name} of {len(data):,} bytes; at most {MOST_BYTES[kind]:,} may be sent")
    return _HEADER.pack(MAGIC, VERSION, kind, 0, len(data)) + data


def parse_header(header: bytes, expected: frozenset[MessageType]) -> tuple[MessageType, int]:
    """The type of the message and the length of its body.

    Raises:
        ChannelError: it is none, out of turn, or longer than its type may be.
    """
    magic, version, kind, reserved, length = _HEADER.unpack(header)
    if magic != MAGIC:
        raise ChannelError(f"expected a message of the attested channel, found {magic!r}")
    if version != VERSION:
        raise ChannelError(f"expected version {VERSION} of the attested channel, found {version}")
    wanted = " or ".join(sorted(it.name for it in expected))
    if kind not in expected:
        raise ChannelError(f"expected {wanted}, found message type {kind}")
    if reserved:
        raise ChannelError(f"the reserved field is {reserved}, and has to be 0")
    if length > MOST_BYTES[MessageType(kind)]:
        raise ChannelError(f"{wanted} of {length:,} bytes; at most {MOST_BYTES[MessageType(kind)]:,} are read")
    return MessageType(kind), length


def parse_body(data: bytes, fields: frozenset[str]) -> dict[str, Any]:
    """A body: canonical, and with these fields exactly.

    Raises:
        ChannelError: anything else.
    """
    try:
        body = documents.parse(data, most_bytes=max(MOST_BYTES.values()))
        if documents.canonical(body) != data:
            raise ChannelError("a body that is not in canonical form")
    except (IntegrityError, ValueError) as error:
        raise ChannelError(f"a body that is no document: {error}") from error
    if set(body) != fields:
        raise ChannelError(f"expected the fields {', '.join(sorted(fields))}, found {sorted(body)!r:.200}")
    return body


@dataclass(frozen=True, slots=True)
class Hello:
    """The verifier asks for evidence of a role, for its nonce."""

    role: str
    nonce: bytes

    def pack(self) -> bytes:
        """The message."""
        return pack(MessageType.HELLO, {"version": VERSION, "role": self.role, "nonce": self.nonce.hex()})

    @classmethod
    def parse(cls, data: bytes) -> "Hello":
        """Raises ChannelError: it is none of this version."""
        body = parse_body(data, frozenset({"version", "role", "nonce"}))
        if not documents.is_whole(body["version"], VERSION, VERSION):
            raise ChannelError(f"expected version {VERSION} of the attested channel, found {body['version']!r:.20}")
        if not (isinstance(body["role"], str) and re.fullmatch(r"[a-z][a-z-]{0,31}", body["role"])):
            raise ChannelError("a role has 1 to 32 small letters and dashes")
        if not documents.is_hex(body["nonce"]):
            raise ChannelError("nonce: expected 64 small hexadecimal digits")
        return cls(body["role"], bytes.fromhex(body["nonce"]))


@dataclass(frozen=True, slots=True)
class Request:
    """One request, and what it carries."""

    sequence: int
    kind: str
    document: dict[str, Any]
    sealed: bytes | None

    def pack(self) -> bytes:
        """The message."""
        sealed = None if self.sealed is None else base64.b64encode(self.sealed).decode()
        body = {"sequence": self.sequence, "kind": self.kind, "document": self.document, "sealed": sealed}
        return pack(MessageType.REQUEST, body)

    @classmethod
    def parse(cls, data: bytes, sequence: int) -> "Request":
        """Raises ChannelError: it is none, or not the one with this number."""
        body = parse_body(data, frozenset({"sequence", "kind", "document", "sealed"}))
        kind = body["kind"]
        _check_sequence(body["sequence"], sequence)
        if not isinstance(kind, str) or kind not in KINDS:
            raise ChannelError(f"expected a request of {', '.join(KINDS)}, found {kind!r:.40}")
        if not isinstance(body["document"], dict):
            raise ChannelError("the document of a request is an object")
        if KINDS[kind] != (body["sealed"] is not None):
            raise ChannelError(f"{kind} comes {'with' if KINDS[kind] else 'without'} a sealed secret")
        return cls(sequence, kind, body["document"], None if body["sealed"] is None else _base64(body["sealed"]))


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request: a result, or why it was refused."""

    sequence: int
    result: dict[str, Any] | None
    refusal: tuple[str, str] | None = None
    """Code and text."""

    def pack(self) -> bytes:
        """The message."""
        refusal = None if self.refusal is None else {"code": self.refusal[0], "text": _text(self.refusal[1])}
        return pack(MessageType.REPLY, {"sequence": self.sequence, "result": self.result, "refusal": refusal})

    @classmethod
    def parse(cls, data: bytes, sequence: int) -> "Reply":
        """Raises ChannelError: it is none, or not to the request with this number."""
        body = parse_body(data, frozenset({"sequence", "result", "refusal"}))
        _check_sequence(body["sequence"], sequence)
        result, refusal = body["result"], body["refusal"]
        if isinstance(result, dict) and refusal is None:
            return cls(sequence, result)
        if result is None and isinstance(refusal, dict) and set(refusal) == {"code", "text"}:
            return cls(sequence, None, _reason(refusal, REFUSALS))
        raise ChannelError("a reply has a result or a refusal")


def pack_error(code: str, text: str) -> bytes:
    """An ERROR: the last message of a session."""
    return pack(MessageType.ERROR, {"code": code, "text": _text(text)})


def parse_error(data: bytes) -> tuple[str, str]:
    """Code and text of an ERROR. Raises ChannelError: it is none."""
    return _reason(parse_body(data, frozenset({"code", "text"})), ERRORS)


def _reason(body: Mapping[str, Any], codes: tuple[str, ...]) -> tuple[str, str]:
    code, text = body["code"], body["text"]
    if code not in codes or not isinstance(text, str) or text != _text(text):
        raise ChannelError("an error without a known code and a printable text")
    return code, text


def _text(text: str) -> str:
    """One line of printable ASCII: the other side's terminal is not for us to write to."""
    line = " ".join(text.split())[:MOST_TEXT]
    return "".join(character if " " <= character <= "~" else "?" for character in line).strip()


def _check_sequence(found: Any, expected: int) -> None:
    if not documents.is_whole(found, expected, expected):
        raise ChannelError(f"expected the message with number {expected}, found {found!r:.20}")


def _base64(text: Any) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError) as error:
        raise ChannelError("a sealed secret that is no base64") from error
    if len(data) != SEALED_BYTES or base64.b64encode(data).decode() != text:
        raise ChannelError(f"a sealed secret is {SEALED_BYTES} bytes in canonical base64")
    return data
