"""Payloads of messages that are not matrices, packed to bytes and unpacked. No I/O, as in `messages`.

`Attachment` and `Step` are for adapters on the worker. An adapter has a slice for each layer that shares the matrix:

    y* = x* W* + s · drop(x*) A* B*       on the columns first .. first + width of W* (p, q), for each slice

all in the transformed basis: A* (p, r), B* (r, width).
"""

import math
import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, ClassVar

from obfuscatune.errors import LimitExceeded, MalformedMessage, UnsupportedVersion
from obfuscatune.protocol.limits import MAX_IN_FLIGHT, MAX_MATRIX_BYTES, MAX_RANK, MAX_SLICES, MAX_WINDOW_BYTES, VERSION

CONTENT_STORE = 1
"""Feature of a worker: it keeps matrices on disk by their content, and needs the digest in an OFFER."""
SHARED_MEMORY = 2
"""Feature of a connection: it accepts SHARE."""
ACCELERATOR = 4
"""Feature of a worker: it computes on a device of its own, not on its host's processor."""
RETIRED = 8
"""Feature of workers before 2026-11-29; it is accepted and ignored."""
SERVES_WEIGHTS = 16
"""Feature of a worker: it has published weights, and an OFFER may name those that a matrix is made of."""
FEATURES = CONTENT_STORE | SHARED_MEMORY | ACCELERATOR | RETIRED | SERVES_WEIGHTS
DIGEST_BYTES = 32
NO_DIGEST = bytes(DIGEST_BYTES)
_PLACES = struct.Struct("<QQ")
_NUMBER = struct.Struct("<Q")
NUMBER_BYTES = _NUMBER.size


class _FixedPayload:
    """A payload of fixed size: the fields of a dataclass, in the order of `LAYOUT`."""

    __slots__ = ()
    NAME: ClassVar[str]
    """The message that carries it."""
    LAYOUT: ClassVar[struct.Struct]
    BYTES: ClassVar[int]

    def pack(self) -> bytes:
        """The payload as bytes."""
        return self.LAYOUT.pack(*(getattr(self, field.name) for field in fields(self)))  # type: ignore[arg-type]

    @classmethod
    def _values(cls, body: bytes) -> tuple[Any, ...]:
        """The fields' values.

        Raises:
            MalformedMessage: another length.
        """
        if len(body) != cls.BYTES:
            raise MalformedMessage(f"the payload of {cls.NAME} has {cls.BYTES} bytes, {len(body)} came")
        return cls.LAYOUT.unpack(body)


@dataclass(frozen=True, slots=True)
class Hello(_FixedPayload):
    """Payload of HELLO (36 bytes): the session, and the range of versions that the enclave speaks."""

    NAME = "HELLO"
    LAYOUT = struct.Struct("<32sHH")
    BYTES = LAYOUT.size
    session_id: bytes
    oldest: int = VERSION
    newest: int = VERSION

    def __repr__(self) -> str:
        return f"Hello(session_id=<secret>, oldest={self.oldest}, newest={self.newest})"

    @classmethod
    def unpack(cls, body: bytes) -> "Hello":
        """Read 36 bytes.

        Raises:
            MalformedMessage: another length, or an empty range of versions.
        """
        hello = cls(*cls._values(body))
        if hello.oldest > hello.newest:
            raise MalformedMessage(f"HELLO offers versions {hello.oldest} to {hello.newest}: an empty range")
        return hello


@dataclass(frozen=True, slots=True)
class Welcome(_FixedPayload):
    """Payload of WELCOME (32 bytes): the version of the connection, and the worker's limits.

    Attributes:
        max_in_flight: most requests in flight.
        features: bits of `FEATURES`.
        window_bytes: most payload of all MULTIPLY requests in flight.
        matrix_bytes: largest single matrix.
        quota_bytes: memory for the matrices of all sessions.
    """

    NAME = "WELCOME"
    LAYOUT = struct.Struct("<HHIQQQ")
    BYTES = LAYOUT.size
    version: int
    max_in_flight: int
    features: int
    window_bytes: int
    matrix_bytes: int
    quota_bytes: int

    @classmethod
    def unpack(cls, body: bytes) -> "Welcome":
        """Read 32 bytes.

        Raises:
            UnsupportedVersion: the worker chose a version that was not offered.
            MalformedMessage: another length, unknown features, or limits that are 0 or exceed the protocol's.
        """
        welcome = cls(*cls._values(body))
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
class Offer:
    """Payload of OFFER: what a matrix is called by who may have it already.

    Attributes:
        content: digest of the matrix, by `tensors.content_digest`; `NO_DIGEST` where the worker need not know it.
        weights: of the published weights that lie side by side in it, in this order, by `tensors.weight_digest`; none
            where it is no published one.
    """

    content: bytes = NO_DIGEST
    weights: tuple[bytes, ...] = ()

    @staticmethod
    def size(weights: int) -> int:
        """Bytes of an OFFER that names so many weights."""
        return DIGEST_BYTES * (1 + weights)

    def pack(self) -> bytes:
        """The payload as bytes."""
        return b"".join((self.content, *self.weights))

    @classmethod
    def unpack(cls, body: bytes) -> "Offer":
        """Read an OFFER, of a length within the limits.

        Raises:
            MalformedMessage: not a whole number of digests.
        """
        if not body or len(body) % DIGEST_BYTES:
            raise MalformedMessage(f"OFFER has {DIGEST_BYTES} bytes for each digest, {len(body)} came")
        content, *weights = (body[at : at + DIGEST_BYTES] for at in range(0, len(body), DIGEST_BYTES))
        return cls(content, tuple(weights))


@dataclass(frozen=True, slots=True)
class Places:
    """Payload of a MULTIPLY in shared memory (16 bytes): offsets in bytes of the rows and of their product."""

    BYTES: ClassVar[int] = _PLACES.size
    rows: int
    product: int

    def pack(self) -> bytes:
        """The payload as bytes."""
        return _PLACES.pack(self.rows, self.product)

    @classmethod
    def unpack(cls, body: bytes) -> "Places":
        """Read 16 bytes. The caller has checked the length, and checks that the offsets are in the shared memory."""
        return cls(*_PLACES.unpack(body))


def pack_number(number: int) -> bytes:
    """Payload of SHARE: size of the shared memory in bytes. Of a STORE in shared memory: offset of the matrix."""
    return _NUMBER.pack(number)


def unpack_number(body: bytes) -> int:
    """Read 8 bytes; the caller has checked the length."""
    return int(_NUMBER.unpack(body)[0])


def error_text(body: bytes) -> str:
    """The text of an ERROR. It must be printable ASCII, since it is printed on a terminal.

    Raises:
        MalformedMessage: any other byte.
    """
    if not all(0x20 <= byte < 0x7F for byte in body):
        raise MalformedMessage("the text of an ERROR is printable ASCII; other bytes came")
    return body.decode("ascii")


_SLICE = struct.Struct("<IIIdd")
_MATRIX_ID_BYTES = 16


class Part(IntEnum):
    """A factor of one slice, A* (p, r) or B* (r, width), or one of AdamW's moments of it, of the same shape."""

    A = 0
    B = 1
    A_FIRST = 2
    B_FIRST = 3
    A_SECOND = 4
    B_SECOND = 5

    def number(self, index: int) -> int:
        """The number in a header for this part of slice `index` (from 0); never 0."""
        return 1 + PARTS * index + self

    @staticmethod
    def named(number: int) -> "tuple[int, Part]":
        """The index of the slice and the part, of a number in a header.

        Raises:
            MalformedMessage: the number is 0.
        """
        if number == 0:
            raise MalformedMessage("which part of the adapter is meant? 0 names none")
        index, part = divmod(number - 1, PARTS)
        return index, Part(part)


PARTS = len(Part)


@dataclass(frozen=True, slots=True)
class Slice:
    """The adapter of one layer: LoRA's settings, and the layer's columns, `first` to `first + width`."""

    first: int
    width: int
    rank: int
    scale: float
    dropout: float


@dataclass(frozen=True, slots=True)
class Attachment:
    """Payload of ATTACH (16 + 28 bytes for each slice): the matrix that an adapter belongs to, and its slices."""

    matrix_id: bytes
    slices: tuple[Slice, ...]

    def pack(self) -> bytes:
        """The payload as bytes."""
        parts = [_SLICE.pack(it.first, it.width, it.rank, it.scale, it.dropout) for it in self.slices]
        return self.matrix_id + b"".join(parts)

    @classmethod
    def unpack(cls, body: bytes, cols: int) -> "Attachment":
        """Read the payload of ATTACH for a matrix of `cols` columns.

        Raises:
            MalformedMessage: another length, columns outside the matrix or in two slices, or a setting out of range.
            LimitExceeded: a rank above MAX_RANK.
        """
        rest = body[_MATRIX_ID_BYTES:]
        if not rest or len(rest) % _SLICE.size:
            raise MalformedMessage(f"ATTACH has {_SLICE.size} bytes for each slice, {len(rest)} came")
        slices = tuple(Slice(*fields) for fields in _SLICE.iter_unpack(rest))
        end = 0
        for it in slices:
            if it.first < end or it.width == 0 or it.first + it.width > cols:
                raise MalformedMessage(
                    f"a slice of columns {it.first} to {it.first + it.width}: slices follow each other within {cols}"
                )
            end = it.first + it.width
            if it.rank == 0 or not math.isfinite(it.scale) or not 0.0 <= it.dropout < 1.0:
                raise MalformedMessage(
                    f"a slice of rank {it.rank}, scale {it.scale} and dropout {it.dropout}: "
                    "expected a rank of 1 or more, a finite scale, and 0 <= dropout < 1"
                )
            if it.rank > MAX_RANK:
                raise LimitExceeded(f"a slice of rank {it.rank}: at most {MAX_RANK}")
        return cls(body[:_MATRIX_ID_BYTES], slices)


def attachment_bytes(fewest: int, most: int = MAX_SLICES) -> tuple[int, int]:
    """The least and the most bytes of an ATTACH with `fewest` to `most` slices."""
    return _MATRIX_ID_BYTES + fewest * _SLICE.size, _MATRIX_ID_BYTES + most * _SLICE.size


class Method(IntEnum):
    """The optimizer of a step."""

    SGD = 1
    ADAMW = 2


@dataclass(frozen=True, slots=True)
class Step(_FixedPayload):
    """Payload of STEP (56 bytes): one update of the factors, from the gradients times `gradient_scale`.

    `number` counts the updates from 1, for AdamW's bias correction. SGD uses neither betas nor `eps`.
    """

    NAME = "STEP"
    LAYOUT = struct.Struct("<IIdddddd")
    BYTES = LAYOUT.size
    method: Method
    number: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    gradient_scale: float

    @classmethod
    def unpack(cls, body: bytes) -> "Step":
        """Read 56 bytes.

        Raises:
            MalformedMessage: another length, an unknown method, or a setting out of range.
        """
        method, number, *settings = cls._values(body)
        if method not in set(Method):
            raise MalformedMessage(f"STEP by method {method}: 1 to {max(Method)} exist")
        step = cls(Method(method), number, *settings)
        if not all(math.isfinite(value) and value >= 0 for value in settings) or number == 0:
            raise MalformedMessage("STEP has settings that are negative or not finite, or the number 0")
        if step.beta1 >= 1 or step.beta2 >= 1 or (step.method is Method.ADAMW and step.eps == 0):
            raise MalformedMessage("STEP needs betas below 1 and, for AdamW, an eps above 0")
        return step
