"""The enclave's end of a connection to an address."""

import socket

from obfuscatune.errors import ConfigError, ConnectionLost
from obfuscatune.protocol.addresses import Address as Address
from obfuscatune.protocol.addresses import TcpAddress as TcpAddress
from obfuscatune.protocol.addresses import UnixAddress as UnixAddress
from obfuscatune.protocol.addresses import parse_address as parse_address
from obfuscatune.protocol.limits import UNREACHABLE_SECONDS
from obfuscatune.protocol.tls import PinnedTls, TlsTransport
from obfuscatune.protocol.transport import Deadline, SocketTransport, Transport, tune


def check_tls(address: Address, *, tls: bool, plain_tcp: bool) -> None:
    """Plain TCP stays on this machine unless asked for by name: anyone on the way could read and change what passes.

    Raises:
        ConfigError: it would leave the machine; or TLS was asked for on a unix socket.
    """
    if tls and not isinstance(address, TcpAddress):
        raise ConfigError(
            f"{address} does not leave this machine and takes no TLS: leave the certificates out, or use tcp:"
        )
    if isinstance(address, TcpAddress) and not (address.is_loopback or tls or plain_tcp):
        raise ConfigError(
            f"{address} leaves this machine without TLS: give both sides --tls-cert, --tls-key and --peer "
            "(obfuscatune keygen), or accept the risk (worker: --unsafe-plain-tcp; Python: allow_plain_tcp=True)"
        )


def connect(address: Address, deadline: Deadline, tls: PinnedTls | None = None) -> Transport:
    """A connection to `address`, by TLS where `tls` says with whom.

    Raises:
        ConnectionLost: nobody listens there.
        UntrustedPeer: somebody else listens there than the one pinned.
        DeadlineExceeded: nobody answered in time.
    """
    try:
        sock = _connected(address, deadline)
    except OSError as error:
        raise ConnectionLost(f"no worker answers at {address}: {error.strerror or error}") from error
    transport: SocketTransport
    try:
        transport = SocketTransport(sock, str(address)) if tls is None else TlsTransport(sock, str(address), tls)
    except OSError as error:
        sock.close()
        raise ConnectionLost(f"lost the connection to {address}: {error}") from error
    try:
        transport.establish(deadline)
    except BaseException:
        transport.close()
        raise
    return transport


def _connected(address: Address, deadline: Deadline) -> socket.socket:
    if isinstance(address, TcpAddress):
        sock = socket.create_connection((address.host, address.port), timeout=deadline.remaining())
        tune(sock, UNREACHABLE_SECONDS)
        return sock
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        tune(sock, UNREACHABLE_SECONDS)
        sock.settimeout(deadline.remaining())
        sock.connect(str(address.path))
    except BaseException:
        sock.close()
        raise
    return sock
