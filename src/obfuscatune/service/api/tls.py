"""HTTPS with a certificate that exists in this process alone, and clients that are known by key.

A client shows the certificate under whose key an owner released his own. Those certificates are OpenSSL's trust
anchors, added while the server runs: whoever shows none of them fails in the handshake. Anchors cannot be taken away
again, so each request is checked once more by key: `peer_of` reads what `Protocol` put into its scope.

Until its handshake is done a client is a stranger: `Handshakes` bounds how many there are, and how long each may take.

    connection  ->  Gate: TLS handshake  ->  Protocol: HTTP/1.1
"""

import asyncio
import contextlib
import os
import ssl
from typing import Any

from cryptography import x509
from uvicorn.protocols.http.h11_impl import H11Protocol

from obfuscatune.protocol.certificates import fingerprint, key_digest, make_identity

EXTENSION = "obfuscatune.peer"
HANDSHAKE_SECONDS = 10.0


class HttpsIdentity:
    """A fresh key and certificate, and who may connect."""

    def __init__(self) -> None:
        certificate, key = make_identity("obfuscatune")
        self.spki = fingerprint(certificate)
        """SHA-256 of the public key, in hex: the claim `http_key`."""
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        self.context.num_tickets = 0  # no resumption: every connection shows its certificate
        self.context.set_alpn_protocols(["http/1.1"])
        _load(self.context, certificate, key)

    def admit(self, certificate_pem: bytes) -> None:
        """Let a client with this certificate connect from now on.

        Raises:
            ValueError: it is no certificate.
        """
        self.context.load_verify_locations(cadata=certificate_pem.decode("ascii"))


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Python reads certificate and key from files alone: here from one that lies in memory."""
    descriptor = os.memfd_create("https", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, certificate + key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        os.pwrite(descriptor, bytes(len(certificate + key)), 0)
    finally:
        os.close(descriptor)


class Handshakes:
    """Those that are under way. For one more than there may be, the oldest is cut off: it is the likeliest to stall."""

    def __init__(self, context: ssl.SSLContext, most: int, seconds: float = HANDSHAKE_SECONDS) -> None:
        self.context, self.most, self.seconds = context, most, seconds
        self._open: dict[asyncio.Transport, None] = {}

    def begin(self, transport: asyncio.Transport) -> None:
        """Count one."""
        while len(self._open) >= self.most:
            oldest = next(iter(self._open))
            self.end(oldest)
            oldest.abort()
        self._open[transport] = None

    def end(self, transport: asyncio.Transport) -> None:
        """It is over, well or not. Twice is once."""
        self._open.pop(transport, None)

    def close(self) -> None:
        """Cut off all of them."""
        for transport in list(self._open):
            self.end(transport)
            transport.abort()

    def __len__(self) -> int:
        return len(self._open)


class Gate(asyncio.Protocol):
    """A connection until its TLS handshake is done. What a client then sent already is kept for `Protocol`."""

    def __init__(self, handshakes: Handshakes, **http: Any) -> None:
        """`http`: what uvicorn gives a protocol."""
        self._handshakes, self._http = handshakes, http
        self._early = bytearray()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        if isinstance(transport, asyncio.Transport):
            self._handshakes.begin(transport)
            self._task = asyncio.get_running_loop().create_task(self._shake_hands(transport))

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`: what came behind the handshake, in the same turn of the loop."""
        self._early += data

    async def _shake_hands(self, transport: asyncio.Transport) -> None:
        shake, loop = self._handshakes, asyncio.get_running_loop()
        try:
            tls = await loop.start_tls(
                transport, self, shake.context, server_side=True, ssl_handshake_timeout=shake.seconds
            )
        except OSError:  # ssl's errors, and what a connection ends with
            return
        finally:
            shake.end(transport)
        if tls is None or tls.is_closing():  # the client went away
            return
        protocol = Protocol(**self._http)
        tls.set_protocol(protocol)
        protocol.connection_made(tls)
        if self._early:
            protocol.data_received(bytes(self._early))


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1, with the peer's key in the scope of each request."""

    def connection_made(self, transport: Any) -> None:
        """The handshake is done. Who then says nothing is cut off as an idle connection is."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        peer = None
        connection = transport.get_extra_info("ssl_object")
        if connection is not None:
            with contextlib.suppress(ValueError):
                der = connection.getpeercert(binary_form=True)
                peer = None if der is None else key_digest(x509.load_der_x509_certificate(der)).hex()
        self.app_state = {**self.app_state, EXTENSION: peer}
        same = sum(isinstance(it, Protocol) and it.app_state.get(EXTENSION) == peer for it in self.connections)
        if self.limit_concurrency is not None and same > max(1, self.limit_concurrency // 2):
            transport.abort()  # one owner leaves room for others


def peer_of(scope: Any) -> str | None:
    """The key of whoever sent a request; None without TLS."""
    peer = scope.get("state", {}).get(EXTENSION)
    return peer if isinstance(peer, str) else None
