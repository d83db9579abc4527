"""The worker's end: a socket that waits for enclaves."""

import contextlib
import errno
import os
import select
import socket
import stat
import sys
import time
from pathlib import Path

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.endpoints import Address, TcpAddress, UnixAddress
from obfuscatune.protocol.limits import STALL_SECONDS
from obfuscatune.protocol.tls import PinnedTls, TlsTransport
from obfuscatune.protocol.transport import SocketTransport, tune

BACKLOG = 64
RESOURCES_SECONDS = 0.1
"""Before another connection is accepted where the system has no descriptor or memory for it."""
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """Accepts connections until `stop`, which any thread (or a signal handler) may call."""

    def __init__(self, address: Address, tls: PinnedTls | None = None) -> None:
        """Bind and listen; by TLS where `tls` says with whom.

        Raises:
            ConfigError: the address is taken, or cannot be bound.
        """
        self._tls = tls
        self._sock = _bind(address)
        self._wake, self._waker = socket.socketpair()
        self.address = _bound(address, self._sock)

    def accept(self) -> SocketTransport | None:
        """The next connection, None after `stop`. It is for the caller to `establish` it, in a thread of its own."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake.fileno() in ready:
                return None
            try:
                sock, peer = self._sock.accept()
            except OSError as error:  # mostly, the peer went away between poll and accept: wait for the next
                if error.errno in _OUT_OF_RESOURCES:
                    time.sleep(RESOURCES_SECONDS)  # it would be ready again at once
                continue
            name = f"tcp:{peer[0]}:{peer[1]}" if peer else str(self.address)
            try:
                tune(sock, STALL_SECONDS)
                return SocketTransport(sock, name) if self._tls is None else TlsTransport(sock, name, self._tls)
            except OSError:  # the same, a moment later
                sock.close()

    def stop(self) -> None:
        """Make `accept` return None. From any thread or signal handler, also when all is over."""
        with contextlib.suppress(OSError):  # closed, on either side
            self._waker.send(b"x")

    def close(self) -> None:
        """Close, and remove the socket file."""
        self._sock.close()
        self._wake.close()
        self._waker.close()
        if isinstance(self.address, UnixAddress):
            self.address.path.unlink(missing_ok=True)


def _bind(address: Address) -> socket.socket:
    sock = socket.socket(_family(address), socket.SOCK_STREAM)
    try:
        if isinstance(address, UnixAddress):
            _clear_stale(address)
            _bind_for_us_alone(sock, address.path)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address.host, address.port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except ConfigError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen at {address}: {error.strerror or error}") from error
    return sock


def _bind_for_us_alone(sock: socket.socket, path: Path) -> None:
    if sys.platform == "linux":
        os.fchmod(sock.fileno(), 0o600)  # which the file is made with: at no moment can others connect
        sock.bind(str(path))
    else:
        sock.bind(str(path))
        path.chmod(0o600)


def _family(address: Address) -> socket.AddressFamily:
    if isinstance(address, UnixAddress):
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def _bound(address: Address, sock: socket.socket) -> Address:
    if isinstance(address, TcpAddress) and address.port == 0:
        return TcpAddress(address.host, int(sock.getsockname()[1]))
    return address


def _clear_stale(address: UnixAddress) -> None:
    """Remove the socket file of a worker that died. One that answers, or anything but a socket, stays.

    Raises:
        ConfigError: it stays.
    """
    path = address.path
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{path} exists and is no socket: remove it, or listen elsewhere")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(str(path))
    except ConnectionRefusedError:
        path.unlink()
        return
    finally:
        probe.close()
    raise ConfigError(f"another worker answers at {address}: stop it, or listen elsewhere")
