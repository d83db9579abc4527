"""The other end of a bare ping-pong: takes so many bytes and answers so many, with Python's sockets and nothing else.

run as:  python -m obfuscatune.bench.pong unix:/path | tcp:host:port [CERTIFICATE KEY]

Each connection says first how many bytes go there and back (two u64), then plays until it is closed.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import sys

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


if __name__ == "__main__":
    main(*sys.argv[1:])
