"""A verified service: HTTPS to the one key that its evidence names, as one of the parties.

with connect("enclave.example:7700", Policy.from_file(Path("policy.yaml")), identity) as service:
    service.http.get("/v1/models")
    openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", http_client=service.http)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.channel.identity import key_digest
from obfuscatune.errors import ConnectionLost, IntegrityError, TermsError, UntrustedPeer

if TYPE_CHECKING:
    from obfuscatune.channel.identity import Identity

_CONNECT_SECONDS = 10.0
_READ_SECONDS = 600.0
_OWNER_KEY = b"obfuscatune/owner-key/v1"
_MOST_ERROR_CHARACTERS = 400


def pinned_context(host: str, port: int, identity: Identity, spki_sha256: str) -> ssl.SSLContext:
    """TLS 1.3 with the server that holds one key, and with our certificate.

    The server's certificate is asked for once and held against the key. It is then the only trust anchor: OpenSSL
    refuses every other, and a handshake proves the private key each time.

    Args:
        spki_sha256: Of the server's public key, in hex, as its verified claims name it.

    Raises:
        ConnectionLost: nobody answers there.
        UntrustedPeer: who answers has another key, or speaks no TLS 1.3.
    """
    look = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    look.minimum_version = ssl.TLSVersion.TLSv1_3
    look.check_hostname = False
    look.verify_mode = ssl.CERT_NONE  # nothing is sent by this one
    _show(identity, look)
    try:
        with socket.create_connection((host, port), _CONNECT_SECONDS) as plain, look.wrap_socket(plain) as wrapped:
            der = wrapped.getpeercert(binary_form=True) or b""
    except ssl.SSLError as error:
        raise UntrustedPeer(f"no TLS 1.3 with {host}:{port}: {error.reason}") from error
    except OSError as error:
        raise ConnectionLost(f"cannot reach the API at {host}:{port}: {error}") from error
    if key_digest(x509.load_der_x509_certificate(der)).hex() != spki_sha256:
        raise UntrustedPeer(f"the API at {host}:{port} has another key than the enclave's evidence names")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the key is pinned; where it listens may change
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=der)
    _show(identity, context)
    return context


def _show(identity: Identity, context: ssl.SSLContext) -> None:
    """Have `context` show our certificate. OpenSSL reads keys from files alone: this one exists in memory."""
    key = identity.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.memfd_create("identity", os.MFD_CLOEXEC), "wb") as file:
        file.write(identity.certificate_pem + key)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")


def owner_key(identity: Identity) -> bytes:
    """The key K_o under which a service keeps what is this owner's, 32 bytes: HKDF-SHA256 of the private key.

    Whoever has the identity has it; whoever loses the identity loses what lies under it.
    """
    return HKDF(hashes.SHA256(), 32, salt=None, info=_OWNER_KEY).derive(identity.key.private_bytes_raw())


@dataclass(frozen=True)
class Service:
    """A service that was verified. `http` sends to it alone; what the service refuses is a typed error of `request`."""

    url: str
    http: httpx.Client
    claims: Any
    """What its evidence says of it (`obfuscatune.attest.claims.Claims`)."""

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request. `options`: as of `httpx.Client.request`.

        Raises:
            ConnectionLost: the service went away.
            TermsError: it refuses; its reason is in the message.
        """
        try:
            reply = self.http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ConnectionLost(f"the service went away: {type(error).__name__}") from error
        if reply.is_error:
            raise TermsError(f"the service refuses: {_reason(reply)}")
        return reply

    def document(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """`request`, and the JSON object that it answers with.

        Raises:
            IntegrityError: it answers with something else.
        """
        reply = self.request(method, path, **options)
        try:
            found = reply.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise IntegrityError(f"{path}: expected a JSON object in the service's answer")
        return found


def _reason(reply: httpx.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(reply.text)["error"]["message"])[:_MOST_ERROR_CHARACTERS]
    return f"HTTP status {reply.status_code}"
