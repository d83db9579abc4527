"""A header comes back as it was packed; whatever breaks its form is refused by the error that the spec names."""

import contextlib
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obfuscatune.errors import BadMagic, LimitExceeded, MalformedMessage, Truncated, UnsupportedVersion
from obfuscatune.protocol.limits import (
    MAX_DIM,
    MAX_ERROR_BYTES,
    MAX_IN_FLIGHT,
    MAX_MATRIX_BYTES,
    MAX_WINDOW_BYTES,
)
from obfuscatune.protocol.messages import (
    FORMS,
    HEADER_BYTES,
    NO_MATRIX,
    REPLIES,
    REQUESTS,
    SHARED,
    TRANSPOSED,
    ErrorCode,
    Header,
    MessageType,
)
from obfuscatune.protocol.payloads import CONTENT_STORE, Hello, Welcome, error_text
from obfuscatune.protocol.tensors import DType

EVERY = REQUESTS | REPLIES
MULTIPLY = Header(MessageType.MULTIPLY, 7, bytes(range(16)), DType.FLOAT32, 2, 3, 24, DType.FLOAT64, TRANSPOSED)
ERROR = Header(MessageType.ERROR, 7, bytes(range(16)), payload_bytes=5, code=ErrorCode.SHAPE)
HELLO = Header(MessageType.HELLO, payload_bytes=36)
DONE = Header(MessageType.DONE, 3, bytes(range(16)))
OFFER = Header(MessageType.OFFER, 3, bytes(range(16)), DType.BFLOAT16, 4, 5, 32)
STORE = Header(MessageType.STORE, 3, bytes(range(16)), DType.BFLOAT16, 4, 5, 8, flags=SHARED)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    """Any header that the form of its type allows."""
    kind = draw(st.sampled_from(MessageType))
    form = FORMS[kind]
    header = Header(kind)
    if form.matrix or form.code:
        least = 0 if form.code else 1
        header = replace(
            header, request_id=draw(st.integers(least, 2**64 - 1)), matrix_id=draw(st.binary(min_size=16, max_size=16))
        )
    if form.dtype:
        dtype = draw(st.sampled_from([code for code in DType if code]))
        rows = draw(st.integers(1, MAX_DIM))
        most = min(MAX_DIM, (form.tensor_bytes or MAX_MATRIX_BYTES) // (rows * dtype.itemsize))
        header = replace(header, dtype=dtype, rows=rows, cols=draw(st.integers(1, most)))
    if form.multiply:
        reply_dtype = draw(st.sampled_from([code for code in DType if code]))
        header = replace(header, reply_dtype=reply_dtype, flags=draw(st.sampled_from([0, form.flags & ~SHARED])))
    if form.code:
        header = replace(header, code=draw(st.sampled_from(ErrorCode)))
    elif form.number != (0, 0):
        header = replace(header, code=draw(st.integers(*form.number)))
    size = (
        header.rows * header.cols * header.dtype.itemsize if form.tensor_bytes else draw(st.integers(*form.body_bytes))
    )
    header = replace(header, payload_bytes=size)
    if form.flags & SHARED and draw(st.booleans()):
        return replace(header, flags=header.flags | SHARED, payload_bytes=form.shared_bytes)
    return header


@given(headers())
def test_header_round_trip(header: Header) -> None:
    data = header.pack()
    assert len(data) == HEADER_BYTES
    assert Header.unpack(data, expected=EVERY) == header


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_any_bytes_are_a_header_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(Truncated, BadMagic, UnsupportedVersion, MalformedMessage, LimitExceeded):
        Header.unpack(data, expected=EVERY)


def _raw(header: Header, offset: int, fmt: str, value: object) -> bytes:
    data = bytearray(header.pack())
    struct.pack_into(fmt, data, offset, value)
    return bytes(data)


MALFORMED = {
    "short": (MULTIPLY.pack()[:-1], Truncated),
    "magic": (_raw(MULTIPLY, 0, "4s", b"HTTP"), BadMagic),
    "version": (_raw(MULTIPLY, 4, "B", 2), UnsupportedVersion),
    "type-zero": (_raw(MULTIPLY, 5, "B", 0), MalformedMessage),
    "type-unknown": (_raw(MULTIPLY, 5, "B", 13), MalformedMessage),
    "dtype-unknown": (_raw(MULTIPLY, 6, "B", 5), MalformedMessage),
    "dtype-none": (_raw(MULTIPLY, 6, "B", 0), MalformedMessage),
    "reply-dtype-none": (_raw(MULTIPLY, 7, "B", 0), MalformedMessage),
    "reply-dtype-unknown": (_raw(MULTIPLY, 7, "B", 9), MalformedMessage),
    "reply-dtype-unasked": (_raw(OFFER, 7, "B", 1), MalformedMessage),
    "flag-unknown": (_raw(MULTIPLY, 8, "<I", 2), MalformedMessage),
    "flag-unasked": (_raw(OFFER, 8, "<I", 1), MalformedMessage),
    "rows-zero": (replace(MULTIPLY, rows=0).pack(), MalformedMessage),
    "cols-zero": (replace(MULTIPLY, cols=0).pack(), MalformedMessage),
    "rows-too-many": (replace(MULTIPLY, rows=MAX_DIM + 1).pack(), LimitExceeded),
    "cols-too-many": (replace(OFFER, cols=MAX_DIM + 1).pack(), LimitExceeded),
    "shape-unasked": (replace(DONE, rows=1).pack(), MalformedMessage),
    "dtype-unasked": (replace(DONE, dtype=DType.FLOAT32).pack(), MalformedMessage),
    "length-wrong": (replace(MULTIPLY, payload_bytes=25).pack(), MalformedMessage),
    "length-2^60": (replace(MULTIPLY, payload_bytes=2**60).pack(), LimitExceeded),
    "length-of-window": (
        replace(MULTIPLY, rows=MAX_DIM, cols=MAX_DIM, payload_bytes=MAX_WINDOW_BYTES + 1).pack(),
        LimitExceeded,
    ),
    "laid-out-with-payload": (replace(STORE, payload_bytes=40).pack(), MalformedMessage),
    "laid-out-nowhere": (replace(STORE, payload_bytes=0).pack(), MalformedMessage),
    "laid-out-unasked": (_raw(OFFER, 8, "<I", SHARED), MalformedMessage),
    "laid-out-too-large": (replace(STORE, dtype=DType.FLOAT64, rows=MAX_DIM, cols=MAX_DIM).pack(), LimitExceeded),
    "length-unasked": (replace(DONE, payload_bytes=1).pack(), LimitExceeded),
    "body-short": (replace(HELLO, payload_bytes=35).pack(), MalformedMessage),
    "body-long": (replace(HELLO, payload_bytes=37).pack(), LimitExceeded),
    "error-long": (replace(ERROR, payload_bytes=MAX_ERROR_BYTES + 1).pack(), LimitExceeded),
    "error-empty": (replace(ERROR, payload_bytes=0).pack(), MalformedMessage),
    "code-unknown": (replace(ERROR, code=max(ErrorCode) + 1).pack(), MalformedMessage),
    "code-zero": (replace(ERROR, code=0).pack(), MalformedMessage),
    "code-unasked": (replace(DONE, code=1).pack(), MalformedMessage),
    "part-zero": (Header(MessageType.FETCH, 7, bytes(range(16))).pack(), MalformedMessage),
    "part-too-large": (Header(MessageType.FETCH, 7, bytes(range(16)), code=97).pack(), MalformedMessage),
    "backward-of-nothing": (replace(MULTIPLY, type=MessageType.BACKWARD, flags=0).pack(), MalformedMessage),
    "dropout-unasked": (replace(MULTIPLY, type=MessageType.BACKWARD, flags=4, code=1).pack(), MalformedMessage),
    "request-id-zero": (replace(DONE, request_id=0).pack(), MalformedMessage),
    "request-id-unasked": (replace(HELLO, request_id=1).pack(), MalformedMessage),
    "matrix-id-unasked": (replace(HELLO, matrix_id=bytes([1]) * 16).pack(), MalformedMessage),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_header(name: str) -> None:
    data, error = MALFORMED[name]
    with pytest.raises(error) as caught:
        Header.unpack(data, expected=EVERY)
    assert type(caught.value) is error


def test_a_matrix_that_is_laid_out_counts_as_if_it_were_sent() -> None:
    assert STORE.inline() == replace(STORE, flags=0, payload_bytes=40)
    assert STORE.message_bytes == STORE.inline().message_bytes


def test_no_message_of_the_wrong_direction() -> None:
    with pytest.raises(MalformedMessage):
        Header.unpack(MULTIPLY.pack(), expected=REPLIES)
    with pytest.raises(MalformedMessage):
        Header.unpack(DONE.pack(), expected=REQUESTS)
    assert not REQUESTS & REPLIES
    assert set(FORMS) == set(MessageType)


@given(st.binary(min_size=32, max_size=32), st.integers(0, 5), st.integers(0, 5))
def test_hello_round_trip(session_id: bytes, oldest: int, more: int) -> None:
    hello = Hello(session_id, oldest, oldest + more)
    assert Hello.unpack(hello.pack()) == hello
    assert session_id.hex() not in repr(hello)


WELCOME = Welcome(1, MAX_IN_FLIGHT, CONTENT_STORE, MAX_WINDOW_BYTES, MAX_MATRIX_BYTES, 2**40)


def test_welcome_round_trip() -> None:
    assert Welcome.unpack(WELCOME.pack()) == WELCOME


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (WELCOME.pack()[:-1], MalformedMessage),
        (replace(WELCOME, version=2).pack(), UnsupportedVersion),
        (replace(WELCOME, features=32).pack(), MalformedMessage),
        (replace(WELCOME, max_in_flight=0).pack(), MalformedMessage),
        (replace(WELCOME, max_in_flight=MAX_IN_FLIGHT + 1).pack(), MalformedMessage),
        (replace(WELCOME, window_bytes=0).pack(), MalformedMessage),
        (replace(WELCOME, window_bytes=MAX_WINDOW_BYTES + 1).pack(), MalformedMessage),
        (replace(WELCOME, matrix_bytes=2**60).pack(), MalformedMessage),
    ],
)
def test_malformed_welcome(body: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        Welcome.unpack(body)


@pytest.mark.parametrize("body", [bytes(35), Hello(bytes(32), 2, 1).pack()])
def test_malformed_hello(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        Hello.unpack(body)


def test_error_text_is_plain_ascii() -> None:
    assert error_text(b"no room") == "no room"
    for body in (b"\x1b[2J", "ü".encode(), b"two\nlines", b"\x7f"):
        with pytest.raises(MalformedMessage):
            error_text(body)


def test_constants() -> None:
    assert HEADER_BYTES == 56
    assert len(NO_MATRIX) == 16
