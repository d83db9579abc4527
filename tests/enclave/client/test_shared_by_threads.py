"""Several threads on one link: none waits for another's reply before it can send."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import RetryPolicy, WorkerClient
from obfuscatune.errors import DeadlineExceeded
from obfuscatune.protocol.addresses import TcpAddress, parse_address
from obfuscatune.protocol.endpoints import connect
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.messages import HEADER_BYTES
from obfuscatune.protocol.tls import RECORD_BYTES, PinnedTls, TlsTransport
from obfuscatune.protocol.transport import Deadline
from tests.protocol.peers import identity, make_identities
from tests.worker.serving import SECONDS, serving

ID = b"m" * 16
W = torch.arange(12, dtype=torch.float64).reshape(3, 4)
IMPATIENT = RetryPolicy(attempts=1, patience_s=0.1, backoff_s=0.01)
OVERHEAD = 22
"""Bytes of a TLS 1.3 record beside what it carries."""
REQUEST_BYTES = HEADER_BYTES + 2 * 3 * 8


def rows(number: int) -> torch.Tensor:
    return torch.arange(6, dtype=torch.float64).reshape(2, 3) + number


class Relay:
    """Passes bytes to a worker and back; while it is shut, replies are held back until so many bytes were asked."""

    def __init__(self, worker: TcpAddress) -> None:
        self._worker = worker
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self.changed = threading.Condition()
        self.asked = 0
        self.open_at = 0
        """Replies pass once so many bytes were asked."""
        self._sockets: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def shut_until(self, more: int) -> None:
        """Hold replies back until so many more bytes were asked."""
        with self.changed:
            self.open_at = self.asked + more

    def cut(self) -> None:
        """Break every connection; new ones are accepted."""
        for sock in self._sockets[1:]:
            _shutdown(sock)

    def close(self) -> None:
        for sock in self._sockets:
            _shutdown(sock)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                ours, _ = self._listener.accept()
            except OSError:
                return
            theirs = socket.create_connection((self._worker.host, self._worker.port))
            self._sockets += [ours, theirs]
            for source, sink, passed in ((ours, theirs, self._count), (theirs, ours, self._hold)):
                threading.Thread(target=self._pass, args=(source, sink, passed), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, passed: Callable[[int], None]) -> None:
        try:
            while data := source.recv(65536):
                passed(len(data))
                sink.sendall(data)
        except OSError:
            pass
        finally:
            _shutdown(source)
            _shutdown(sink)

    def _count(self, size: int) -> None:
        with self.changed:
            self.asked += size
            self.changed.notify_all()

    def _hold(self, size: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.asked >= self.open_at, SECONDS)


def _shutdown(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    with serving(tmp_path, listen=TcpAddress("127.0.0.1", 0)) as worker:
        assert isinstance(worker.address, TcpAddress)
        made = Relay(worker.address)
        yield made
        made.close()


@pytest.fixture
def client(relay: Relay) -> Iterator[WorkerClient]:
    with WorkerClient.open(relay.address, deadline_s=SECONDS) as made:
        made.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
        yield made


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Two threads that the client knows of."""
    with ThreadPoolExecutor(2) as made:
        yield made


def ask(client: WorkerClient, number: int, both: threading.Barrier | None = None) -> bool:
    if both is not None:
        both.wait(SECONDS)
    return torch.equal(client.multiply(ID, rows(number), transpose=False), rows(number) @ W)


def both_ask(client: WorkerClient, pool: ThreadPoolExecutor) -> list[bool]:
    both = threading.Barrier(2)
    return [it.result(SECONDS) for it in [pool.submit(ask, client, number, both) for number in (1, 2)]]


def test_a_second_request_is_sent_before_the_first_is_answered(
    relay: Relay, client: WorkerClient, pool: ThreadPoolExecutor
) -> None:
    assert both_ask(client, pool) == [True, True]  # from here on the client knows of two threads
    relay.shut_until(2 * REQUEST_BYTES)
    assert both_ask(client, pool) == [True, True]
    assert relay.asked == relay.open_at


def test_each_gets_its_own_product_whoever_reads_it(client: WorkerClient) -> None:
    with ThreadPoolExecutor(4) as several:
        assert all(several.map(lambda number: ask(client, number), range(200)))


def test_what_was_asked_is_asked_again_for_all_when_the_connection_breaks(
    relay: Relay, client: WorkerClient, pool: ThreadPoolExecutor
) -> None:
    assert both_ask(client, pool) == [True, True]
    relay.shut_until(4 * REQUEST_BYTES)  # never reached on this connection
    before = client.stats.reconnects
    asked = [pool.submit(ask, client, number) for number in (1, 2)]
    with relay.changed:
        assert relay.changed.wait_for(lambda: relay.asked == relay.open_at - 2 * REQUEST_BYTES, SECONDS)
        relay.open_at = 0
    relay.cut()
    assert [it.result(SECONDS) for it in asked] == [True, True]
    assert client.stats.reconnects == before + 1


def test_a_deadline_is_kept_by_who_does_not_read(relay: Relay, pool: ThreadPoolExecutor) -> None:
    with WorkerClient.open(relay.address, deadline_s=0.3, retry=IMPATIENT) as client:
        client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
        assert both_ask(client, pool) == [True, True]
        relay.shut_until(10**9)
        asked = [pool.submit(ask, client, number) for number in (1, 2)]
        for it in asked:
            with pytest.raises(DeadlineExceeded):
                it.result(SECONDS)
        relay.shut_until(0)


def test_whatever_openssl_holds_decrypted_is_news(tmp_path: Path) -> None:
    """The rest of a record of which a part was read: it is on no socket that could be polled."""
    keys = make_identities(tmp_path)
    listener = Listener(parse_address("tcp:127.0.0.1:0"), PinnedTls(identity(keys, "worker", "enclave"), server=True))

    def answer() -> None:
        transport = listener.accept()
        assert transport is not None
        transport.establish(Deadline(SECONDS))
        transport.send([bytes(5 * RECORD_BYTES)], Deadline(SECONDS))
        transport.recv_into(memoryview(bytearray(1)), Deadline(SECONDS))
        transport.close()

    thread = threading.Thread(target=answer)
    thread.start()
    here = PinnedTls(identity(keys, "enclave", "worker"), server=False)
    transport = connect(listener.address, Deadline(SECONDS), here)
    part = memoryview(bytearray(4 * RECORD_BYTES + 100))  # more than is read ahead
    sealed, until = 5 * (RECORD_BYTES + OVERHEAD), Deadline(SECONDS)
    assert isinstance(transport, TlsTransport)
    select.select([transport._tls_sock], [], [], SECONDS)
    while len(socket.socket.recv(transport._tls_sock, sealed, socket.MSG_PEEK)) < sealed:
        until.remaining()
    assert transport.recv_into(part, until) == len(part)
    assert transport.has_news()
    transport.send([b"x"], Deadline(SECONDS))
    thread.join(SECONDS)
    transport.close()
    listener.close()
