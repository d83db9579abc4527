"""A bare ping-pong of two Python processes: what a request of as many bytes takes at the least.

run as:  python -m obfuscatune.bench.ping_pong unix:/path | tcp:host:port [CERTIFICATE KEY]    the other end

Each connection says first how many bytes go there and back (two u64), then plays until it is closed: with Python's
sockets and nothing else.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from obfuscatune.errors import ConnectionLost

SIZES = struct.Struct("<QQ")


def receive(sock: socket.socket, view: memoryview) -> bool:
    """Fill the view; whether the peer sent so much."""
    done = 0
    while done < len(view):
        came = sock.recv_into(view[done:])
        if not came:
            return False
        done += came
    return True


def play(sock: socket.socket) -> None:
    """Answer until the peer closes."""
    sizes = bytearray(SIZES.size)
    if not receive(sock, memoryview(sizes)):
        return
    there, back = SIZES.unpack(sizes)
    view, answer = memoryview(bytearray(there)), bytes(back)
    while receive(sock, view):
        sock.sendall(answer)


def listen(address: str) -> socket.socket:
    """A socket that listens at unix:/path or tcp:host:port."""
    kind, _, place = address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(place)
    else:
        host, _, port = place.rpartition(":")
        sock = socket.create_server((host, int(port)))
    sock.listen()
    return sock


def main(address: str, *identity: str) -> None:
    """Play with one after another, for ever."""
    tls = None
    if identity:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*identity)
    with listen(address) as listener:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            accepted, peer = listener.accept()
            if peer:
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError), accepted if tls is None else tls.wrap_socket(accepted, True) as sock:
                play(sock)


class PingPong:
    """Plays with a process that does nothing else."""

    def __init__(self, connect: Callable[[], socket.socket]) -> None:
        self._connect = connect

    @contextmanager
    def of(self, there: int, back: int) -> Iterator[Callable[[], float]]:
        """Rounds of so many bytes: each call plays one and returns its seconds."""
        ball, view = bytes(there), memoryview(bytearray(back))
        with self._connect() as sock:
            sock.sendall(SIZES.pack(there, back))

            def play() -> float:
                started = time.perf_counter()
                sock.sendall(ball)
                if not receive(sock, view):
                    raise ConnectionLost("the other end of the ping-pong ended")
                return time.perf_counter() - started

            yield play


@contextmanager
def ping_pong(address: str, identity: tuple[Path, Path] | None = None) -> Iterator[PingPong]:
    """A process to play with, at unix:/path or tcp:host:port; by TLS where it has a certificate and a key.

    Raises:
        ConnectionLost: it did not start.
    """
    program = [sys.executable, "-m", __name__, address, *map(str, identity or ())]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise ConnectionLost("the other end of the ping-pong did not start")
            yield PingPong(lambda: _connected(address, identity))
        finally:
            process.terminate()


def _connected(address: str, identity: tuple[Path, Path] | None) -> socket.socket:
    kind, _, place = address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(place)
        return sock
    host, _, port = place.rpartition(":")
    sock = socket.create_connection((host, int(port)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if identity is None:
        return sock
    tls = ssl.create_default_context(cafile=str(identity[0]))
    tls.check_hostname = False
    tls.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return tls.wrap_socket(sock)


if __name__ == "__main__":
    main(*sys.argv[1:])
