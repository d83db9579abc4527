"""Bytes arrive whole and in order over each transport; deadlines hold for a whole request; ends are noticed."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from obfuscatune.errors import (
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    Truncated,
)
from obfuscatune.protocol.endpoints import UnixAddress, connect, parse_address
from obfuscatune.protocol.framing import recv_header, recv_payload
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.messages import REQUESTS, Header, MessageType
from obfuscatune.protocol.tls import PinnedTls
from obfuscatune.protocol.transport import NEVER, Deadline, SocketTransport
from tests.protocol.peers import TEN_SECONDS, Accepting, echo, identity, make_identities


@pytest.fixture
def pair() -> Iterator[tuple[SocketTransport, SocketTransport]]:
    left, right = socket.socketpair()
    pair = SocketTransport(left, "left"), SocketTransport(right, "right")
    yield pair
    for end in pair:
        end.close()


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_identities(tmp_path_factory.mktemp("identities"))


@pytest.mark.parametrize("kind", ["unix", "tcp", "tls"])
def test_bytes_arrive(kind: str, tmp_path: Path, identities: Path) -> None:
    tls = kind == "tls"
    address = parse_address(f"unix:{tmp_path}/s" if kind == "unix" else "tcp:127.0.0.1:0")
    there = PinnedTls(identity(identities, "worker", "enclave"), server=True) if tls else None
    here = PinnedTls(identity(identities, "enclave", "worker"), server=False) if tls else None
    listener = Listener(address, there)
    accepting = Accepting(listener)
    transport = connect(listener.address, Deadline(TEN_SECONDS), here)
    try:
        assert transport.is_local  # a worker behind it computes on the same cores
        echo(transport)
    finally:
        transport.close()
        error = accepting.finish()
    assert error is None


def test_a_deadline_is_for_the_whole_request(pair: tuple[SocketTransport, SocketTransport]) -> None:
    """A peer that sends a byte now and then does not start the clock anew."""
    ours, theirs = pair
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(0.02):
            theirs.send([b"x"], NEVER)

    thread = threading.Thread(target=trickle)
    thread.start()
    started = time.monotonic()
    try:
        with pytest.raises(DeadlineExceeded):
            recv_payload(ours, memoryview(bytearray(10**6)), Deadline(0.2))
    finally:
        over.set()
        thread.join()
    assert time.monotonic() - started < 2  # ten times the deadline: this machine may be busy


def test_sending_has_a_deadline_too(pair: tuple[SocketTransport, SocketTransport]) -> None:
    with pytest.raises(DeadlineExceeded):
        pair[0].send([bytes(64 * 2**20)], Deadline(0.1))


def test_the_end_between_messages_and_inside_one(pair: tuple[SocketTransport, SocketTransport]) -> None:
    ours, theirs = pair
    theirs.send([Header(MessageType.HELLO, payload_bytes=36).pack()[:20]], NEVER)
    theirs.close()
    with pytest.raises(Truncated):
        recv_header(ours, REQUESTS)
    with pytest.raises(ConnectionLost):
        recv_header(ours, REQUESTS)


def test_stop_reading_wakes_the_reader_and_lets_the_rest_out(pair: tuple[SocketTransport, SocketTransport]) -> None:
    ours, theirs = pair
    came: list[int] = []
    reader = threading.Thread(target=lambda: came.append(ours.recv_into(memoryview(bytearray(1)), NEVER)))
    reader.start()
    ours.stop_reading()
    reader.join(TEN_SECONDS)
    assert came == [0]
    ours.send([b"last words"], Deadline(TEN_SECONDS))
    data = bytearray(10)
    recv_payload(theirs, memoryview(data), Deadline(TEN_SECONDS))
    assert data == b"last words"


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLost, match="no worker answers"):
        connect(UnixAddress(tmp_path / "absent"), Deadline(TEN_SECONDS))


def test_a_socket_file_is_ours_alone_and_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener(UnixAddress(path))
    assert path.stat().st_mode & 0o777 == 0o600
    listener.close()
    assert not path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="where a socket's own mode is not that of its file")
def test_a_socket_file_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made closed, not closed after it was made: in a folder that others see, they might be faster."""
    modes: list[int] = []

    class Watched(socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)
            modes.append((tmp_path / "s").stat().st_mode & 0o777)

    monkeypatch.setattr(socket, "socket", Watched)
    before = os.umask(0)
    try:
        Listener(UnixAddress(tmp_path / "s")).close()
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_a_stale_socket_file_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    address = UnixAddress(tmp_path / "s")
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(address.path))
    left_behind.close()
    listener = Listener(address)
    with pytest.raises(ConfigError, match="another worker"):
        Listener(address)
    listener.close()
    address.path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        Listener(address)
    assert address.path.read_text() == "precious"
