"""The enclave's end: from an address to a connected transport."""

import socket

from obfuscatune.wire.address import Address, TcpAddress, UnixAddress
from obfuscatune.wire.deadline import Deadline
from obfuscatune.wire.errors import ConfigError, ConnectionLost
from obfuscatune.wire.transport import SocketTransport, Transport, tune


def check_plain_tcp(address: Address, *, allowed: bool) -> None:
    """Plain TCP stays on this machine unless asked for by name: anyone on the way could read and change what passes.

    Raises:
        ConfigError: it would leave the machine.
    """
    if isinstance(address, TcpAddress) and not address.is_loopback and not allowed:
        raise ConfigError(
            f"{address} leaves this machine without TLS: pin certificates on both sides, or accept the risk by "
            "--unsafe-plain-tcp (allow_plain_tcp=True)"
        )


def connect(address: Address, deadline: Deadline) -> Transport:
    """A plain connection to `address`.

    Raises:
        ConnectionLost: nobody listens there.
        DeadlineExceeded: nobody answered in time.
    """
    family = socket.AF_UNIX if isinstance(address, UnixAddress) else socket.AF_INET
    target: str | tuple[str, int]
    if isinstance(address, UnixAddress):
        target = str(address.path)
    else:
        target = (address.host, address.port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        tune(sock)
        sock.settimeout(deadline.remaining())
        sock.connect(target)
    except OSError as error:
        sock.close()
        raise ConnectionLost(f"no worker answers at {address}: {error.strerror or error}") from error
    return SocketTransport(sock, str(address))
