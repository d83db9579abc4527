"""Messages as bytes and back. Pure: no socket, no file, no allocation beyond the message itself.

Every message is a header of 56 bytes and a payload, whose length the header states: a matrix, or what `payloads`
describes. `FORMS` says for each type what it may carry; `Header.unpack` holds a header against its form and
refuses everything else. docs/spec/wire.md has the same in words.
"""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType

from obfuscatune.errors import BadMagic, LimitExceeded, MalformedMessage, Truncated, UnsupportedVersion
from obfuscatune.protocol.limits import (
    MAX_DIM,
    MAX_ERROR_BYTES,
    MAX_JOINED,
    MAX_MATRIX_BYTES,
    MAX_SLICES,
    MAX_WINDOW_BYTES,
    VERSION,
)
from obfuscatune.protocol.payloads import NUMBER_BYTES, PARTS, Hello, Offer, Places, Step, Welcome, attachment_bytes
from obfuscatune.protocol.tensors import ITEMSIZE, DType

MAGIC = b"OBFT"
TRANSPOSED = 1
"""Flag of MULTIPLY: by W* transposed."""
SHARED = 2
"""Flag of STORE, MULTIPLY, FORWARD, BACKWARD and PRODUCT: the matrix lies in shared memory."""
DROPOUT = 4
"""Flag of FORWARD: the worker draws the adapters' dropout."""
LAST_NUMBER = 2**32 - 1
"""Of a forward pass."""
NO_MATRIX = bytes(16)

_HEADER = struct.Struct("<4sBBBBIIIIQ16sQ")
HEADER_BYTES = _HEADER.size
_DTYPES = tuple(DType)
"""By their codes, which begin at 0 and leave none out."""


class MessageType(IntEnum):
    """Code of a message in its header."""

    HELLO = 1
    WELCOME = 2
    OFFER = 3
    HAVE = 4
    WANT = 5
    STORE = 6
    STORED = 7
    MULTIPLY = 8
    PRODUCT = 9
    FORGET = 10
    DONE = 11
    ERROR = 12
    SHARE = 13
    ATTACH = 14
    PUT = 15
    FETCH = 16
    FORWARD = 17
    BACKWARD = 18
    STEP = 19
    ZERO = 20
    NORM = 21


class ErrorCode(IntEnum):
    """Why a worker refuses. With a request id it answers that request; without one it ends the connection."""

    MALFORMED = 1
    VERSION = 2
    LIMIT = 3
    UNKNOWN_MATRIX = 4
    QUOTA = 5
    SHAPE = 6
    BUSY = 7
    FAILED = 8
    UNKNOWN_ADAPTER = 9


REQUESTS = frozenset(
    {
        MessageType.HELLO,
        MessageType.SHARE,
        MessageType.OFFER,
        MessageType.STORE,
        MessageType.MULTIPLY,
        MessageType.FORGET,
    }
)
ON_ADAPTERS = frozenset(
    {
        MessageType.ATTACH,
        MessageType.PUT,
        MessageType.FETCH,
        MessageType.FORWARD,
        MessageType.BACKWARD,
        MessageType.STEP,
        MessageType.ZERO,
        MessageType.NORM,
    }
)
"""Requests that work on what the worker remembers; their bodies are in `protocol/payloads.py`."""
REQUESTS |= ON_ADAPTERS
WITH_ROWS = frozenset({MessageType.MULTIPLY, MessageType.PUT, MessageType.FORWARD, MessageType.BACKWARD})
"""Requests whose matrix is read into a buffer, and counts towards the window."""
REPLIES = frozenset(MessageType) - REQUESTS


@dataclass(frozen=True, slots=True)
class Form:
    """What messages of one type carry. A field that is not named here is zero."""

    matrix: bool = True
    """The id of a matrix, and a request id other than 0."""
    dtype: bool = False
    """An element type, rows and columns."""
    tensor_bytes: int = 0
    """Most bytes of a payload that is a matrix; its length is rows x columns x element size exactly."""
    body_bytes: tuple[int, int] = (0, 0)
    """Least and most bytes of a payload that is not a matrix."""
    multiply: bool = False
    """The element type wanted in the reply."""
    flags: int = 0
    """Flags that it may have."""
    shared_bytes: int = 0
    """Bytes of the payload where the matrix lies in shared memory."""
    code: bool = False
    """An error code; request and matrix id may be zero, for an error that answers no request."""
    number: tuple[int, int] = (0, 0)
    """Least and largest that may stand in the place of the code: which part of an adapter, or which forward pass."""


FORMS: Mapping[MessageType, Form] = MappingProxyType(
    {
        MessageType.HELLO: Form(matrix=False, body_bytes=(Hello.BYTES, Hello.BYTES)),
        MessageType.WELCOME: Form(matrix=False, body_bytes=(Welcome.BYTES, Welcome.BYTES)),
        MessageType.OFFER: Form(dtype=True, body_bytes=(Offer.size(0), Offer.size(MAX_JOINED))),
        MessageType.HAVE: Form(),
        MessageType.WANT: Form(),
        MessageType.STORE: Form(dtype=True, tensor_bytes=MAX_MATRIX_BYTES, flags=SHARED, shared_bytes=NUMBER_BYTES),
        MessageType.STORED: Form(),
        MessageType.MULTIPLY: Form(
            dtype=True,
            tensor_bytes=MAX_WINDOW_BYTES,
            multiply=True,
            flags=TRANSPOSED | SHARED,
            shared_bytes=Places.BYTES,
        ),
        MessageType.PRODUCT: Form(dtype=True, tensor_bytes=MAX_WINDOW_BYTES, flags=SHARED),
        MessageType.FORGET: Form(),
        MessageType.DONE: Form(),
        MessageType.ERROR: Form(matrix=False, code=True, body_bytes=(1, MAX_ERROR_BYTES)),
        MessageType.SHARE: Form(body_bytes=(NUMBER_BYTES, NUMBER_BYTES)),
        MessageType.ATTACH: Form(dtype=True, body_bytes=attachment_bytes(1, MAX_SLICES)),
        MessageType.PUT: Form(dtype=True, tensor_bytes=MAX_WINDOW_BYTES, number=(1, PARTS * MAX_SLICES)),
        MessageType.FETCH: Form(number=(1, PARTS * MAX_SLICES)),
        MessageType.FORWARD: Form(
            dtype=True,
            tensor_bytes=MAX_WINDOW_BYTES,
            multiply=True,
            number=(0, LAST_NUMBER),
            flags=DROPOUT | SHARED,
            shared_bytes=Places.BYTES,
        ),
        MessageType.BACKWARD: Form(
            dtype=True,
            tensor_bytes=MAX_WINDOW_BYTES,
            multiply=True,
            number=(1, LAST_NUMBER),
            flags=SHARED,
            shared_bytes=Places.BYTES,
        ),
        MessageType.STEP: Form(body_bytes=(Step.BYTES, Step.BYTES)),
        MessageType.ZERO: Form(),
        MessageType.NORM: Form(),
    }
)
_FORMS = {int(kind): (kind, form) for kind, form in FORMS.items()}


@dataclass(slots=True)
class Header:
    """The 56 bytes before every payload. `pack` does not check: what we build ourselves, tests check."""

    type: MessageType
    request_id: int = 0
    matrix_id: bytes = NO_MATRIX
    dtype: DType = DType.NONE
    rows: int = 0
    cols: int = 0
    payload_bytes: int = 0
    reply_dtype: DType = DType.NONE
    flags: int = 0
    code: int = 0

    @property
    def transposed(self) -> bool:
        """Whether a MULTIPLY is by the transpose."""
        return bool(self.flags & TRANSPOSED)

    @property
    def shared(self) -> bool:
        """Whether the matrix lies in shared memory."""
        return bool(self.flags & SHARED)

    @property
    def matrix_bytes(self) -> int:
        """Bytes of the matrix, wherever it lies."""
        return self.rows * self.cols * ITEMSIZE[self.dtype]

    @property
    def message_bytes(self) -> int:
        """Bytes of the message with its matrix, wherever that lies."""
        return HEADER_BYTES + (self.matrix_bytes if self.shared else self.payload_bytes)

    def inline(self) -> "Header":
        """The same message with its matrix as the payload."""
        return replace(self, flags=self.flags & ~SHARED, payload_bytes=self.matrix_bytes) if self.shared else self

    def pack(self) -> bytes:
        """The header as 56 bytes."""
        return _HEADER.pack(
            MAGIC,
            VERSION,
            self.type,
            self.dtype,
            self.reply_dtype,
            self.flags,
            self.rows,
            self.cols,
            self.code,
            self.request_id,
            self.matrix_id,
            self.payload_bytes,
        )

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview, *, expected: frozenset[MessageType]) -> "Header":
        """Read and check 56 bytes; `expected` is REQUESTS on the worker and REPLIES in the enclave.

        Raises:
            Truncated: fewer than 56 bytes.
            BadMagic, UnsupportedVersion: another protocol, another version.
            LimitExceeded: a dimension or a length above docs/spec/wire.md.
            MalformedMessage: any other field outside its form.
        """
        if len(data) < HEADER_BYTES:
            raise Truncated(f"a header has {HEADER_BYTES} bytes, {len(data)} came")
        (magic, version, kind, dtype, reply_dtype, flags, rows, cols, code, request_id, matrix_id, length) = (
            _HEADER.unpack_from(data)
        )
        if magic != MAGIC:
            raise BadMagic(f"expected the magic {MAGIC!r}, got {magic!r}: {what_it_speaks(magic)}")
        if version != VERSION:
            raise UnsupportedVersion(f"expected protocol version {VERSION}, got {version}: install the same release")
        if kind not in expected:
            raise MalformedMessage(f"message type {kind} has no place here")
        if dtype >= len(_DTYPES) or reply_dtype >= len(_DTYPES):
            raise MalformedMessage(f"dtype codes {dtype} and {reply_dtype}: 0 to {max(DType)} exist")
        message, form = _FORMS[kind]
        header = cls(
            message, request_id, matrix_id, _DTYPES[dtype], rows, cols, length, _DTYPES[reply_dtype], flags, code
        )
        _check(header, form)
        _check_size(header, form)
        return header


# Both run for every message that comes: a name is looked up, and a limit computed, only for the error.


def _check(header: Header, form: Form) -> None:
    """Hold what a header says of itself against its form; see `Header.unpack` for the errors."""
    code, (least, most) = header.code, form.number
    if form.matrix and header.request_id == 0:
        raise MalformedMessage(f"{header.type.name} needs a request id other than 0")
    if not form.matrix and not form.code and (header.request_id or header.matrix_id != NO_MATRIX):
        raise MalformedMessage(f"{header.type.name} carries neither a request id nor a matrix id")
    if header.flags & ~form.flags:
        raise MalformedMessage(f"{header.type.name} came with the flags {header.flags:#x}, which it has not")
    if form.multiply != (header.reply_dtype is not DType.NONE):
        raise MalformedMessage(f"{header.type.name} came with the reply dtype {header.reply_dtype.name}")
    if form.code:
        if code == 0:
            raise MalformedMessage(f"{header.type.name} came without a code")
        if code > max(ErrorCode):
            raise MalformedMessage(f"error code {code}: 1 to {max(ErrorCode)} exist")
    elif not least <= code <= most:
        raise MalformedMessage(f"{header.type.name} came with the code {code}: {least} to {most} may stand there")


def _check_size(header: Header, form: Form) -> None:
    """Hold what a header says of its payload against its form; see `Header.unpack` for the errors."""
    length, (least, most) = header.payload_bytes, form.body_bytes
    if not form.dtype:
        if header.dtype is not DType.NONE or header.rows or header.cols:
            raise MalformedMessage(f"{header.type.name} carries no matrix, yet came with a dtype or a shape")
    elif header.dtype is DType.NONE or header.rows == 0 or header.cols == 0:
        raise MalformedMessage(f"{header.type.name} needs a dtype and a shape without zeros")
    elif header.rows > MAX_DIM or header.cols > MAX_DIM:
        raise LimitExceeded(f"{header.type.name} of {header.rows} x {header.cols}: at most {MAX_DIM} either way")
    if form.tensor_bytes:
        size = header.matrix_bytes
        if length > form.tensor_bytes or size > form.tensor_bytes:
            raise LimitExceeded(f"{header.type.name} of {max(length, size)} bytes: at most {form.tensor_bytes}")
        exact = form.shared_bytes if header.flags & SHARED else size
        if length != exact:
            raise MalformedMessage(
                f"{header.type.name} of {header.rows} x {header.cols} {header.dtype.name} has {exact} bytes, "
                f"{length} announced"
            )
    elif length > most:
        raise LimitExceeded(f"{header.type.name} with a payload of {length} bytes: at most {most}")
    elif length < least:
        raise MalformedMessage(f"{header.type.name} with a payload of {length} bytes: at least {least}")


TLS_STARTS = (b"\x16", b"\x15")
"""The first byte of a TLS record that holds a handshake or an alert (RFC 8446, section 5.1)."""
_OPTIONS = "give --tls-cert, --tls-key and --peer on both sides, or on neither"
_ADDRESS = "so it is no ObfuscaTune worker or enclave: look at the address and the port"
_HTTP = (b"HTTP/", b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"CONN", b"DELE", b"PATC", b"TRAC", b"PRI ")
_BY_THE_REST = (
    (re.compile(rb"\d(\.\d)? \d{3}"), b"HTTP/"),
    (re.compile(rb"\.\d+-"), b"SSH-2"),
    (re.compile(rb"\x0c\0{6}"), b"OBFT\x01"),  # an ERROR of ours
)


def what_it_speaks(first: bytes | bytearray | memoryview) -> str:
    """One clause on a peer whose first bytes are not what was expected."""
    start = bytes(first[:5])
    if start.startswith(TLS_STARTS):
        return f"it speaks TLS, and we do not: {_OPTIONS}"
    if start.startswith(b"OBFT"):
        return f"it speaks our protocol without TLS, and we speak it by TLS: {_OPTIONS}"
    if start.startswith(_HTTP):
        return f"it speaks HTTP, {_ADDRESS}"
    if start.startswith(b"SSH-"):
        return f"it speaks SSH, {_ADDRESS}"
    return "it speaks another protocol: look at the address and the port, and whether both sides have the same release"


def what_it_spoke(rest: bytes) -> str:
    """The same by what follows the first five bytes, which OpenSSL has taken for the header of a record."""
    known = (begin for pattern, begin in _BY_THE_REST if pattern.match(rest))
    return what_it_speaks(next(known, b""))
