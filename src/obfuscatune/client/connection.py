"""A verified service: HTTPS to the one key that its evidence names, as one of the parties.

with connect(TcpAddress("enclave.example", 7700), identity, Policy.from_file(Path("policy.yaml"))) as service:
    service.http.get("/v1/models")
    http = openai.DefaultHttpxClient(verify=service.context)
    openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", http_client=http)
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from obfuscatune.attest.policy import Policy
from obfuscatune.attest.verification import Verified
from obfuscatune.channel.audit_chain import Head
from obfuscatune.channel.client import Attested
from obfuscatune.channel.identity import Identity
from obfuscatune.client.heads import HeadFile
from obfuscatune.errors import ChannelError, ConfigError, ConnectionLost, IntegrityError, TermsError, UntrustedPeer
from obfuscatune.protocol.addresses import TcpAddress, parse_address
from obfuscatune.protocol.certificates import key_digest

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
    context: ssl.SSLContext
    """For another HTTP client: TLS with that key alone, as us."""
    verified: Verified
    """What its evidence says of it, and every check of it."""

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


@dataclass(frozen=True)
class Opened:
    """What an attested session left behind: an API, and until when its verification counts."""

    url: str
    context: ssl.SSLContext
    verified: Verified
    """The checks, the claims, and when it has to be done anew."""
    heads: HeadFile | None = None
    """Where the newest head of its audit log is kept."""
    head: Head | None = None
    """What it told before anything was released."""

    @contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """What sends to that API alone."""
        timeout = httpx.Timeout(_CONNECT_SECONDS, read=_READ_SECONDS, write=60.0)
        with httpx.Client(base_url=self.url, verify=self.context, timeout=timeout, trust_env=False) as http:
            yield http

    def check_log(self) -> None:
        """See that its audit log goes on from the head that is kept, if one is. Raises as `HeadFile.follow`."""
        if self.heads is not None and self.head is not None:
            with self.client() as http:
                self.heads.follow(http, self.verified.claims.signing_key, self.head)


def open_api(
    session: Attested,
    enclave: TcpAddress,
    identity: Identity,
    *,
    api: TcpAddress | None = None,
    heads: HeadFile | None = None,
) -> Opened:
    """Release the owner's key to an enclave, and find its API. Ends the session.

    Args:
        session: With the enclave, which was verified in it.
        enclave: Where that was.
        api: Where its API is, where that is not what the enclave says.
        heads: Where the newest head of its audit log is kept; None does not notice a state that was set back.

    Raises:
        TermsError: the enclave knows no grant that names us.
        IntegrityError: what it keeps of ours is sealed under another key, or its audit log does not go on.
        ConnectionLost, DeadlineExceeded, ChannelError: it cannot be spoken with.
        UntrustedPeer: what listens at the API's address is not it.
        StorageError, ConfigError: the head cannot be kept.
    """
    claims, head = session.verified.claims, None
    with session:
        if heads is not None:
            head = heads.expect(lambda: session.request("status", {}).get("head"), claims.signing_key)
        told = session.release("owner-key", {}, owner_key(identity))
    address = api or _address_of(told, enclave)
    context = pinned_context(address.host, address.port, identity, claims.http_key)
    host = f"[{address.host}]" if ":" in address.host else address.host
    opened = Opened(f"https://{host}:{address.port}", context, session.verified, heads, head)
    opened.check_log()
    return opened


@contextmanager
def connect(
    enclave: TcpAddress,
    identity: Identity,
    policy: Policy,
    *,
    api: TcpAddress | None = None,
    pinned: Collection[str] | None = None,
    heads: HeadFile | None = None,
) -> Iterator[Service]:
    """Verify an enclave, release the owner's key to it, and use its API for as long as the `with` lasts.

    Args:
        enclave: Where its attested channel is.
        policy: What is accepted.
        api: Where its API is, where that is not what the enclave says.
        pinned: Fingerprints of the keys that its channel may have besides; None for any.
        heads: As of `open_api`.

    Raises:
        VerificationFailed, EvidenceError: the policy refuses it, and nothing was released.
        As `open_api`.
    """
    session = Attested.connect(enclave, identity, policy, pinned=pinned)
    with use(session, enclave, identity, api=api, heads=heads) as service:
        yield service


@contextmanager
def use(
    session: Attested,
    enclave: TcpAddress,
    identity: Identity,
    *,
    api: TcpAddress | None = None,
    heads: HeadFile | None = None,
) -> Iterator[Service]:
    """The service of a session that was verified already, which is ended. Arguments and errors: as of `open_api`."""
    opened = open_api(session, enclave, identity, api=api, heads=heads)
    with opened.client() as http:
        yield Service(opened.url, http, opened.context, opened.verified)


def _address_of(status: dict[str, Any], enclave: TcpAddress) -> TcpAddress:
    """Of the API, as the enclave says it. A host that is none (0.0.0.0) is the enclave's own."""
    try:
        address = parse_address(f"tcp:{status['api']}")
    except (KeyError, ConfigError) as error:
        raise ChannelError("the enclave does not say where its API is: name it by --api HOST:PORT") from error
    if not isinstance(address, TcpAddress):
        raise ChannelError("the enclave's API has no address of a network")
    return TcpAddress(enclave.host, address.port) if address.host in ("0.0.0.0", "::") else address  # noqa: S104
