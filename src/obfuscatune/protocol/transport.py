"""A stream that carries bytes between two processes: unix socket, TCP, or TLS 1.3 over TCP.

Everything above sees only `Transport`; a test puts an adversary there. Each call waits under the deadline of its own
request, one `Deadline` however many system calls it takes, so that one thread may read while another writes.
"""

import errno
import ipaddress
import math
import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from obfuscatune.errors import ConnectionLost
from obfuscatune.protocol.limits import KIB, SLOWEST_BYTES_PER_SECOND
from obfuscatune.protocol.shared_memory import AVAILABLE
from obfuscatune.protocol.sockets import NEVER as NEVER
from obfuscatune.protocol.sockets import Deadline as Deadline
from obfuscatune.protocol.sockets import tune as tune


def transfer_seconds(size: int) -> float:
    """What `size` bytes may take on the slowest link that is still waited for."""
    return size / SLOWEST_BYTES_PER_SECOND


AHEAD_BYTES = 64 * KIB
"""A smaller read takes what has come, up to so much: a header and few rows in one call. A larger one waits for all."""
LOOK_SECONDS = 10.0
"""A read that may take longer looks at its deadline after so long: the system need not be told a time for each."""

_DESCRIPTOR = struct.Struct("@i")
_ONE_DESCRIPTOR = socket.CMSG_SPACE(_DESCRIPTOR.size)
_CREDENTIALS = struct.Struct("@3i")  # struct ucred: process, user, group
_READ_FLAGS = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
Buffer = bytes | bytearray | memoryview
T = TypeVar("T")


class Transport(Protocol):
    """What messages are carried by."""

    @property
    def shares_memory(self) -> bool:
        """Whether a descriptor of shared memory can go along: both ends are on one host, and it has such memory."""

    @property
    def is_local(self) -> bool:
        """Whether the peer is on this host, as far as its address tells: it computes on the same cores."""

    def send(self, buffers: Sequence[Buffer], deadline: Deadline, descriptor: int | None = None) -> None:
        """Send all bytes of all buffers, in order, and a copy of the descriptor.

        Raises ConnectionLost, DeadlineExceeded.
        """

    def send_now(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """Send what goes without waiting; the rest, for `send`. Raises ConnectionLost."""

    def has_news(self, seconds: float = 0.0) -> bool:
        """Wait so long at most; whether `recv_into` would return, or raise, at once. `shutdown` ends the waiting."""

    def take_descriptor(self) -> int | None:
        """The descriptor that came with what was received last, for the caller to close; None where none did."""

    def recv_into(self, view: memoryview, deadline: Deadline) -> int:
        """Wait for a byte or more; how many came, 0 at the end. Raises ConnectionLost, DeadlineExceeded."""

    def stop_sending(self) -> None:
        """Nothing more will be sent: the peer sees the end after what was. Receiving goes on."""

    def shutdown(self) -> None:
        """End the stream both ways: a call that waits in another thread returns or raises. Only `close` frees it."""

    def close(self) -> None:
        """Give the stream up. Twice is once."""


class WouldBlock(Exception):
    """The socket is not ready; `events` is what to poll for."""

    def __init__(self, events: int) -> None:
        super().__init__(events)
        self.events = events


class SocketTransport:
    """A connected stream socket."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.setblocking(True)  # each call says for itself whether it waits
        self.address_id = _address_id(sock)
        """Where the peer connects from: a user of this host, or an address."""
        self._sock = sock
        self.shares_memory = AVAILABLE and sock.family == socket.AF_UNIX
        """See `Transport.shares_memory`."""
        self.is_local = _is_local(sock)
        """See `Transport.is_local`."""
        self._peer = peer
        self._descriptors: list[int] = []
        self._takes_descriptor = self.shares_memory
        """Whether one may still come: a connection has one, whichever side sends it. What comes then is dropped."""
        self._ahead = memoryview(bytearray(AHEAD_BYTES))
        self._taken = self._came = 0
        """Of `_ahead`: what the reader has had, and what there is."""
        self._longest_read = 0.0
        """Seconds, as the system was told."""

    def establish(self, deadline: Deadline) -> None:
        """Whatever is to be done before the first byte of ours: nothing here, the handshake where there is TLS."""

    @property
    def peer_id(self) -> str:
        """Who the peer is, after `establish`: what it cannot choose anew with each connection."""
        return self.address_id

    def send(self, buffers: Sequence[Buffer], deadline: Deadline, descriptor: int | None = None) -> None:
        """See `Transport.send`; header and payload leave in one system call where they fit."""
        if descriptor is not None:
            self._takes_descriptor = False  # a connection shares one memory
            sent = self._wait(lambda first: self._write_with(first, descriptor), buffers[0][:1], deadline)
            buffers = _after(sent, buffers)
        rest = self.send_now(buffers)
        while rest:
            rest = _after(self._wait(self._write, rest, deadline), rest)

    def send_now(self, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
        """See `Transport.send_now`."""
        rest = buffers
        try:
            while rest:
                rest = _after(self._write(rest), rest)
        except WouldBlock:
            return rest
        except OSError as error:
            raise self._lost(error) from error
        return rest

    def recv_into(self, view: memoryview, deadline: Deadline) -> int:
        """See `Transport.recv_into`."""
        if self._taken == self._came:
            if len(view) >= AHEAD_BYTES:
                return self._receive(view, deadline)
            self._taken = self._came = 0
            self._came = self._receive(self._ahead, deadline)
        count = min(len(view), self._came - self._taken)
        view[:count] = self._ahead[self._taken : self._taken + count]
        self._taken += count
        return count

    def has_news(self, seconds: float = 0.0) -> bool:
        """See `Transport.has_news`."""
        if self._taken < self._came:
            return True
        return self._wait_until(select.POLLIN, seconds)

    def take_descriptor(self) -> int | None:
        """See `Transport.take_descriptor`."""
        if not self._descriptors:
            return None
        self._takes_descriptor = False
        return self._descriptors.pop()

    def stop_sending(self) -> None:
        """See `Transport.stop_sending`."""
        self._end(socket.SHUT_WR)

    def shutdown(self) -> None:
        """See `Transport.shutdown`."""
        self._end(socket.SHUT_RDWR)

    def stop_reading(self) -> None:
        """Make a `recv_into` that waits in another thread see the end of the stream; sending goes on."""
        self._end(socket.SHUT_RD)

    def close(self) -> None:
        """See `Transport.close`."""
        self._drop_descriptors()
        self._sock.close()

    def _end(self, how: int) -> None:
        try:
            socket.socket.shutdown(self._sock, how)  # not that of SSLSocket, which would go on in clear text
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.EBADF):  # the peer, or our own other thread, was faster
                raise ConnectionLost(f"{self._peer}: {error.strerror}") from error

    def _wait(self, attempt: Callable[[T], int], argument: T, deadline: Deadline) -> int:
        """`attempt` until it goes through, waiting for the socket in between."""
        while True:
            remaining = deadline.remaining()
            try:
                return attempt(argument)
            except WouldBlock as blocked:
                self._wait_until(blocked.events, remaining)
            except OSError as error:
                raise self._lost(error) from error

    def _wait_until(self, events: int, seconds: float | None) -> bool:
        """Wait until the socket is ready; whether it is. One that is closed is, for to fail."""
        if self._sock.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._sock.fileno(), events)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def _receive(self, view: memoryview, deadline: Deadline) -> int:
        """Wait for bytes; asleep in the call that receives them, which is woken once."""
        while True:
            remaining = deadline.remaining()
            longest = LOOK_SECONDS if remaining is None or remaining > LOOK_SECONDS else remaining
            try:
                if longest != self._longest_read:
                    self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(longest))
                    self._longest_read = longest
                return self._read(view)
            except BlockingIOError:  # time to look at the deadline
                continue
            except OSError as error:
                raise self._lost(error) from error

    def _lost(self, error: OSError) -> ConnectionLost:
        return ConnectionLost(f"lost the connection to {self._peer}: {error.strerror or error}")

    def _write(self, buffers: Sequence[Buffer]) -> int:
        """Send what fits; how much. Raises WouldBlock, OSError."""
        try:
            return self._sock.sendmsg(buffers, [], socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise WouldBlock(select.POLLOUT) from None

    def _read(self, view: memoryview) -> int:
        """Receive: few bytes as they come, many all at once, for to be woken for each part costs more than the copying.

        How many. Raises OSError; BlockingIOError where the time is over that the socket was told.
        """
        if view is not self._ahead:
            return self._sock.recv_into(view, 0, socket.MSG_WAITALL)
        if not self._takes_descriptor:
            return self._sock.recv_into(view)
        came, ancillary, _, _ = self._sock.recvmsg_into([view], _ONE_DESCRIPTOR, _READ_FLAGS)
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._drop_descriptors()  # what nobody took; a peer must not fill our table
                whole = len(data) - len(data) % _DESCRIPTOR.size
                self._descriptors = [number for (number,) in _DESCRIPTOR.iter_unpack(data[:whole])]
        return came

    def _write_with(self, first: Buffer, descriptor: int) -> int:
        """Send a byte with a descriptor. Raises WouldBlock, OSError."""
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(descriptor))
        try:
            return self._sock.sendmsg([first], [rights], socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise WouldBlock(select.POLLOUT) from None

    def _drop_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def _after(sent: int, buffers: Sequence[Buffer]) -> Sequence[Buffer]:
    """What is left to be sent."""
    for index, buffer in enumerate(buffers):
        if sent < len(buffer):
            return [memoryview(buffer)[sent:], *buffers[index + 1 :]]
        sent -= len(buffer)
    return ()


def _timeval(seconds: float) -> bytes:
    """struct timeval, not less than a microsecond."""
    microseconds = math.ceil(seconds * 1_000_000)
    return struct.pack("@ll", *divmod(microseconds, 1_000_000))


def _address_id(sock: socket.socket) -> str:
    """The user at the other end of a unix socket; the address at that of a TCP one (of IPv6 the network's part)."""
    if sock.family == socket.AF_UNIX:
        if not hasattr(socket, "SO_PEERCRED"):
            return "this host"
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return f"user {_CREDENTIALS.unpack(credentials)[1]}"
    host = _host(sock.getpeername())
    if isinstance(host, ipaddress.IPv6Address):
        host = ipaddress.ip_network((host, 64), strict=False).network_address
    return f"address {host}"


def _is_local(sock: socket.socket) -> bool:
    """Whether the other end is a unix socket, the loopback device, or an address of this end's own."""
    if sock.family == socket.AF_UNIX:
        return True
    peer = _host(sock.getpeername())
    return peer.is_loopback or peer == _host(sock.getsockname())


def _host(name: tuple[Any, ...]) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address in a socket's name."""
    host = ipaddress.ip_address(str(name[0]).partition("%")[0])
    return host.ipv4_mapped or host if isinstance(host, ipaddress.IPv6Address) else host
