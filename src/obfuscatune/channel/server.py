"""The enclave's end: gives evidence to whoever asks, and hands to the service what was released to it.

A thread for each connection, a bounded number of them, each step of a session under a deadline. Who asks is known by
the key of his certificate; what he may do is for the service to decide.
"""

import contextlib
import logging
import select
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from obfuscatune import documents
from obfuscatune.attest.binding import Binding
from obfuscatune.attest.claims import ROLE, Claims
from obfuscatune.attest.evidence import Producer
from obfuscatune.channel.grants import Consent, Grant, Revocation
from obfuscatune.channel.hpke import release_info, unseal
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.messages import MOST_REQUESTS, Hello, MessageType, Reply, Request, pack, pack_error
from obfuscatune.channel.session import Session, SessionStopped, tls_context
from obfuscatune.errors import (
    ChannelError,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    EvidenceError,
    IntegrityError,
    ObfuscaTuneError,
    TermsError,
)
from obfuscatune.protocol.addresses import TcpAddress
from obfuscatune.protocol.limits import STALL_SECONDS
from obfuscatune.protocol.sockets import Deadline, tune

log = logging.getLogger(__name__)

_BACKLOG = 64
_AFTER_CUT_SECONDS = 1.0
_WITHOUT_RESOURCES_SECONDS = 0.1


class Handler(Protocol):
    """What the service does with what comes. A peer is named by the fingerprint of the key that it proved to have.

    Each returns what the peer is told, as a document. `TermsError` and `IntegrityError` reach the peer with their
    text; so does any other error of ours; of what is none of ours the peer learns nothing.
    """

    def granted(self, peer: str, grant: Grant, key: bytes) -> dict[str, Any]:
        """A provider granted the use of a model, and released the key of its bundle. `peer` signed the grant."""

    def owner_key(self, peer: str, certificate: bytes, key: bytes) -> dict[str, Any]:
        """An owner released his state key. `certificate` (PEM) is the one whose key `peer` names."""

    def revoke(self, peer: str, revocation: Revocation) -> dict[str, Any]:
        """A provider took a grant back. `peer` signed it."""

    def consent(self, peer: str, consent: Consent) -> dict[str, Any]:
        """A provider lets an adapter leave. `peer` signed it."""

    def status(self, peer: str) -> dict[str, Any]:
        """What the peer may know of what is his."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """In seconds, but for the number of connections."""

    connections: int = 32
    """At a time; one more is closed at once."""
    step_s: float = 10.0
    """TLS handshake, HELLO, and each message that we send."""
    idle_s: float = 60.0
    """From one answer to the end of the next request."""
    session_s: float = 600.0
    """The whole session. What was verified longer ago than that is to be verified again."""


class ChannelServer:
    """Serves the attested channel from `start` to `stop`.

    Args:
        address: port 0 lets the system choose.
        identity: of the enclave, made when it started; the key never leaves it.
        claims: what the enclave says of itself; `claims.hpke_key` belongs to `hpke_key`.
        producer: the platform's evidence.
        handler: the service.

    Raises:
        ConfigError: the address cannot be bound, or the claims name another key.
    """

    def __init__(
        self,
        address: TcpAddress,
        identity: Identity,
        claims: Claims,
        producer: Producer,
        handler: Handler,
        hpke_key: X25519PrivateKey,
        limits: ServerLimits | None = None,
    ) -> None:
        if hpke_key.public_key().public_bytes_raw().hex() != claims.hpke_key:
            raise ConfigError("the claims name another HPKE key than the enclave's")
        self._identity, self._claims, self._producer, self._handler = identity, claims, producer, handler
        self._hpke_key, self._limits = hpke_key, limits or ServerLimits()
        self._context = tls_context(identity, server=True)
        self._producing = threading.Lock()
        self._lock = threading.Lock()
        self._sessions: dict[threading.Thread, Session] = {}
        self._stopping = False
        self._listener = _listen(address)
        self._wake, self._waker = socket.socketpair()
        self.address = TcpAddress(address.host, int(self._listener.getsockname()[1]))
        """Where it listens."""
        self._acceptor = threading.Thread(target=self._accept, name="attested channel", daemon=True)

    def start(self) -> "ChannelServer":
        """Begin to accept."""
        self._acceptor.start()
        return self

    def __enter__(self) -> "ChannelServer":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def sessions(self) -> int:
        """How many there are now."""
        with self._lock:
            return len(self._sessions)

    def stop(self, grace_s: float = 5.0) -> None:
        """Accept no more, let requests that are being answered end, and close. Twice is once."""
        with self._lock:
            self._stopping = True
            sessions = dict(self._sessions)
        with contextlib.suppress(OSError):
            self._waker.send(b"x")
        ends = time.monotonic() + grace_s
        for thread, session in sessions.items():
            thread.join(max(0.0, ends - time.monotonic()))
            if thread.is_alive():
                session.cut()
                thread.join(_AFTER_CUT_SECONDS)  # one that is in the handler ends with it
        if self._acceptor.is_alive():
            self._acceptor.join()
        for sock in (self._listener, self._wake, self._waker):
            sock.close()

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake.fileno() in ready:
                return
            try:
                sock, peer = self._listener.accept()
            except OSError:  # the peer went away, or the system has no descriptor: it would be ready again at once
                time.sleep(_WITHOUT_RESOURCES_SECONDS)
                continue
            try:
                self._open(sock, f"{peer[0]}:{peer[1]}")
            except (OSError, RuntimeError) as error:  # no thread could be started
                log.warning("attested channel: %s:%s was not served: %s", peer[0], peer[1], error)
                sock.close()

    def _open(self, sock: socket.socket, peer: str) -> None:
        tune(sock, STALL_SECONDS)
        session = Session(sock, self._context, server=True, stop=self._wake)
        thread = threading.Thread(target=self._run, args=(session, peer), name=f"channel {peer}", daemon=True)
        with self._lock:
            if self._stopping or len(self._sessions) >= self._limits.connections:
                raise OSError("as many connections as may be are open")
            self._sessions[thread] = session
            try:
                thread.start()
            except RuntimeError:
                del self._sessions[thread]
                raise

    def _run(self, session: Session, peer: str) -> None:
        last_words = b""
        try:
            self._serve(session)
        except SessionStopped:
            last_words = pack_error("stopping", "the enclave stops")
        except ConnectionLost as error:
            log.info("attested channel: %s: %s", peer, error)
        except DeadlineExceeded as error:
            log.info("attested channel: %s: %s", peer, error)
            last_words = pack_error("deadline", "the session or a step of it took too long")
        except ChannelError as error:
            log.info("attested channel: %s: %s", peer, error)
            last_words = pack_error("malformed", str(error))
        except EvidenceError as error:
            log.error("attested channel: %s: no evidence: %s", peer, error)  # noqa: TRY400  the cause is in the text
            last_words = pack_error("evidence", "the enclave's platform gives no evidence")
        except Exception as error:  # noqa: BLE001  its text is not logged: it may quote what a peer released
            log.error("attested channel: %s: unexpected %s", peer, type(error).__name__)  # noqa: TRY400
            last_words = pack_error("internal", "a fault of the enclave's")
        finally:
            session.end(last_words)
            with self._lock:
                del self._sessions[threading.current_thread()]

    def _serve(self, session: Session) -> None:
        life, limits = Deadline(self._limits.session_s), self._limits
        session.handshake(_within(life, limits.step_s))
        hello = Hello.parse(session.receive(MessageType.HELLO, _within(life, limits.step_s)))
        if hello.role != ROLE:
            raise ChannelError(f"this is the {ROLE}, and has no evidence of another role")
        exporter = session.exporter(hello.nonce)
        binding = Binding(exporter, bytes.fromhex(self._identity.fingerprint), session.peer_key, hello.nonce)
        report_data = binding.report_data(self._claims)
        with self._producing:  # platforms answer one at a time
            evidence = self._producer.attest(report_data)
        body = {"claims": self._claims.to_document(), "evidence": evidence.to_document()}
        session.send(pack(MessageType.EVIDENCE, body), _within(life, limits.step_s))
        for sequence in range(1, MOST_REQUESTS + 1):
            request = Request.parse(session.receive(MessageType.REQUEST, _within(life, limits.idle_s)), sequence)
            info = release_info(request.kind, report_data, sequence, documents.canonical(request.document))
            key = None if request.sealed is None else unseal(request.sealed, self._hpke_key, info)
            reply = self._answer(session, request, key)
            session.send(reply.pack(), Deadline(limits.step_s))
        raise ChannelError(f"a session has at most {MOST_REQUESTS} requests")

    def _answer(self, session: Session, request: Request, key: bytes | None) -> Reply:
        peer = session.peer_key.hex()
        try:
            return Reply(request.sequence, self._handle(peer, session.peer_certificate, request, key))
        except TermsError as error:
            refusal = "terms", str(error)
        except IntegrityError as error:
            refusal = "integrity", str(error)
        except ObfuscaTuneError as error:
            refusal = "refused", str(error)
        except Exception as error:  # noqa: BLE001  as in `_run`
            log.error("attested channel: %s: unexpected %s", request.kind, type(error).__name__)  # noqa: TRY400
            refusal = "internal", "a fault of the enclave's"
        log.info("attested channel: %s of %s: %s", request.kind, peer, refusal[1])
        return Reply(request.sequence, None, refusal)

    def _handle(self, peer: str, certificate: bytes, request: Request, key: bytes | None) -> dict[str, Any]:
        document, handler = request.document, self._handler
        if request.kind == "grant" and key is not None:
            return handler.granted(peer, Grant.from_signed(document, peer), key)
        if request.kind == "revoke":
            return handler.revoke(peer, Revocation.from_signed(document, peer))
        if request.kind == "consent":
            return handler.consent(peer, Consent.from_signed(document, peer))
        if document:
            raise IntegrityError(f"{request.kind} comes with an empty document")
        if request.kind == "owner-key" and key is not None:
            return handler.owner_key(peer, certificate, key)
        return handler.status(peer)


def _within(life: Deadline, seconds: float) -> Deadline:
    left = life.remaining()
    return Deadline(seconds if left is None else min(seconds, left))


def _listen(address: TcpAddress) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        listener = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(f"cannot listen at {address}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener
