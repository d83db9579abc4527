"""From an address to a link: each kind of address has its own."""

from obfuscatune.enclave.client.client import WorkerClient
from obfuscatune.enclave.client.device import DeviceClient
from obfuscatune.enclave.client.interface import WorkerLink
from obfuscatune.enclave.client.retry import RetryPolicy
from obfuscatune.errors import ConfigError
from obfuscatune.protocol.addresses import DeviceAddress
from obfuscatune.protocol.tls import TlsConfig


def open_link(
    address: str,
    *,
    tls: TlsConfig | None = None,
    deadline_s: float = 120.0,
    retry: RetryPolicy | None = None,
) -> WorkerLink:
    """A link to the worker at an address, connected.

    Args:
        address: unix:/path, tcp:host:port, or device:cuda:N.
        tls, deadline_s, retry: as in `WorkerClient.open`.

    Raises:
        ConfigError: the address cannot be used, leaves this machine without TLS, or is no device of this machine.
        WireError: nobody answers there, or not as a worker.
    """
    if address.startswith(DeviceAddress.PREFIX):
        if tls is not None:
            raise ConfigError(f"{address} is a device of this machine and takes no TLS: leave the certificates out")
        return DeviceClient.open(address, deadline_s=deadline_s)
    return WorkerClient.open(address, tls=tls, deadline_s=deadline_s, retry=retry)
