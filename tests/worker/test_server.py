"""A worker on a real socket: what it answers, what it refuses, and whom it keeps apart."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import WorkerClient
from obfuscatune.errors import QuotaExceeded, WorkerRefused
from obfuscatune.protocol.framing import recv_header, send_message
from obfuscatune.protocol.limits import MAX_IN_FLIGHT
from obfuscatune.protocol.messages import NO_MATRIX, REPLIES, SHARED, ErrorCode, Header, MessageType
from obfuscatune.protocol.payloads import Hello, Places, pack_number
from obfuscatune.protocol.shared_memory import SharedMemory
from obfuscatune.protocol.tensors import DType, bytes_of
from obfuscatune.protocol.transport import Deadline
from obfuscatune.worker.connection import AT_ONCE_BYTES
from obfuscatune.worker.request_reader import TooManyInFlight
from tests.worker.serving import RawClient, Serving, serving

ID = bytes(range(1, 17))
W = torch.arange(12, dtype=torch.float32).reshape(3, 4)
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)


@pytest.fixture
def worker(tmp_path: Path):
    with serving(tmp_path) as running:
        yield running


def assert_near(product: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of summation: 1e-5 of the largest element, for sums of about 1,000 float32 products."""
    assert float((product - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def link_to(worker: Serving, matrix_id: bytes = ID, matrix: torch.Tensor = W) -> WorkerClient:
    link = WorkerClient.open(str(worker.address))
    link.store(matrix_id, lambda: matrix, shape=tuple(matrix.shape), dtype=matrix.dtype)
    return link


def multiply(rows: torch.Tensor = X, request_id: int = 5, matrix_id: bytes = ID) -> Header:
    return Header(MessageType.MULTIPLY, request_id, matrix_id, DType.FLOAT32, *rows.shape, rows.nbytes, DType.FLOAT32)


def test_products(worker: Serving) -> None:
    with link_to(worker) as link:
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
        assert torch.equal(link.multiply(ID, X @ W, transpose=True), X @ W @ W.T)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 257, 129), (700, 300, 1100), (3000, 1000, 3)])
def test_products_of_many_sizes(worker: Serving, shape: tuple[int, int, int]) -> None:
    """Larger than socket buffers, smaller than a word; buffers used again must not leak what was in them."""
    m, p, q = shape
    generator = torch.Generator().manual_seed(m)
    matrix, rows = torch.randn(p, q, generator=generator), torch.randn(m, p, generator=generator)
    with link_to(worker, matrix=matrix) as link:
        for factor in (1, 2):
            assert_near(link.multiply(ID, rows * factor, transpose=False), rows * factor @ matrix)
            one = (rows @ matrix)[:1]
            assert_near(link.multiply(ID, one, transpose=True), one @ matrix.T)


def test_bfloat16_worker_halves_what_it_holds(tmp_path: Path) -> None:
    with serving(tmp_path, dtype=torch.bfloat16) as worker, link_to(worker) as link:
        assert worker.store.held_bytes == W.nbytes // 2
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)  # small whole numbers


def test_many_large_requests_in_flight_do_not_deadlock(worker: Serving) -> None:
    """More than the socket buffers hold, both ways, before a single reply is read."""
    matrix = torch.eye(1000)
    rows = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(1))
    with link_to(worker, matrix=matrix) as link:
        pendings = [link.submit(ID, rows + i, transpose=False) for i in range(MAX_IN_FLIGHT + 2)]
        for i, pending in reversed(list(enumerate(pendings))):
            assert torch.equal(pending.result(), rows + i)


def test_more_in_flight_than_allowed_ends_the_connection(worker: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()
    answer = worker.service.answerer._answers[MessageType.FORGET]

    class Seen(TooManyInFlight):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            refused.set()

    def once_one_was_too_many(*arguments: object) -> object:
        refused.wait()
        return answer(*arguments)

    monkeypatch.setattr("obfuscatune.worker.connection.AT_ONCE_BYTES", -1)  # all is read before anything is answered
    monkeypatch.setattr("obfuscatune.worker.request_reader.TooManyInFlight", Seen)
    worker.service.answerer._answers[MessageType.FORGET] = once_one_was_too_many
    with RawClient(worker.address) as client:
        client.hello()
        for request_id in range(1, MAX_IN_FLIGHT + 2):
            client.say(Header(MessageType.FORGET, request_id, ID))
        replies = [client.reply()[0] for _ in range(MAX_IN_FLIGHT + 1)]
        assert [reply.type for reply in replies[:-1]] == [MessageType.DONE] * MAX_IN_FLIGHT
        assert (replies[-1].code, replies[-1].request_id) == (ErrorCode.LIMIT, 0)
        assert client.at_end()


def test_sessions_cannot_use_probe_or_forget_each_other_s(worker: Serving) -> None:
    with link_to(worker) as ours, RawClient(worker.address, b"\x01" * 32) as stranger:
        stranger.hello()
        header, _ = stranger.ask(multiply(), bytes_of(X))
        unknown, _ = stranger.ask(multiply(matrix_id=bytes(16)[:-1] + b"\x09"), bytes_of(X))
        assert header.code == unknown.code == ErrorCode.UNKNOWN_MATRIX  # held by another, or by nobody: no difference
        offer = Header(MessageType.OFFER, 6, ID, DType.FLOAT32, 3, 4, 32)
        assert stranger.ask(offer, bytes(32))[0].type is MessageType.WANT
        for matrix_id in (ID, NO_MATRIX):
            assert stranger.ask(Header(MessageType.FORGET, 7, matrix_id))[0].type is MessageType.DONE
        store = Header(MessageType.STORE, 8, ID, DType.FLOAT32, 3, 4, 48)
        assert stranger.ask(store, bytes_of(-W))[0].type is MessageType.STORED
        assert torch.equal(ours.multiply(ID, X, transpose=False), X @ W)
        assert ours.stats.uploads == 1


def test_a_session_that_comes_back_finds_its_matrices(worker: Serving) -> None:
    with RawClient(worker.address) as first:
        first.hello()
        first.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 3, 4, 48), bytes_of(W))
    with RawClient(worker.address) as second:
        second.hello()
        _, product = second.ask(multiply(), bytes_of(X))
        assert torch.equal(product, X @ W)


def test_a_session_expires_some_time_after_its_last_connection(tmp_path: Path) -> None:
    with serving(tmp_path, idle_seconds=0) as worker:
        with RawClient(worker.address) as first:
            first.hello()
            first.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 3, 4, 48), bytes_of(W))
            assert first.ask(multiply(), bytes_of(X))[0].type is MessageType.PRODUCT
            first.raw(b"\0" * 56)  # the worker hangs up, and has done with the session once it has
            first.reply()
            assert first.at_end()
        until_left(worker)
        with RawClient(worker.address) as other:
            other.hello()
        assert worker.store.held_bytes == 0


def until_left(worker: Serving) -> None:
    """Wait for the threads of all connections."""
    for thread in list(worker.server._open):
        thread.join(20)


def test_no_more_sessions_than_allowed(tmp_path: Path) -> None:
    with serving(tmp_path, max_sessions=1) as worker, RawClient(worker.address) as first:
        first.hello()
        with pytest.raises(WorkerRefused, match="max-sessions"):
            WorkerClient.open(str(worker.address))
        with RawClient(worker.address) as again:  # the same session: no new one
            assert again.hello().type is MessageType.WELCOME


def test_quota_refuses_at_the_offer(tmp_path: Path) -> None:
    with serving(tmp_path, quota_bytes=60) as worker, link_to(worker) as link:
        with pytest.raises(QuotaExceeded, match="you have 48 of the 60"):
            link.store(bytes(15) + b"\x01", lambda: W, shape=(3, 4), dtype=W.dtype)
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
        assert link.stats.reconnects == 0


def test_quota_refuses_a_matrix_that_comes_unoffered_and_reads_on(tmp_path: Path) -> None:
    with serving(tmp_path, quota_bytes=60) as worker, RawClient(worker.address) as client:
        client.hello()
        big = torch.zeros(1000, 3000)
        store = Header(MessageType.STORE, 1, ID, DType.FLOAT32, 1000, 3000, big.nbytes)
        assert client.ask(store, bytes_of(big))[0].code == ErrorCode.QUOTA
        small = Header(MessageType.STORE, 2, ID, DType.FLOAT32, 3, 4, 48)
        assert client.ask(small, bytes_of(W))[0].type is MessageType.STORED


def test_eviction_costs_an_upload_and_nothing_else(tmp_path: Path) -> None:
    ids = [bytes(15) + bytes([i]) for i in (1, 2, 3)]
    with (
        serving(tmp_path, quota_bytes=100, when_full="evict") as worker,
        WorkerClient.open(str(worker.address)) as link,
    ):
        for i, matrix_id in enumerate(ids):
            link.store(matrix_id, lambda i=i: W * i, shape=(3, 4), dtype=W.dtype)
        for _ in range(2):
            for i, matrix_id in enumerate(ids):
                assert torch.equal(link.multiply(matrix_id, X, transpose=False), X @ W * i)
        assert link.stats.uploads == 9
        assert worker.store.held_bytes <= 100


def test_a_claim_ends_with_the_connection(worker: Serving) -> None:
    """A STORE that breaks off must not take up room for ever."""
    with RawClient(worker.address) as client:
        client.hello()
        client.say(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 1000, 1000, 4_000_000), bytes(1000))
    until_left(worker)
    assert worker.store.held_bytes == 0


def test_rows_of_the_wrong_width(worker: Serving) -> None:
    with link_to(worker), RawClient(worker.address) as client:
        client.hello()
        client.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 3, 4, 48), bytes_of(W))
        header, text = client.ask(multiply(torch.zeros(2, 5)), bytes(40))
        assert (header.code, text) == (ErrorCode.SHAPE, b"rows have 5 columns, the matrix takes 3")
        assert client.ask(multiply(), bytes_of(X))[0].type is MessageType.PRODUCT


def test_few_bytes_do_not_ask_for_many(worker: Serving) -> None:
    """2 KB of rows times a matrix of one row would be a product of 2 GiB and more."""
    wide, rows = torch.ones(1, 2**20), torch.ones(513, 1)
    with RawClient(worker.address) as client:
        client.hello()
        client.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, *wide.shape, wide.nbytes), bytes_of(wide))
        header, text = client.ask(multiply(rows), bytes_of(rows))
        assert header.code == ErrorCode.LIMIT
        assert b"split the rows" in text


def test_versions_without_one_in_common(worker: Serving) -> None:
    with RawClient(worker.address) as client:
        body = Hello(bytes(32), 2, 9).pack()
        header, text = client.ask(Header(MessageType.HELLO, payload_bytes=len(body)), body)
        assert header.code == ErrorCode.VERSION
        assert b"2 to 9 offered, 1 spoken" in text
        assert client.at_end()


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.1\r\n\r\n" + bytes(60), Header(MessageType.FORGET, 1, ID).pack(), bytes(56)],
    ids=["another protocol", "a request before HELLO", "zeros"],
)
def test_no_greeting(worker: Serving, data: bytes) -> None:
    with RawClient(worker.address) as client:
        client.raw(data)
        assert client.reply()[0].code == ErrorCode.MALFORMED
        assert client.at_end()


def test_a_second_hello(worker: Serving) -> None:
    with RawClient(worker.address) as client:
        client.hello()
        client.raw(Header(MessageType.HELLO, payload_bytes=36).pack() + bytes(36))
        assert client.reply()[0].code == ErrorCode.MALFORMED
        assert client.at_end()


def test_a_wrong_turn_of_one_connection_leaves_the_others(worker: Serving) -> None:
    with link_to(worker) as link:
        for _ in range(3):
            with RawClient(worker.address) as client:
                client.hello()
                client.raw(b"\xff" * 100)
                client.reply()
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
        assert link.stats.reconnects == 0


def test_what_is_asked_before_the_stop_is_answered(tmp_path: Path) -> None:
    with serving(tmp_path) as worker, RawClient(worker.address) as client:
        client.hello()
        client.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 3, 4, 48), bytes_of(W))
        entered, release = threading.Event(), threading.Event()
        answer = worker.service.answerer._answers[MessageType.MULTIPLY]

        def slow(*arguments: object) -> object:
            entered.set()
            release.wait()
            return answer(*arguments)

        worker.service.answerer._answers[MessageType.MULTIPLY] = slow
        client.say(multiply(), bytes_of(X))
        entered.wait()
        worker.server.stop()
        release.set()
        assert torch.equal(client.reply()[1], X @ W)
        assert client.at_end()


def test_a_failing_device_is_an_error_and_not_the_end(worker: Serving) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    with link_to(worker) as link:
        whole = worker.service.answerer.computer.multiply
        worker.service.answerer.computer.multiply = failing
        with pytest.raises(WorkerRefused, match="illegal memory access was"):
            link.multiply(ID, X, transpose=False)
        worker.service.answerer.computer.multiply = whole
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)


def test_content_store_saves_the_second_upload(tmp_path: Path) -> None:
    for run, uploads in (("first", 1), ("second", 0)):
        (tmp_path / run).mkdir()
        with serving(tmp_path / run, disk=tmp_path / "disk") as worker, link_to(worker) as link:
            assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
            assert link.stats.uploads == uploads


def test_damaged_content_is_uploaded_again(tmp_path: Path) -> None:
    for run, uploads in (("first", 1), ("second", 1), ("third", 0)):
        (tmp_path / run).mkdir()
        with serving(tmp_path / run, disk=tmp_path / "disk") as worker, link_to(worker) as link:
            assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
            assert link.stats.uploads == uploads
        if run == "first":
            (file,) = (tmp_path / "disk").iterdir()
            file.write_bytes(b"\xff" + file.read_bytes()[1:])


def test_content_cannot_be_poisoned(tmp_path: Path) -> None:
    """Offer the digest of one matrix, store another: nobody else gets the other one for it."""
    from obfuscatune.protocol.tensors import content_digest

    with serving(tmp_path, disk=tmp_path / "disk") as worker:
        with RawClient(worker.address, b"\x01" * 32) as client:
            client.hello()
            client.ask(Header(MessageType.OFFER, 1, ID, DType.FLOAT32, 3, 4, 32), content_digest(W))
            client.ask(Header(MessageType.STORE, 2, ID, DType.FLOAT32, 3, 4, 48), bytes_of(-W))
        with link_to(worker) as link:
            assert link.stats.uploads == 1
            assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)


def shared_multiply(request_id: int, rows: int, product: int) -> tuple[Header, bytes]:
    """X @ W with both in shared memory at these offsets."""
    body = Places(rows, product).pack()
    fields = {"rows": 2, "cols": 3, "payload_bytes": len(body), "reply_dtype": DType.FLOAT32, "flags": SHARED}
    return Header(MessageType.MULTIPLY, request_id, ID, DType.FLOAT32, **fields), body


def share(client: RawClient, size: int, descriptor: int | None) -> Header:
    """Say SHARE; the reply."""
    header = Header(MessageType.SHARE, 99, payload_bytes=8)
    send_message(client.transport, header, pack_number(size), deadline=Deadline(20), descriptor=descriptor)
    return client.reply()[0]


def test_products_through_shared_memory(worker: Serving) -> None:
    memory, descriptor = SharedMemory.create(8192)
    with RawClient(worker.address) as client:
        client.hello()
        client.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 3, 4, 48), bytes_of(W))
        assert share(client, 8192, descriptor).type is MessageType.DONE
        memory.matrix(64, 2, 3, torch.float32).copy_(X)
        client.say(*shared_multiply(2, 64, 4096))
        reply = recv_header(client.transport, REPLIES, deadline=Deadline(20))
        assert (reply.type, reply.shared, reply.payload_bytes) == (MessageType.PRODUCT, True, 0)
        assert torch.equal(memory.matrix(4096, 2, 4, torch.float32), X @ W)


@pytest.mark.parametrize(
    ("rows", "product"), [(8192, 0), (8192 - 16, 0), (4, 0), (0, 8192), (0, 2**63), (2**64 - 64, 0)]
)
def test_nothing_outside_of_shared_memory_is_touched(worker: Serving, rows: int, product: int) -> None:
    _, descriptor = SharedMemory.create(8192)
    with RawClient(worker.address) as client:
        client.hello()
        share(client, 8192, descriptor)
        reply = client.ask(*shared_multiply(2, rows, product))[0]
        assert (reply.code, reply.request_id) == (ErrorCode.MALFORMED, 0)
        assert client.at_end()


def test_a_product_that_does_not_fit_behind_its_offset_is_refused(worker: Serving) -> None:
    _, descriptor = SharedMemory.create(8192)
    matrix = torch.ones(3, 4000)
    with RawClient(worker.address) as client:
        client.hello()
        client.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 3, 4000, matrix.nbytes), bytes_of(matrix))
        share(client, 8192, descriptor)
        assert client.ask(*shared_multiply(2, 0, 64))[0].code == ErrorCode.LIMIT


@pytest.mark.parametrize("what", ["no descriptor", "a pipe", "unsealed", "twice", "never"])
def test_memory_that_is_not_as_agreed_ends_the_connection(worker: Serving, what: str) -> None:
    with RawClient(worker.address) as client:
        client.hello()
        if what == "never":
            reply = client.ask(*shared_multiply(2, 0, 64))[0]
        elif what == "twice":
            for _ in range(2):
                reply = share(client, 8192, SharedMemory.create(8192)[1])
        else:
            unsealed = os.memfd_create("test")
            os.ftruncate(unsealed, 8192)
            descriptors = {"no descriptor": None, "a pipe": os.pipe()[0], "unsealed": unsealed}
            reply = share(client, 8192, descriptors[what])
        assert (reply.code, reply.request_id) == (ErrorCode.MALFORMED, 0)
        assert client.at_end()


def test_descriptors_that_nobody_asked_for_are_closed(worker: Serving) -> None:
    with RawClient(worker.address) as client:
        client.hello()
        before = len(os.listdir("/proc/self/fd"))
        pipe = os.pipe()
        for request_id in range(1, 200):
            header = Header(MessageType.FORGET, request_id, ID)
            send_message(client.transport, header, deadline=Deadline(20), descriptor=pipe[0])
            client.reply()
        assert len(os.listdir("/proc/self/fd")) < before + 10
        for descriptor in pipe:
            os.close(descriptor)


def test_a_full_arena_sends_through_the_socket(worker: Serving) -> None:
    with link_to(worker) as link:
        rows = link.allocate(2, 3, torch.float32).copy_(X)
        full = link.allocate(1, 256 * 2**20 - 64, torch.uint8)
        assert torch.equal(link.multiply(ID, rows, transpose=False), X @ W)
        assert torch.equal(link.multiply(ID, link.allocate(2, 3, torch.float32).copy_(X), transpose=False), X @ W)
        del full
        assert torch.equal(link.multiply(ID, link.allocate(2, 3, torch.float32).copy_(X), transpose=False), X @ W)


def test_few_bytes_are_answered_by_the_thread_that_reads_them(worker: Serving) -> None:
    """No other thread is started for a connection before it is needed."""
    before = set(threading.enumerate())
    with link_to(worker) as link:
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
        assert [thread.name for thread in set(threading.enumerate()) - before] == ["connection"]


def test_who_reads_no_reply_can_send_all_requests(worker: Serving) -> None:
    """Few bytes there and many back: the reader leaves replies that the socket does not take, and reads on."""
    matrix, rows = torch.ones(64, 1024), torch.ones(1024, 64)
    assert rows.nbytes == AT_ONCE_BYTES
    with RawClient(worker.address) as client:
        client.hello()
        client.ask(Header(MessageType.STORE, 1, ID, DType.FLOAT32, 64, 1024, matrix.nbytes), bytes_of(matrix))
        ask = Header(MessageType.MULTIPLY, 2, ID, DType.FLOAT32, 1024, 64, rows.nbytes, DType.FLOAT32)
        for request_id in range(2, 2 + MAX_IN_FLIGHT):
            client.say(replace(ask, request_id=request_id), bytes_of(rows))
        for request_id in range(2, 2 + MAX_IN_FLIGHT):
            header, product = client.reply()
            assert header.request_id == request_id
            assert torch.equal(product, torch.full((1024, 1024), 64.0))
