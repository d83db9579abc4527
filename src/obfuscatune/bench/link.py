"""The worker of a benchmark, and the link that it is reached by.

unix    a unix socket, and shared memory for rows and products
tcp     without TLS, over the loopback device or an emulated network
tls     the same with TLS 1.3, between throwaway certificates
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from obfuscatune.bench.clocked import ClockPage, clocked_worker
from obfuscatune.bench.network import WORKER_HOST, Network, emulated_network
from obfuscatune.bench.processes import scratch_folder
from obfuscatune.enclave.client import WorkerClient
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import ConfigError
from obfuscatune.protocol.files import write_new
from obfuscatune.protocol.tls import TlsConfig, make_identity

UNIX, TCP, TLS = KINDS = ("unix", "tcp", "tls")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class LinkSettings:
    """What `bench step`, `forward` and `decode` are told of the link."""

    kind: str = UNIX
    """One of `KINDS`."""
    delay_ms: float | None = None
    """Added to each round trip."""
    gbit: float | None = None
    """10⁹ bits a second, each way."""

    def check(self) -> None:
        """Raises ConfigError: there is no such link."""
        if self.kind not in KINDS:
            raise ConfigError(f"--link {self.kind!r} is none of {', '.join(KINDS)}")
        if self.kind == UNIX and self.is_emulated:
            raise ConfigError("--delay-ms and --gbit are of a network: take --link tcp or tls")
        if not 0 <= (self.delay_ms or 0) < math.inf or not 0 < (self.gbit or 1) < math.inf or self.gbit == 0:
            raise ConfigError("--delay-ms is at least 0, and --gbit more")

    @property
    def is_emulated(self) -> bool:
        """Whether it is a network of its own, and not this machine's."""
        return self.delay_ms is not None or self.gbit is not None

    def network(self) -> AbstractContextManager[Network | None]:
        """The emulated network; None within it where there is none.

        Raises:
            ConfigError: this user or system cannot make one.
        """
        return emulated_network(self.delay_ms or 0.0, self.gbit) if self.is_emulated else nullcontext()

    def __str__(self) -> str:
        delay = [] if self.delay_ms is None else [f"{self.delay_ms:g} ms"]
        return ", ".join([self.kind, *delay, *([] if self.gbit is None else [f"{self.gbit:g} Gbit/s"])])


@contextmanager
def linked_worker(
    kind: str, threads: int, namespace: str | None = None
) -> Iterator[tuple[WorkerClient, LocalWorker, ClockPage]]:
    """A connected client, its worker, and the clock on that; all end with the `with`.

    Args:
        kind: one of `KINDS`.
        threads: that the worker computes with.
        namespace: in which the worker runs; None for this process's own.

    Raises:
        WireError: it did not start, or cannot be reached.
    """
    with scratch_folder() as folder:
        listen: str | None = None
        extra: tuple[str, ...] = ()
        tls: TlsConfig | None = None
        if kind != UNIX:
            host = LOOPBACK if namespace is None else WORKER_HOST
            listen = f"tcp:{host}:{free_port()}"
            extra = () if namespace is None else ("--unsafe-plain-tcp",)
        if kind == TLS:
            tls, theirs = identities(Path(folder))
            extra = ("--tls-cert", str(theirs.certificate), "--tls-key", str(theirs.private_key))
            extra += ("--peer", str(theirs.peers))
        with (
            clocked_worker(threads, listen, extra, namespace) as (worker, clock),
            WorkerClient.open(worker.address, tls=tls, allow_plain_tcp=namespace is not None) as client,
        ):
            yield client, worker, clock


def identities(folder: Path) -> tuple[TlsConfig, TlsConfig]:
    """The enclave's and the worker's, each with the other's certificate; the files are written to `folder`."""
    for side in ("enclave", "worker"):
        certificate, key = make_identity(side)
        (folder / f"{side}.pem").write_bytes(certificate)
        write_new(folder / f"{side}.key", key)
    pem = {side: folder / f"{side}.pem" for side in ("enclave", "worker")}
    return (
        TlsConfig(pem["enclave"], folder / "enclave.key", pem["worker"]),
        TlsConfig(pem["worker"], folder / "worker.key", pem["enclave"]),
    )


def free_port() -> int:
    """A TCP port of this host that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        return int(sock.getsockname()[1])
