"""An enclave with simulated evidence, a handler that keeps what came, and adversaries that really relay."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from OpenSSL import SSL

from obfuscatune.attest.claims import Claims, Software
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import Policy
from obfuscatune.attest.simulated import Simulated
from obfuscatune.channel.grants import Consent, Grant, Revocation, Terms
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.messages import HEADER_BYTES, MessageType, pack
from obfuscatune.channel.server import ChannelServer, ServerLimits
from obfuscatune.channel.session import Session, tls_context
from obfuscatune.errors import ObfuscaTuneError
from obfuscatune.protocol.addresses import TcpAddress
from obfuscatune.protocol.sockets import Deadline

DIGEST = "ab" * 32
KEY = bytes(range(32))
SOON = 5.0
HERE = TcpAddress("127.0.0.1", 0)
UNTIL = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
NOW = datetime.datetime(2027, 1, 1, tzinfo=datetime.UTC)


class Kept:
    """A handler that keeps what came."""

    def __init__(self) -> None:
        self.came: list[tuple[Any, ...]] = []
        self.raises: Exception | None = None

    def _keep(self, *what: Any) -> dict[str, Any]:
        if self.raises is not None:
            raise self.raises
        self.came.append(what)
        return {"count": len(self.came)}

    def granted(self, peer: str, grant: Grant, key: bytes) -> dict[str, Any]:
        return self._keep("grant", peer, grant, key)

    def owner_key(self, peer: str, certificate: bytes, key: bytes) -> dict[str, Any]:
        return self._keep("owner-key", peer, certificate, key)

    def revoke(self, peer: str, revocation: Revocation) -> dict[str, Any]:
        return self._keep("revoke", peer, revocation)

    def consent(self, peer: str, consent: Consent) -> dict[str, Any]:
        return self._keep("consent", peer, consent)

    def status(self, peer: str) -> dict[str, Any]:
        return self._keep("status", peer)


class Enclave:
    """All that an enclave has, and the policy that accepts it."""

    def __init__(self, **claims: Any) -> None:
        self.identity = Identity.generate("enclave")
        self.hpke_key = X25519PrivateKey.generate()
        self.platform_key = Ed25519PrivateKey.generate()
        self.platform = Simulated(self.platform_key)
        self.handler = Kept()
        fields: dict[str, Any] = {
            "software": Software("obfuscatune", "0", DIGEST),
            "configuration": DIGEST,
            "http_key": DIGEST,
            "hpke_key": self.hpke_key.public_key().public_bytes_raw().hex(),
            "signing_key": DIGEST,
            "boot": DIGEST,
        }
        self.claims = Claims(**{**fields, **claims})

    def policy(self, *, freshness_seconds: int = 600, **claims: Any) -> Policy:
        return Policy.from_document(
            {
                "version": 1,
                "require": [["simulated"]],
                "allow_simulated": True,
                "simulated": {"keys": [self.platform_key.public_key().public_bytes_raw().hex()]},
                "claims": {"configuration": [DIGEST], **claims},
                "freshness_seconds": freshness_seconds,
            }
        )

    def server(self, limits: ServerLimits | None = None) -> ChannelServer:
        parts = self.identity, self.claims, self.platform, self.handler, self.hpke_key
        return ChannelServer(HERE, *parts, limits or ServerLimits(step_s=SOON, idle_s=SOON))


def terms(*owners: str, **changed: Any) -> Terms:
    fields: dict[str, Any] = {"uses": ("inference", "fine-tuning"), "export": "never", "until": UNTIL, "tokens": 1000}
    return Terms(owners or (DIGEST,), **{**fields, **changed})


def grant(
    sequence: int = 1, model: str = "llama", manifest: str = DIGEST, owners: tuple[str, ...] = (), **changed: Any
) -> Grant:
    return Grant(model, manifest, "s3://bucket/bundle", terms(*owners, **changed), sequence)


def open_session(address: TcpAddress, identity: Identity, context: SSL.Context | None = None) -> Session:
    """A session after its handshake, with nothing verified."""
    sock = socket.create_connection((address.host, address.port), timeout=SOON)
    session = Session(sock, context or tls_context(identity, server=False), server=False)
    try:
        session.handshake(Deadline(SOON))
    except ObfuscaTuneError:
        session.close()
        raise
    return session


def read_message(session: Session) -> bytes:
    """A whole message, whatever it is."""
    header = session._take(HEADER_BYTES, Deadline(SOON))
    return header + session._take(int.from_bytes(header[8:], "big"), Deadline(SOON))


class Adversary:
    """Listens where the client connects, with an identity of its choice, and answers as `act` does."""

    def __init__(self, identity: Identity, act: Callable[[Session], None]) -> None:
        self.refused: ObfuscaTuneError | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SOON)
        self.address = TcpAddress("127.0.0.1", self._listener.getsockname()[1])
        self._context, self._act = tls_context(identity, server=True), act
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        session = Session(self._listener.accept()[0], self._context, server=True)
        try:
            session.handshake(Deadline(SOON))
            self._act(session)
        except ObfuscaTuneError as error:
            self.refused = error
        finally:
            session.end()

    def __enter__(self) -> Adversary:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(2 * SOON)
        self._listener.close()


class Relay:
    """Relays messages between a client and an enclave, decrypting and encrypting them on the way."""

    def __init__(
        self,
        enclave: TcpAddress,
        towards_enclave: Identity,
        change: Callable[[bytes], bytes] = lambda message: message,
    ) -> None:
        self.passed: list[bytes] = []
        self._enclave, self._identity, self._change = enclave, towards_enclave, change

    def __call__(self, client: Session) -> None:
        enclave = open_session(self._enclave, self._identity)
        try:
            while True:
                for source, target in ((client, enclave), (enclave, client)):
                    message = self._change(read_message(source))
                    self.passed.append(message)
                    target.send(message, Deadline(SOON))
        finally:
            enclave.end()


def evidence_message(claims: Claims, evidence: Evidence) -> bytes:
    return pack(MessageType.EVIDENCE, {"claims": claims.to_document(), "evidence": evidence.to_document()})


@contextmanager
def forwarded(address: TcpAddress) -> Iterator[TcpAddress]:
    """Bytes forwarded as they are: the network, as it should be."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(SOON)
    pumps: list[threading.Thread] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):  # either end may be gone first
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve() -> None:
        near = listener.accept()[0]
        far = socket.create_connection((address.host, address.port), timeout=SOON)
        back = threading.Thread(target=pump, args=(far, near))
        pumps.append(back)
        back.start()
        pump(near, far)
        back.join(SOON)
        near.close()
        far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield TcpAddress("127.0.0.1", listener.getsockname()[1])
    thread.join(2 * SOON)
    listener.close()
