"""How long to wait, and how a connected socket is set up."""

import socket
import time

from obfuscatune.errors import DeadlineExceeded
from obfuscatune.protocol.limits import (
    KEEPALIVE_INTERVAL_SECONDS,
    KEEPALIVE_PROBES,
    KEEPALIVE_SECONDS,
    SOCKET_BUFFER_BYTES,
)


class Deadline:
    """A moment on the monotonic clock, handed down through every call that may wait."""

    __slots__ = ("_at", "_seconds")

    def __init__(self, seconds: float | None) -> None:
        """`seconds` from now; None never passes."""
        self._seconds = seconds
        self._at = None if seconds is None else time.monotonic() + seconds

    def remaining(self) -> float | None:
        """Seconds left, None for ever.

        Raises:
            DeadlineExceeded: none are left.
        """
        if self._at is None:
            return None
        left = self._at - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"expected an answer within {self._seconds:g} s, none came")
        return left


NEVER = Deadline(None)


def tune(sock: socket.socket, unreachable_s: float) -> None:
    """Buffers that hold a matrix, no waiting for more bytes, and notice of a peer that vanished.

    Args:
        sock: a stream socket.
        unreachable_s: how long the peer's system may leave what was sent over TCP unacknowledged.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {
        "TCP_KEEPIDLE": KEEPALIVE_SECONDS,
        "TCP_KEEPINTVL": KEEPALIVE_INTERVAL_SECONDS,
        "TCP_KEEPCNT": KEEPALIVE_PROBES,
        "TCP_USER_TIMEOUT": unreachable_s * 1000,  # the one in milliseconds (tcp(7))
    }
    for name, value in wanted.items():
        option = getattr(socket, name, None)
        if option is not None:  # not every system has each of them
            sock.setsockopt(socket.IPPROTO_TCP, option, int(value))
