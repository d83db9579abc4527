"""What messages carry that is no matrix, as bytes and back. Pure, as `messages`; bodies about adapters: `adapters`."""

import struct
from dataclasses import dataclass
from typing import ClassVar

from obfuscatune.wire.errors import MalformedMessage, UnsupportedVersion
from obfuscatune.wire.limits import MAX_IN_FLIGHT, MAX_MATRIX_BYTES, MAX_WINDOW_BYTES, VERSION

CONTENT_STORE = 1
"""Feature of a worker: it keeps matrices on disk by their content, and so wants the digest in an OFFER."""
SHARED_MEMORY = 2
"""Feature of a connection: SHARE is welcome on it."""
ACCELERATOR = 4
"""Feature of a worker: it computes on a device of its own, not on its host's processor."""
RETIRED = 8
"""Feature of workers before 2026-11-29, which nothing is made of."""
FEATURES = CONTENT_STORE | SHARED_MEMORY | ACCELERATOR | RETIRED
_HELLO = struct.Struct("<32sHH")
_WELCOME = struct.Struct("<HHIQQQ")
_PLACES = struct.Struct("<QQ")
_NUMBER = struct.Struct("<Q")
NUMBER_BYTES = _NUMBER.size


@dataclass(frozen=True, slots=True)
class Hello:
    """Payload of HELLO (36 bytes): who speaks, and which versions it speaks."""

    BYTES: ClassVar[int] = _HELLO.size
    session_id: bytes
    oldest: int = VERSION
    newest: int = VERSION

    def __repr__(self) -> str:
        return f"Hello(session_id=<secret>, oldest={self.oldest}, newest={self.newest})"

    def pack(self) -> bytes:
        """The payload as bytes."""
        return _HELLO.pack(self.session_id, self.oldest, self.newest)

    @classmethod
    def unpack(cls, body: bytes) -> "Hello":
        """Read 36 bytes.

        Raises:
            MalformedMessage: another length, or an empty range of versions.
        """
        if len(body) != cls.BYTES:
            raise MalformedMessage(f"the payload of HELLO has {cls.BYTES} bytes, {len(body)} came")
        hello = cls(*_HELLO.unpack(body))
        if hello.oldest > hello.newest:
            raise MalformedMessage(f"HELLO offers versions {hello.oldest} to {hello.newest}: an empty range")
        return hello


@dataclass(frozen=True, slots=True)
class Welcome:
    """Payload of WELCOME (32 bytes): the version that both speak, and what the worker takes."""

    BYTES: ClassVar[int] = _WELCOME.size
    version: int
    max_in_flight: int
    features: int
    window_bytes: int
    """Most payload of all MULTIPLY requests that await their reply."""
    matrix_bytes: int
    """Largest single matrix."""
    quota_bytes: int
    """Memory for the matrices of all sessions."""

    def pack(self) -> bytes:
        """The payload as bytes."""
        return _WELCOME.pack(
            self.version,
            self.max_in_flight,
            self.features,
            self.window_bytes,
            self.matrix_bytes,
            self.quota_bytes,
        )

    @classmethod
    def unpack(cls, body: bytes) -> "Welcome":
        """Read 32 bytes.

        Raises:
            UnsupportedVersion: the worker chose a version that was not offered.
            MalformedMessage: another length, unknown features, or limits that let nothing through or exceed the spec.
        """
        if len(body) != cls.BYTES:
            raise MalformedMessage(f"the payload of WELCOME has {cls.BYTES} bytes, {len(body)} came")
        welcome = cls(*_WELCOME.unpack(body))
        if welcome.version != VERSION:
            raise UnsupportedVersion(f"the worker chose version {welcome.version}, offered was {VERSION}")
        if welcome.features & ~FEATURES:
            raise MalformedMessage(f"WELCOME names unknown features {welcome.features:#x}")
        if not 1 <= welcome.max_in_flight <= MAX_IN_FLIGHT:
            raise MalformedMessage(f"WELCOME allows {welcome.max_in_flight} in flight: 1 to {MAX_IN_FLIGHT} may be")
        if not 1 <= welcome.window_bytes <= MAX_WINDOW_BYTES or not 1 <= welcome.matrix_bytes <= MAX_MATRIX_BYTES:
            raise MalformedMessage("WELCOME states a window or a matrix size outside the limits of the protocol")
        return welcome


@dataclass(frozen=True, slots=True)
class Places:
    """Payload of a MULTIPLY in shared memory (16 bytes): where its rows lie, and where the product is to be laid."""

    BYTES: ClassVar[int] = _PLACES.size
    rows: int
    product: int

    def pack(self) -> bytes:
        """The payload as bytes."""
        return _PLACES.pack(self.rows, self.product)

    @classmethod
    def unpack(cls, body: bytes) -> "Places":
        """Read 16 bytes; that they lie within the memory is for whoever has it to check."""
        return cls(*_PLACES.unpack(body))


def pack_number(number: int) -> bytes:
    """Payload of SHARE: bytes of the memory whose descriptor comes with it. Of a STORE in it: where the matrix lies."""
    return _NUMBER.pack(number)


def unpack_number(body: bytes) -> int:
    """Read 8 bytes."""
    return int(_NUMBER.unpack(body)[0])


def error_text(body: bytes) -> str:
    """The text of an ERROR: printable ASCII and nothing else, for it ends up on a terminal.

    Raises:
        MalformedMessage: any other byte.
    """
    if not all(0x20 <= byte < 0x7F for byte in body):
        raise MalformedMessage("the text of an ERROR is printable ASCII; other bytes came")
    return body.decode("ascii")
