"""Who meets somebody that speaks something else says what that is, and what to do: one line, at once."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from obfuscatune.enclave.client import WorkerClient
from obfuscatune.errors import BadMagic, ConnectionLost, UntrustedPeer, WireError, WorkerRefused
from obfuscatune.protocol.endpoints import TcpAddress, connect
from obfuscatune.protocol.limits import HANDSHAKE_SECONDS
from obfuscatune.protocol.messages import MessageType
from obfuscatune.protocol.tls import PinnedTls, TlsConfig, TlsTransport
from obfuscatune.protocol.transport import Deadline
from tests.protocol.peers import identity, make_identities
from tests.worker.serving import RawClient, Serving, serving

OPTIONS = "--tls-cert, --tls-key and --peer"


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_identities(tmp_path_factory.mktemp("identities"))


@contextmanager
def serving_by(tls: TlsConfig | None, folder: Path) -> Iterator[Serving]:
    pinned = None if tls is None else PinnedTls(tls, server=True)
    with serving(folder, listen=TcpAddress("127.0.0.1", 0), tls=pinned) as worker:
        yield worker


def refused(address: str, tls: TlsConfig | None, error: type[WireError]) -> str:
    """What an enclave says that connects there: one line, at the first try."""
    started = time.monotonic()
    with pytest.raises(error) as caught:
        WorkerClient.open(address, tls=tls)
    assert time.monotonic() - started < HANDSHAKE_SECONDS
    text = str(caught.value)
    assert "\n" not in text
    assert "attempts" not in text
    return text


def logged(worker: Serving, caplog: pytest.LogCaptureFixture) -> str:
    """What the worker said of the one connection that it refused."""
    for thread in list(worker.server._open):
        thread.join(20)
    (line,) = (
        record.getMessage()
        for record in caplog.records
        if "did not finish its handshake" in record.msg or "refused" in record.msg
    )
    assert "\n" not in line
    return line


def until_closed(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):  # it closed with bytes of ours unread
        while sock.recv(4096):
            pass


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO):
        yield


def test_an_enclave_by_tls_and_a_worker_without(
    identities: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_by(None, tmp_path) as worker:
        text = refused(str(worker.address), identity(identities, "enclave", "worker"), UntrustedPeer)
        assert "without TLS" in text
        assert OPTIONS in text
        line = logged(worker, caplog)
        assert "it speaks TLS, and we do not" in line
        assert OPTIONS in line


def test_an_enclave_without_tls_and_a_worker_by_tls(
    identities: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_by(identity(identities, "worker", "enclave"), tmp_path) as worker:
        text = refused(str(worker.address), None, WorkerRefused)
        assert "this worker speaks by TLS" in text
        assert OPTIONS in text
        line = logged(worker, caplog)
        assert "without TLS, and we speak it by TLS" in line
        assert OPTIONS in line


@pytest.mark.parametrize(("ours", "theirs"), [("enclave", "stranger"), ("stranger", "worker")])
def test_another_key_than_the_one_that_is_pinned(
    ours: str, theirs: str, identities: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On either side: both say what is to be compared with what."""
    with serving_by(identity(identities, "worker", "enclave"), tmp_path) as worker:
        text = refused(str(worker.address), identity(identities, ours, theirs), UntrustedPeer)
        assert "--peer must be" in text
        assert "--tls-cert" in text
        line = logged(worker, caplog)
        assert "--peer" in line
        assert "--tls-cert" in line


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("said", "named"),
    [
        (b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n", "it speaks HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "it speaks SSH"),
        (b"hello\n", "it speaks another protocol"),
        (b"\0", "it speaks another protocol"),
    ],
)
def test_a_client_that_speaks_something_else(
    said: bytes, named: str, tls: bool, identities: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says less than a header has, and waits for an answer."""
    with serving_by(identity(identities, "worker", "enclave") if tls else None, tmp_path) as worker:
        with socket.create_connection((worker.address.host, worker.address.port)) as client:
            client.settimeout(HANDSHAKE_SECONDS / 2)
            client.sendall(said)
            until_closed(client)
        line = logged(worker, caplog)
        assert named in line
        assert "the port" in line


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize(
    ("said", "named"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it speaks HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "it speaks SSH"),
        (b"220 mail\r\n", "it speaks another protocol"),
    ],
)
def test_a_server_that_is_no_worker(said: bytes, named: str, tls: bool, identities: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                if tls:
                    client.recv(4096)
                client.sendall(said)
                until_closed(client)

        thread = threading.Thread(target=serve)
        thread.start()
        config = identity(identities, "enclave", "worker") if tls else None
        text = refused(f"tcp:127.0.0.1:{listener.getsockname()[1]}", config, UntrustedPeer if tls else BadMagic)
        thread.join()
    assert named in text
    assert "the port" in text


def test_a_server_that_speaks_tls_and_is_no_worker(identities: Path) -> None:
    """An alert is all that one says which was not spoken to in TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(b"\x15\x03\x01\x00\x02\x02\x46")

        thread = threading.Thread(target=serve)
        thread.start()
        text = refused(f"tcp:127.0.0.1:{listener.getsockname()[1]}", None, BadMagic)
        thread.join()
    assert "it speaks TLS, and we do not" in text
    assert OPTIONS in text


def test_a_handshake_that_comes_between_a_look_and_the_next(
    identities: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL takes the first record, and the next look sees the second one, which begins in another way."""
    peek, looked = TlsTransport._peek, threading.Event()

    def peek_and_be_late(transport: TlsTransport) -> bytes | None:
        if not transport._tls.is_server:
            assert looked.wait(20)  # the client says nothing before
            return peek(transport)
        seen = peek(transport)
        if not looked.is_set():
            looked.set()
            select.select([transport._tls_sock], [], [], 20)
        return seen

    monkeypatch.setattr(TlsTransport, "_peek", peek_and_be_late)
    with (
        serving_by(identity(identities, "worker", "enclave"), tmp_path) as worker,
        RawClient(worker.address, tls=PinnedTls(identity(identities, "enclave", "worker"), server=False)) as client,
    ):
        assert client.hello().type is MessageType.WELCOME


def test_a_server_that_says_nothing_and_leaves(identities: Path) -> None:
    """At once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        with pytest.raises(ConnectionLost):
            connect(
                TcpAddress("127.0.0.1", listener.getsockname()[1]),
                Deadline(HANDSHAKE_SECONDS),
                PinnedTls(identity(identities, "enclave", "worker"), server=False),
            )
        thread.join()


def test_a_client_that_says_nothing_and_leaves(
    identities: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving_by(identity(identities, "worker", "enclave"), tmp_path) as worker:
        socket.create_connection((worker.address.host, worker.address.port)).close()
        while worker.server._open or "closed the connection during" not in caplog.text:
            time.sleep(0.01)
