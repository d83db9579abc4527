"""A connection that was idle and is dead is noticed before anything is sent on it, and made anew within seconds."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch

from obfuscatune.enclave.client import AdapterClient, WorkerClient
from obfuscatune.enclave.client import connection as module
from obfuscatune.protocol.endpoints import TcpAddress, UnixAddress, connect
from obfuscatune.protocol.limits import IDLE_CHECK_SECONDS, KEEPALIVE_SECONDS, STALL_SECONDS, UNREACHABLE_SECONDS
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.payloads import Attachment, Part, Slice
from obfuscatune.protocol.transport import Deadline
from tests.enclave.client.forgetful import ForgetfulProxy
from tests.worker.serving import serving

ID, ADAPTER = bytes(range(1, 17)), bytes(range(2, 18))
W = torch.arange(12, dtype=torch.float32).reshape(3, 4)
X = torch.arange(6, dtype=torch.float32).reshape(2, 3)
SHORT = 0.2


@pytest.fixture
def soon_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_CHECK_SECONDS", SHORT)


def until_idle(client: WorkerClient) -> None:
    while client._driver._connection is not None and not client._driver._connection.is_idle:
        time.sleep(SHORT / 10)


def test_within_seconds() -> None:
    """As it is set up: far from the 120 s that a reply may take."""
    assert 2 * IDLE_CHECK_SECONDS <= 10


def test_a_nat_that_forgets_an_idle_connection(tmp_path: Path, soon_idle: None) -> None:
    """The matrix is still there, and what must be sent once at most is not lost: nothing was sent in vain."""
    with (
        serving(tmp_path, listen=TcpAddress("127.0.0.1", 0)) as worker,
        ForgetfulProxy((worker.address.host, worker.address.port)) as proxy,
        WorkerClient.open(proxy.address) as client,
    ):
        client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
        adapter = AdapterClient(client, Attachment(ID, (Slice(0, 4, 1, 1.0, 0.0),)), (3, 4), W.dtype)
        adapter.put(0, Part.A, torch.ones(3, 1))
        adapter.forward(X, number=1, dropout=False)
        for asked in (
            lambda: client.multiply(ID, X, transpose=False),
            lambda: adapter.backward(torch.ones(2, 4), number=1),
        ):
            until_idle(client)
            proxy.forget()
            started = time.monotonic()
            asked()
            assert time.monotonic() - started < 60  # half of what a reply may take; SHORT and a little is right
        assert (client.stats.reconnects, client.stats.uploads, client.stats.retries) == (2, 1, 0)


def test_a_connection_that_is_alive_is_kept(tmp_path: Path, soon_idle: None) -> None:
    with (
        serving(tmp_path, listen=TcpAddress("127.0.0.1", 0)) as worker,
        WorkerClient.open(str(worker.address)) as client,
    ):
        client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
        until_idle(client)
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
        assert client.stats.reconnects == 0


def test_a_worker_that_closed_an_idle_connection(tmp_path: Path, soon_idle: None) -> None:
    """On one host, too: what is sent once at most is sent on a connection that is there."""
    with serving(tmp_path) as worker, WorkerClient.open(str(worker.address)) as client:
        client.store(ID, lambda: W, shape=(3, 4), dtype=W.dtype)
        (open_now,) = worker.server._open.items()
        open_now[1].shutdown()
        open_now[0].join()
        until_idle(client)
        assert torch.equal(client.multiply(ID, X, transpose=False), X @ W)
        assert (client.stats.reconnects, client.stats.uploads, client.stats.retries) == (1, 1, 0)


@pytest.mark.parametrize(("side", "unreachable_s"), [("enclave", UNREACHABLE_SECONDS), ("worker", STALL_SECONDS)])
def test_the_system_looks_for_a_peer_that_vanished(side: str, unreachable_s: float) -> None:
    listener = Listener(TcpAddress("127.0.0.1", 0))
    ours = connect(listener.address, Deadline(10))
    theirs = listener.accept()
    sock = {"enclave": ours, "worker": theirs}[side]._sock
    try:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == KEEPALIVE_SECONDS
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == unreachable_s * 1000
    finally:
        ours.close()
        theirs.close()
        listener.close()


def test_half_open_connections_do_not_add_up(tmp_path: Path) -> None:
    """Each time the enclave comes back, its old connection is still open at the worker: only a few are kept."""
    from obfuscatune.protocol.limits import MAX_SESSION_CONNECTIONS
    from tests.worker.serving import RawClient

    with serving(tmp_path) as worker:
        assert isinstance(worker.address, UnixAddress)
        clients = [RawClient(worker.address) for _ in range(MAX_SESSION_CONNECTIONS + 3)]
        for client in clients:
            client.hello()
        assert all(client.at_end() for client in clients[:3])
        for client in clients:
            client.transport.close()
