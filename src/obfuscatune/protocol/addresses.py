"""An address, as one writes it on a command line."""

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

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


@dataclass(frozen=True, slots=True)
class DeviceAddress:
    """A device of the enclave's own machine, which nothing listens at; `cpu` may be named several times, by number."""

    kind: str
    """cpu or cuda."""
    index: int = 0

    PREFIX: ClassVar[str] = "device:"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read device:cuda:N, device:cuda or device:cpu.

        Raises:
            ConfigError: anything else.
        """
        found = re.fullmatch(r"device:(cpu|cuda)(?::([0-9]{1,3}))?", text)
        if found is None:
            raise ConfigError(f"the address {text!r} cannot be used: write device:cuda:N, or device:cpu for tests")
        return cls(found[1], int(found[2] or 0))

    @property
    def device(self) -> str:
        """As torch calls it."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    def __str__(self) -> str:
        return f"{self.PREFIX}{self.kind}:{self.index}"


Address = UnixAddress | TcpAddress


def parse_worker_address(text: str) -> Address | DeviceAddress:
    """As `parse_address`; or device:cuda:N.

    Raises:
        ConfigError: anything else.
    """
    return DeviceAddress.parse(text) if text.startswith(DeviceAddress.PREFIX) else parse_address(text)


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
