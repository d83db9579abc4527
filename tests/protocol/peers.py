"""A peer that accepts one connection and echoes, and the certificates for it."""

import threading
from pathlib import Path

from obfuscatune.errors import ObfuscaTuneError
from obfuscatune.protocol.files import write_new
from obfuscatune.protocol.framing import recv_payload
from obfuscatune.protocol.listen import Listener
from obfuscatune.protocol.tls import TlsConfig, make_identity
from obfuscatune.protocol.transport import Deadline, Transport

TEN_SECONDS = 10.0
BIG = 9 * 2**20 + 13
"""More than any socket buffer, and no multiple of anything."""


def identity(folder: Path, name: str, peer: str) -> TlsConfig:
    return TlsConfig(folder / f"{name}.cert", folder / f"{name}.key", folder / f"{peer}.cert")


def make_identities(folder: Path) -> Path:
    """Certificates and keys of a worker, an enclave and a stranger."""
    for name in ("worker", "enclave", "stranger"):
        certificate, key = make_identity(name)
        (folder / f"{name}.cert").write_bytes(certificate)
        write_new(folder / f"{name}.key", key)
    return folder


class Accepting:
    """Accepts one connection in a thread, establishes it, and echoes `BIG` bytes back."""

    def __init__(self, listener: Listener) -> None:
        self.error: ObfuscaTuneError | None = None
        self._listener = listener
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        transport = self._listener.accept()
        assert transport is not None
        try:
            deadline = Deadline(TEN_SECONDS)
            transport.establish(deadline)
            data = bytearray(BIG)
            recv_payload(transport, memoryview(data), deadline)
            transport.send([data[:56], data[56:]], deadline)
        except ObfuscaTuneError as error:
            self.error = error
        finally:
            transport.close()

    def finish(self) -> ObfuscaTuneError | None:
        self._thread.join(TEN_SECONDS)
        self._listener.close()
        return self.error


def echo(transport: Transport) -> None:
    """Send `BIG` bytes from one thread while another already reads them back."""
    sent = bytes(range(256)) * (BIG // 256) + bytes(BIG % 256)
    sender = threading.Thread(target=transport.send, args=([sent[:5], sent[5:]], Deadline(TEN_SECONDS)))
    sender.start()
    came = bytearray(BIG)
    try:
        recv_payload(transport, memoryview(came), Deadline(TEN_SECONDS))
    finally:
        sender.join()
    assert came == sent
