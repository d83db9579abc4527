"""From an address to a link: each kind of address has its own."""

from obfuscatune.enclave.client.client import WorkerClient
from obfuscatune.enclave.client.interface import WorkerLink
from obfuscatune.enclave.client.retry import RetryPolicy
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
        address: unix:/path or tcp:host:port.
        tls, deadline_s, retry: as in `WorkerClient.open`.

    Raises:
        ConfigError: the address cannot be used, or leaves this machine without TLS.
        WireError: nobody answers there, or not as a worker.
    """
    return WorkerClient.open(address, tls=tls, deadline_s=deadline_s, retry=retry)
