"""How W* gets to the worker: laid out where memory is shared and has room, else by its bytes; and broken off."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.link import RetryPolicy, WorkerLink
from obfuscatune.enclave.link.connection import LinkConnection
from obfuscatune.wire.address import UnixAddress
from obfuscatune.wire.deadline import NEVER, Deadline
from obfuscatune.wire.errors import ConnectionLost, NonFiniteError
from obfuscatune.wire.framing import recv_body, recv_header, send_message
from obfuscatune.wire.limits import SHARED_BYTES
from obfuscatune.wire.listen import Listener
from obfuscatune.wire.messages import REQUESTS, Header, MessageType
from obfuscatune.wire.payloads import Welcome
from obfuscatune.wire.transport import Buffer
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
    send = LinkConnection.send

    def noted(
        self: LinkConnection, header: Header, payload: Buffer, deadline: Deadline, descriptor: int | None = None
    ) -> None:
        if header.type is MessageType.STORE:
            headers.append(header)
        send(self, header, payload, deadline, descriptor)

    monkeypatch.setattr(LinkConnection, "send", noted)
    return headers


def store(link: WorkerLink, matrix: torch.Tensor = W) -> None:
    rows, cols = matrix.shape
    link.store(ID, lambda: matrix, shape=(rows, cols), dtype=matrix.dtype, tensor=matrix)


def test_on_one_host_it_is_laid_out(worker: Serving, stored: list[Header]) -> None:
    with WorkerLink.open(str(worker.address)) as link:
        for _ in range(SHARED_BYTES // (16 << 20) * 2):  # more than there is room for: its place is used again
            store(link, torch.ones(16, 1 << 18))
        assert {(header.shared, header.payload_bytes) for header in stored} == {(True, 8)}
        store(link)
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
        assert link.stats.bytes_uploaded == W.nbytes + SHARED_BYTES * 2


def test_a_lost_matrix_is_laid_out_again(worker: Serving, stored: list[Header]) -> None:
    with WorkerLink.open(str(worker.address)) as link:
        store(link)
        worker.store.forget_session(next(iter(worker.store._held))[0])
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)
        assert [header.shared for header in stored] == [True, True]


def test_without_room_in_shared_memory_its_bytes_are_sent(worker: Serving, stored: list[Header]) -> None:
    with WorkerLink.open(str(worker.address)) as link:
        full = link.lend(1, SHARED_BYTES, torch.uint8)
        store(link)
        del full
        store(link)
        assert [(header.shared, header.payload_bytes) for header in stored] == [(False, W.nbytes), (True, 8)]
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)


def test_without_shared_memory_its_bytes_are_sent(
    worker: Serving, stored: list[Header], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkConnection, "share", lambda *_: None)
    with WorkerLink.open(str(worker.address)) as link:
        store(link)
        assert [header.shared for header in stored] == [False]
        assert torch.equal(link.multiply(ID, X, transpose=False), X @ W)


def test_what_is_not_finite_is_not_laid_out(worker: Serving, stored: list[Header]) -> None:
    with WorkerLink.open(str(worker.address)) as link, pytest.raises(NonFiniteError):
        store(link, W / 0)
    assert stored == []


class Silent:
    """Greets, and from then on says nothing."""

    def __init__(self, folder: Path) -> None:
        self._listener = Listener(UnixAddress(folder / "silent.sock"))
        self.address = str(self._listener.address)
        self.asked = threading.Semaphore(0)
        """Released with each request that came."""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while (transport := self._listener.accept()) is not None:
            header = recv_header(transport, REQUESTS)
            recv_body(transport, header, NEVER)
            body = Welcome(1, 1, 0, 1 << 20, 1 << 20, 1 << 20).pack()
            send_message(transport, Header(MessageType.WELCOME, payload_bytes=len(body)), body, deadline=NEVER)
            try:
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


def test_what_waits_in_another_thread_is_broken_off(tmp_path: Path) -> None:
    silent = Silent(tmp_path)
    caught: list[BaseException] = []
    link = WorkerLink.open(silent.address, retry=RetryPolicy(patience_s=600))

    def wait() -> None:
        try:
            store(link)
        except ConnectionLost as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert silent.asked.acquire(timeout=SECONDS)
    with link.broken_off():
        thread.join(SECONDS)
        assert not thread.is_alive()
        with pytest.raises(ConnectionLost, match="broken off on this side"):
            store(link)
    assert len(caught) == 1
    again = threading.Thread(target=wait)  # afterwards it connects anew
    again.start()
    assert silent.asked.acquire(timeout=SECONDS)
    with link.broken_off():
        again.join(SECONDS)
    link.close()
    silent.close()
