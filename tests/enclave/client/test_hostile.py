"""A worker does what it likes: once, and the product is right all the same; always, and one typed error says so."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from obfuscatune.enclave.client import RetryPolicy, WorkerClient
from obfuscatune.errors import (
    BadMagic,
    BadReply,
    DeadlineExceeded,
    LimitExceeded,
    MalformedMessage,
    Truncated,
    UnknownMatrix,
    UnsupportedVersion,
    WireError,
    WorkerRefused,
)
from obfuscatune.protocol.messages import HEADER_BYTES, REPLIES, ErrorCode, Header, MessageType
from obfuscatune.protocol.tensors import DType
from tests.enclave.client.peers import MemoryTransport, MemoryWorker, Mischief
from tests.enclave.client.test_client import ID, QUICK, W, X, linked
from tests.protocol.mutation import mutated


def _with_header(**changes: object) -> Mischief:
    """The reply with another header, and its payload as it was."""

    def mischief(data: bytes) -> bytes:
        header = Header.unpack(data, expected=REPLIES)
        return replace(header, **changes).pack() + data[HEADER_BYTES:]

    return mischief


def _with_bytes(offset: int, fmt: str, value: object) -> Mischief:
    def mischief(data: bytes) -> bytes:
        changed = bytearray(data)
        struct.pack_into(fmt, changed, offset, value)
        return bytes(changed)

    return mischief


def _element(value: float) -> Mischief:
    return _with_bytes(HEADER_BYTES + 8, "<d", value)


def _error(code: int, text: bytes = b"no", request_id: int | None = None) -> Mischief:
    def mischief(data: bytes) -> bytes:
        header = Header.unpack(data, expected=REPLIES)
        rid = header.request_id if request_id is None else request_id
        return Header(MessageType.ERROR, rid, header.matrix_id, payload_bytes=len(text), code=code).pack() + text

    return mischief


def _shape(rows: int, cols: int, dtype: DType = DType.FLOAT64) -> Mischief:
    """Another shape, and a payload that agrees with it."""

    def mischief(data: bytes) -> bytes:
        size = rows * cols * dtype.itemsize
        header = replace(Header.unpack(data, expected=REPLIES), rows=rows, cols=cols, dtype=dtype, payload_bytes=size)
        return header.pack() + bytes(size)

    return mischief


MISCHIEF: dict[str, tuple[Mischief, type[WireError]]] = {
    "falls silent": (lambda data: None, DeadlineExceeded),
    "hangs up in the header": (lambda data: data[:30], Truncated),
    "hangs up in the payload": (lambda data: data[:-1], Truncated),
    "garbage": (lambda data: random.Random(1).randbytes(len(data)), BadMagic),
    "wrong magic": (_with_bytes(0, "4s", b"HTTP"), BadMagic),
    "wrong version": (_with_bytes(4, "B", 9), UnsupportedVersion),
    "unknown type": (_with_bytes(5, "B", 99), MalformedMessage),
    "a request": (_with_bytes(5, "B", MessageType.MULTIPLY), MalformedMessage),
    "announces 2^60 bytes": (_with_bytes(48, "<Q", 2**60), LimitExceeded),
    "announces 2^60 elements": (_with_header(rows=2**30, cols=2**30), LimitExceeded),
    "lies about the length": (_with_bytes(48, "<Q", 65), MalformedMessage),
    "another request's id": (_with_header(request_id=999), MalformedMessage),
    "another matrix": (_with_header(matrix_id=bytes(16)), BadReply),
    "too many rows": (_shape(3, 4), BadReply),
    "too few columns": (_shape(2, 3), BadReply),
    "transposed shape": (_shape(4, 2), BadReply),
    "another dtype": (_shape(2, 4, DType.FLOAT32), BadReply),
    "NaN": (_element(float("nan")), BadReply),
    "infinity": (_element(float("-inf")), BadReply),
    "answers STORED": (
        _with_header(type=MessageType.STORED, dtype=DType.NONE, rows=0, cols=0, payload_bytes=0),
        MalformedMessage,
    ),
    "unknown error code": (_with_bytes(5, "B", MessageType.ERROR), MalformedMessage),
    "an error with terminal codes": (_error(ErrorCode.FAILED, b"\x1b[2J"), MalformedMessage),
    "an error that answers nothing": (_error(ErrorCode.MALFORMED, request_id=0), WireError),
    "an error that answers another": (_error(ErrorCode.FAILED, request_id=999), MalformedMessage),
}


@pytest.mark.parametrize("name", MISCHIEF)
def test_once_and_the_product_is_right_all_the_same(name: str) -> None:
    worker = MemoryWorker(mischief=MISCHIEF[name][0], times=1)
    with linked(worker) as client:
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
        assert (client.stats.reconnects, client.stats.retries) == (1, 1)


@pytest.mark.parametrize("name", MISCHIEF)
def test_always_and_one_typed_error_says_so(name: str) -> None:
    mischief, error = MISCHIEF[name]
    worker = MemoryWorker(mischief=mischief)
    client = linked(worker)
    with pytest.raises(error) as caught:
        client.multiply(ID, X, transpose=False)
    assert "\n" not in str(caught.value)
    assert len(worker.connections) <= QUICK.attempts
    assert all(connection.closed for connection in worker.connections)


@pytest.mark.parametrize("name", MISCHIEF)
def test_several_in_flight_survive_it_too(name: str) -> None:
    client = linked(MemoryWorker(mischief=MISCHIEF[name][0], times=1))
    pendings = [client.submit(ID, X + i, transpose=False) for i in range(6)]
    assert all(torch.equal(pending.result(), (X + i) @ W) for i, pending in enumerate(pendings))


def test_a_reply_played_again_is_not_taken() -> None:
    """The old product, for the same matrix and shape, as the answer to a new request."""
    worker = MemoryWorker()
    client = linked(worker)
    client.multiply(ID, X, transpose=False)
    old = worker.last_words
    worker.mischief, worker.times = (lambda data: old), 1
    assert torch.equal(client.multiply(ID, 2 * X, transpose=False), 2 * X @ W)
    assert client.stats.reconnects == 1


def test_two_replies_to_one_request() -> None:
    worker = MemoryWorker(mischief=lambda data: data + data, times=1)
    client = linked(worker)
    assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
    assert torch.equal(client.multiply(ID, 2 * X, transpose=False), 2 * X @ W)
    assert client.stats.reconnects == 1


def test_swapped_replies_are_put_right() -> None:
    """Replies may come in any order: each bears the id of its request."""
    held: list[bytes] = []

    def swap(data: bytes) -> bytes:
        held.append(data)
        return b"" if len(held) == 1 else held[1] + held[0]

    class Patient(MemoryTransport):
        def _say(self, data: bytes, mischief: Mischief | None) -> None:
            self._replies += data if mischief is None else mischief(data) or b""

    worker = MemoryWorker(mischief=swap, times=2)
    client = WorkerClient(lambda: Patient(worker), deadline_s=0.05, retry=QUICK)
    client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
    first, second = (client.submit(ID, X * i, transpose=False) for i in (1, 2))
    assert torch.equal(first.result(), X @ W)
    assert torch.equal(second.result(), 2 * X @ W)
    assert client.stats.reconnects == 0


def test_swapped_ids_are_not_ours_to_find() -> None:
    """A worker that answers each with the other's product lies about values: that is what Freivalds' check is for."""
    worker = MemoryWorker()
    client = linked(worker)
    products: list[bytes] = []

    def cross(data: bytes) -> bytes:
        products.append(data)
        return data[:HEADER_BYTES] + products[0][HEADER_BYTES:]

    worker.mischief = cross
    first, second = (client.submit(ID, X * i, transpose=False) for i in (1, 2))
    assert torch.equal(first.result(), second.result())


@pytest.mark.parametrize(
    ("handshake", "error"),
    [
        (lambda data: None, DeadlineExceeded),
        (lambda data: data[:60], Truncated),
        (lambda data: b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(80), BadMagic),
        (_with_bytes(HEADER_BYTES, "<H", 7), UnsupportedVersion),
        (_with_bytes(HEADER_BYTES + 2, "<H", 60000), MalformedMessage),
        (_error(ErrorCode.BUSY, request_id=0), WorkerRefused),
        (_error(ErrorCode.VERSION, request_id=0), UnsupportedVersion),
        (lambda data: Header(MessageType.DONE, 1, ID).pack() + bytes(32), MalformedMessage),
    ],
)
def test_a_greeting_that_is_none(handshake: Mischief, error: type[WireError]) -> None:
    worker = MemoryWorker()
    worker.handshake = handshake
    client = WorkerClient(worker, deadline_s=0.05, retry=QUICK)
    with pytest.raises(error):
        client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
    assert all(connection.closed for connection in worker.connections)


def test_refusals_are_final() -> None:
    for code, error in (
        (ErrorCode.FAILED, WorkerRefused),
        (ErrorCode.SHAPE, WorkerRefused),
        (ErrorCode.LIMIT, LimitExceeded),
    ):
        worker = MemoryWorker(mischief=_error(code))
        client = linked(worker)
        with pytest.raises(error, match="the worker answered: no"):
            client.multiply(ID, X, transpose=False)
        assert len(worker.connections) == 1
        worker.mischief = None
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)


def test_a_worker_that_never_finds_the_matrix() -> None:
    """It takes the upload each time and then denies it: bounded all the same."""
    worker = MemoryWorker(mischief=_error(ErrorCode.UNKNOWN_MATRIX))
    client = linked(worker)
    with pytest.raises(UnknownMatrix):
        client.multiply(ID, X, transpose=False)
    assert client.stats.uploads == 1 + QUICK.attempts


def test_no_memory_is_asked_for_on_a_worker_s_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Announcements of up to 2 GiB that are within the protocol, yet not what was asked for."""
    import obfuscatune.enclave.client.requests as module

    asked: list[object] = []

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        asked.append(shape)
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(module, "torch", SimpleNamespace(empty=empty))
    worker = MemoryWorker(mischief=_with_header(rows=2**20, cols=2**8, payload_bytes=2**31))
    client = linked(worker)
    with pytest.raises(BadReply):
        client.multiply(ID, X, transpose=False)
    assert set(asked) == {(2, 4)}  # what was asked for, before anything came


def test_ten_thousand_mutated_products() -> None:
    """Each is refused with a typed error, or is a finite product of the right shape."""
    dice = random.Random(20261123)
    worker = MemoryWorker(mischief=lambda data: mutated(data, dice))
    client = WorkerClient(worker, retry=RetryPolicy(attempts=1, patience_s=0, backoff_s=0))
    client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
    refused = 0
    for _ in range(10_000):
        worker.connections.clear()
        try:
            product = client.multiply(ID, X, transpose=False)
        except WireError:
            refused += 1
        else:
            assert product.shape == (2, 4)
            assert bool(torch.isfinite(product).all())
    assert refused > 5_000
