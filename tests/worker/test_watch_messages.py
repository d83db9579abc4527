"""WATCH and what answers it, over a connection: the slot, and messages before and after."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from obfuscatune.wire.deadline import Deadline
from obfuscatune.wire.dtypes import DType
from obfuscatune.wire.framing import send_message
from obfuscatune.wire.messages import ErrorCode, Header, MessageType
from obfuscatune.wire.payloads import SHARED_MEMORY, SLOTS, Hello, Welcome, pack_number
from obfuscatune.wire.shared_memory import SharedMemory
from obfuscatune.wire.slot import Watched, Word
from obfuscatune.wire.tensors import bytes_of
from obfuscatune.wire.transcript import read_transcript
from obfuscatune.worker import kernels
from tests.worker.serving import SECONDS, RawClient, Serving, serving

if not kernels.are_there():
    pytest.skip("no kernels can be compiled here; nobody watches", allow_module_level=True)

from obfuscatune.worker import watch as module
from tests.worker.test_watch import (
    COLUMNS,
    INNER,
    PRODUCT_AT,
    ROWS_AT,
    SIZE,
    assert_right,
    post,
    some,
    wait_for,
    words_of,
)

ID, OTHER = bytes(range(1, 17)), bytes(range(2, 18))


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches end because of what a test does, not because a busy machine let it wait."""
    monkeypatch.setattr(module, "AWAKE_SECONDS", SECONDS)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one alone, a worker offers no slots."""
    monkeypatch.setattr("obfuscatune.worker.compute.cores", lambda: 2)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path) as running:
        yield running


W = some(INNER, COLUMNS)


class Watcher(RawClient):
    """A client that has greeted, stored W under ID, and shares memory with a slot at its start."""

    def __init__(self, worker: Serving, session_id: bytes = bytes(32), size: int = SIZE) -> None:
        super().__init__(worker.address, session_id)
        self.hello()
        self.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, *W.shape, W.nbytes), bytes_of(W))
        self.memory, descriptor = SharedMemory.create(size)
        header = Header(MessageType.SHARE, 2, payload_bytes=8)
        send_message(self.transport, header, pack_number(size), deadline=Deadline(SECONDS), descriptor=descriptor)
        os.close(descriptor)
        assert self.reply()[0].type is MessageType.DONE
        self.words = words_of(self.memory)

    def watch(self, *ids: bytes, slot: int = 0) -> None:
        """Say WATCH, request 3."""
        body = Watched(slot, ids).pack()
        self.say(Header(MessageType.WATCH, 3, payload_bytes=len(body)), body)


def multiply_by_message(client: RawClient, x: torch.Tensor) -> torch.Tensor:
    header = Header(
        MessageType.MULTIPLY, 4, ID, DType.FLOAT32, *x.shape, payload_bytes=x.nbytes, reply_dtype=DType.FLOAT32
    )
    reply, product = client.ask(header, bytes_of(x))
    assert (reply.type, reply.request_id) == (MessageType.PRODUCT, 4)
    assert isinstance(product, torch.Tensor)
    return product


def test_over_a_connection(worker: Serving, patient: None) -> None:
    """WATCH, requests in the slot, LEAVE, DONE; and messages go on."""
    with Watcher(worker) as client:
        client.watch(OTHER, ID)
        assert client.reply()[0].code == ErrorCode.UNKNOWN_MATRIX
        client.watch(ID)
        wait_for(client.words, Word.WATCHED, 1)
        for number in (1, 2):
            x = some(3, INNER, seed=number)
            client.memory.matrix(ROWS_AT, 3, INNER, torch.float32).copy_(x)
            assert post(client.words, number, 0, 3)
            wait_for(client.words, Word.ANSWERED, number)
            assert_right(client.memory.matrix(PRODUCT_AT, 3, COLUMNS, torch.float32), x, W)
        client.words[Word.LEAVE] = 1
        assert client.reply()[0] == Header(MessageType.DONE, 3)
        assert client.words[Word.WATCHED] == 0
        assert_right(multiply_by_message(client, x), x, W)


def test_a_watch_that_ends_by_itself_is_done(worker: Serving) -> None:
    with Watcher(worker) as client:
        for _ in range(2):
            client.watch(ID)
            assert client.reply()[0] == Header(MessageType.DONE, 3)
        assert multiply_by_message(client, some(2, INNER)).shape == (2, COLUMNS)


@pytest.mark.parametrize("what", ["an unknown matrix", "no memory", "float64"])
def test_what_cannot_be_watched_is_refused_and_messages_go_on(worker: Serving, what: str) -> None:
    code = {"an unknown matrix": ErrorCode.UNKNOWN_MATRIX, "no memory": ErrorCode.FAILED, "float64": ErrorCode.SHAPE}
    with Watcher(worker) as sharing, RawClient(worker.address) as other:
        client = other if what == "no memory" else sharing
        other.hello()
        wide = W.double()
        sharing.ask(Header(MessageType.STORE, 5, OTHER, DType.FLOAT64, *W.shape, wide.nbytes), bytes_of(wide))
        body = Watched(0, {"an unknown matrix": (ID, b"x" * 16), "float64": (OTHER,)}.get(what, (ID,))).pack()
        reply, _ = client.ask(Header(MessageType.WATCH, 3, payload_bytes=len(body)), body)
        assert (reply.type, reply.code, reply.request_id) == (MessageType.ERROR, code[what], 3)
        assert_right(multiply_by_message(client, some(2, INNER)), some(2, INNER), W)


@pytest.mark.parametrize("what", ["a broken request", "a slot outside"])
def test_what_no_enclave_may_do_ends_the_connection(worker: Serving, what: str) -> None:
    with Watcher(worker) as client:
        post(client.words, 1, 0, 33)
        client.watch(ID, slot=SIZE if what == "a slot outside" else 0)
        reply = client.reply()[0]
        assert (reply.type, reply.code, reply.request_id) == (MessageType.ERROR, ErrorCode.MALFORMED, 0)
        assert client.at_end()


def test_one_core_watches_one_slot(worker: Serving, patient: None) -> None:
    worker.service.answerer.computer._watches = threading.Semaphore(1)
    with Watcher(worker) as first, Watcher(worker, b"2" * 32) as second:
        first.watch(ID)
        wait_for(first.words, Word.WATCHED, 1)
        second.watch(ID)
        reply = second.reply()[0]
        assert (reply.code, reply.request_id) == (ErrorCode.FAILED, 3)
        first.words[Word.LEAVE] = 1
        assert first.reply()[0].type is MessageType.DONE
        second.words[Word.LEAVE] = 1
        second.watch(ID)
        assert second.reply()[0].type is MessageType.DONE


@pytest.mark.parametrize("records", [False, True])
def test_a_worker_that_records_watches_no_slots(tmp_path: Path, records: bool) -> None:
    """What passes there leaves no record; one who asks all the same is refused, which shows in the transcript."""
    with serving(tmp_path, record=tmp_path / "t" if records else None) as worker:
        with RawClient(worker.address) as client:
            features = features_of(client)
        assert features == SHARED_MEMORY | (0 if records else SLOTS)
        with Watcher(worker) as watcher:
            watcher.watch(ID)
            reply = watcher.reply()[0]
            if records:
                assert (reply.type, reply.code) == (MessageType.ERROR, ErrorCode.FAILED)
            else:
                assert reply == Header(MessageType.DONE, 3)
    if records:
        types = [entry.header.type for entry in read_transcript(tmp_path / "t")]
        assert types[-2:] == [MessageType.WATCH, MessageType.ERROR]


def test_a_worker_that_computes_otherwise_offers_no_slots(tmp_path: Path) -> None:
    with serving(tmp_path, dtype=torch.bfloat16) as worker, RawClient(worker.address) as client:
        assert features_of(client) == SHARED_MEMORY


def features_of(client: RawClient) -> int:
    """Greet; what the worker says that it can do."""
    body = Hello(bytes(32)).pack()
    _, welcome = client.ask(Header(MessageType.HELLO, payload_bytes=len(body)), body)
    assert isinstance(welcome, bytes)
    return Welcome.unpack(welcome).features


def test_a_worker_with_one_core_offers_no_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep the enclave from the core that both wait on."""
    monkeypatch.setattr("obfuscatune.worker.compute.cores", lambda: 1)
    with serving(tmp_path) as worker, Watcher(worker) as client:
        with RawClient(worker.address) as other:
            assert features_of(other) == SHARED_MEMORY
        client.watch(ID)
        assert client.reply()[0].code == ErrorCode.FAILED
