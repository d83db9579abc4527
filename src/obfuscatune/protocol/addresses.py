"""An address, as one writes it on a command line."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.errors import ConfigError
from obfuscatune.protocol.files import MAX_UNIX_PATH_BYTES

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
