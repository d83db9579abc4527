"""How W* gets to the worker: laid out where memory is shared and has room, else by its bytes; and broken off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import RetryPolicy, WorkerClient
from obfuscatune.enclave.client.connection import ClientConnection
from obfuscatune.errors import ConnectionLost, NonFiniteError, QuotaExceeded
from obfuscatune.protocol.endpoints import UnixAddress, connect
from obfuscatune.protocol.framing import recv_body, recv_header, send_message
from obfuscatune.protocol.limits import SHARED_BYTES
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.messages import REQUESTS, Header, MessageType
from obfuscatune.protocol.payloads import Welcome
from obfuscatune.protocol.transport import NEVER, Buffer, Deadline, Transport
from tests.worker.serving import SECONDS, Serving, serving

ID = bytes(range(1, 17))
W = torch.arange(12, dtype=torch.float32).reshape(3, 4)
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path) as running:
        yield running


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[Header]:
    """The header of every STORE that is sent."""
    headers: list[Header] = []
    send = ClientConnection.send

    def noted(
        self: ClientConnection, header: Header, payload: Buffer, deadline: Deadline, descriptor: int | None = None
    ) -> None:
        if header.type is MessageType.STORE:
            headers.append(header)
        send(self, header, payload, deadline, descriptor)

    monkeypatch.setattr(ClientConnection, "send", noted)
    return headers


def store(client: WorkerClient, matrix: torch.Tensor = W) -> None:
    rows, cols = matrix.shape
    client.store(ID, lambda: matrix, shape=(rows, cols), dtype=matrix.dtype, tensor=matrix)


def test_on_one_host_it_is_laid_out(worker: Serving, stored: list[Header]) -> None:
    with WorkerClient.open(str(worker.address)) as client:
        for _ in range(SHARED_BYTES // (16 << 20) * 2):  # more than there is room for: its place is used again
            store(client, torch.ones(16, 1 << 18))
        assert {(header.shared, header.payload_bytes) for header in stored} == {(True, 8)}
        store(client)
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
        assert client.stats.bytes_uploaded == W.nbytes + SHARED_BYTES * 2


def test_a_lost_matrix_is_laid_out_again(worker: Serving, stored: list[Header]) -> None:
    with WorkerClient.open(str(worker.address)) as client:
        store(client)
        worker.store.forget_session(next(iter(worker.store._held))[0])
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
        assert [header.shared for header in stored] == [True, True]


def test_without_room_in_shared_memory_its_bytes_are_sent(worker: Serving, stored: list[Header]) -> None:
    with WorkerClient.open(str(worker.address)) as client:
        full = client.allocate(1, SHARED_BYTES, torch.uint8)
        store(client)
        del full
        store(client)
        assert [(header.shared, header.payload_bytes) for header in stored] == [(False, W.nbytes), (True, 8)]
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)


def test_what_is_larger_than_shared_memory_is_sent(
    worker: Serving, stored: list[Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obfuscatune.enclave.client.scheduler.SHARED_BYTES", 1 << 16)
    large = torch.ones(128, 129)
    with WorkerClient.open(str(worker.address)) as client:
        store(client, large)
        store(client, large[:, :128].contiguous())  # fills it
        assert [header.shared for header in stored] == [False, True]
        assert torch.equal(client.multiply(ID, torch.ones(1, 128), transpose=False), torch.full((1, 128), 128.0))


def test_the_place_of_what_is_refused_comes_back(worker: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise QuotaExceeded("taken by another session since the offer")

    monkeypatch.setattr("obfuscatune.enclave.client.scheduler.SHARED_BYTES", 1 << 16)
    with WorkerClient.open(str(worker.address)) as client:
        monkeypatch.setitem(worker.service.answerer._answers, MessageType.STORE, full)
        with pytest.raises(QuotaExceeded):
            store(client, torch.ones(128, 128))
        allocator = client._driver.allocator
        assert allocator is not None
        assert allocator.allocate(1, 1 << 16, torch.uint8) is not None


def test_without_shared_memory_its_bytes_are_sent(
    worker: Serving, stored: list[Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClientConnection, "share", lambda *_: None)
    with WorkerClient.open(str(worker.address)) as client:
        store(client)
        assert [header.shared for header in stored] == [False]
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)


def test_what_is_not_finite_is_not_laid_out(worker: Serving, stored: list[Header]) -> None:
    with WorkerClient.open(str(worker.address)) as client, pytest.raises(NonFiniteError):
        store(client, W / 0)
    assert stored == []


class Silent:
    """Greets, if it is to, and from then on says nothing."""

    def __init__(self, folder: Path, *, greets: bool = True) -> None:
        self._listener = Listener(UnixAddress(folder / "silent.sock"))
        self.address = self._listener.address
        self.asked = threading.Semaphore(0)
        """Released with each connection, once it came to the request that is not answered."""
        self._greets = greets
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while (transport := self._listener.accept()) is not None:
            try:
                header = recv_header(transport, REQUESTS)
                if self._greets:
                    recv_body(transport, header, NEVER)
                    body = Welcome(1, 1, 0, 1 << 20, 1 << 20, 1 << 20).pack()
                    send_message(transport, Header(MessageType.WELCOME, payload_bytes=len(body)), body, deadline=NEVER)
                    recv_header(transport, REQUESTS)
                self.asked.release()
                while transport.recv_into(memoryview(bytearray(64)), NEVER):
                    pass
            except ConnectionLost:
                pass
            transport.close()

    def close(self) -> None:
        self._listener.stop()
        self._thread.join(SECONDS)
        self._listener.close()


class Storing(threading.Thread):
    """Another thread that stores by a link; what it was refused with."""

    def __init__(self, client: WorkerClient) -> None:
        super().__init__(daemon=True)
        self._client = client
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            store(self._client)
        except ConnectionLost as error:
            self.error = error


@pytest.mark.parametrize("greets", [True, False])
def test_what_waits_in_another_thread_is_broken_off(tmp_path: Path, greets: bool) -> None:
    silent = Silent(tmp_path, greets=greets)
    later = 2 * SECONDS  # than is waited here
    client = WorkerClient(
        lambda: connect(silent.address, Deadline(SECONDS)), deadline_s=later, retry=RetryPolicy(backoff_s=later)
    )
    for _ in range(2):  # afterwards it connects anew
        waiting = Storing(client)
        assert silent.asked.acquire(timeout=SECONDS)
        with client.broken_off():
            waiting.join(SECONDS)
            assert not waiting.is_alive()
            assert isinstance(waiting.error, ConnectionLost)
            with pytest.raises(ConnectionLost, match="broken off on this side"):
                store(client)
    client.close()
    silent.close()


def test_a_connection_that_was_made_too_late_is_broken_off_too(worker: Serving) -> None:
    """It could not be shut down when it was broken off, for it was not there yet."""

    def connected() -> Transport:
        stack.enter_context(client.broken_off())
        return connect(worker.address, Deadline(SECONDS))

    with WorkerClient(connected) as client, ExitStack() as stack:
        with pytest.raises(ConnectionLost):
            store(client)
        assert not client._driver.connected


def test_what_was_broken_off_while_nothing_waited_works_afterwards(worker: Serving, stored: list[Header]) -> None:
    with WorkerClient.open(str(worker.address)) as client:
        store(client)
        with client.broken_off(), pytest.raises(ConnectionLost):
            client.multiply(ID, X, transpose=False)
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
        store(client, -W)
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ -W)
        assert client.stats.reconnects == 1
        assert [header.shared for header in stored] == [True, True]
