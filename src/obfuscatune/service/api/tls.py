"""HTTPS with a certificate that exists in this process alone, and clients that are known by key.

A client shows the certificate under whose key an owner released his own. Those certificates are OpenSSL's trust
anchors, added while the server runs: whoever shows none of them fails in the handshake. Anchors cannot be taken away
again, so each request is checked once more by key: `peer_of` reads what `Protocol` put into its scope.
"""

import contextlib
import hashlib
import os
import ssl
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from uvicorn.protocols.http.h11_impl import H11Protocol

from obfuscatune.protocol.tls import fingerprint, make_identity

EXTENSION = "obfuscatune.peer"


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


def spki_of(certificate_der: bytes) -> str:
    """SHA-256 of a certificate's public key, in hex."""
    key = x509.load_der_x509_certificate(certificate_der).public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


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
                peer = None if der is None else spki_of(der)
        self.app_state = {**self.app_state, EXTENSION: peer}
        same = sum(isinstance(it, Protocol) and it.app_state.get(EXTENSION) == peer for it in self.connections)
        if self.limit_concurrency is not None and same > max(1, self.limit_concurrency // 2):
            transport.abort()  # one owner leaves room for others


def peer_of(scope: Any) -> str | None:
    """The key of whoever sent a request; None without TLS."""
    peer = scope.get("state", {}).get(EXTENSION)
    return peer if isinstance(peer, str) else None
