"""An address, as one writes it on a command line, and the enclave's end of a connection to it."""

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import ConfigError, ConnectionLost
from obfuscatune.protocol.files import MAX_UNIX_PATH_BYTES
from obfuscatune.protocol.limits import UNREACHABLE_SECONDS
from obfuscatune.protocol.tls import PinnedTls, TlsTransport
from obfuscatune.protocol.transport import Deadline, SocketTransport, Transport, tune

_HINT = "write unix:/path/to/worker.sock or tcp:host:port"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file on this host."""

    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host (name, IPv4 or IPv6) and a port; port 0 lets the system choose when listening."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether nothing leaves this machine. No name but localhost is taken for that."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


Address = UnixAddress | TcpAddress


def parse_address(text: str) -> Address:
    """Read unix:/path or tcp:host:port (IPv6 in brackets).

    Raises:
        ConfigError: anything else.
    """
    scheme, _, rest = text.partition(":")
    if scheme == "unix" and rest:
        if len(os.fsencode(rest)) > MAX_UNIX_PATH_BYTES:
            raise ConfigError(
                f"a unix socket path has at most {MAX_UNIX_PATH_BYTES} bytes, {rest!r} has more: shorten it"
            )
        return UnixAddress(Path(rest))
    if scheme == "tcp":
        host, separator, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if host and separator and port.isascii() and port.isdigit() and int(port) <= 65535:
            return TcpAddress(host, int(port))
    raise ConfigError(f"the address {text!r} cannot be used: {_HINT}")


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
