"""The end that verifies: no request and no secret goes out before the enclave's evidence was accepted.

Whatever breaks the session closes it, and it stays closed: a new one is verified anew.
"""

import secrets
import socket
import time
from collections.abc import Callable, Collection
from typing import Any, Self

from obfuscatune import documents
from obfuscatune.attest.binding import NONCE_BYTES, Binding
from obfuscatune.attest.claims import ROLE, Claims
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import Policy
from obfuscatune.attest.record import Session as AttestedSession
from obfuscatune.attest.record import Verification
from obfuscatune.attest.verification import Verified
from obfuscatune.channel.hpke import release_info, seal
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.messages import KINDS, Hello, MessageType, Reply, Request, parse_body
from obfuscatune.channel.session import Session, tls_context
from obfuscatune.errors import (
    ChannelError,
    ConnectionLost,
    IntegrityError,
    TermsError,
    UntrustedPeer,
    VerificationFailed,
)
from obfuscatune.protocol.addresses import TcpAddress
from obfuscatune.protocol.limits import UNREACHABLE_SECONDS
from obfuscatune.protocol.sockets import Deadline, tune

CONNECT_SECONDS = 30.0
REQUEST_SECONDS = 120.0


class Attested:
    """A session with an enclave that was verified. One thread at a time uses it.

    Attributes:
        verified: the claims, and every check that was made.
        record: evidence, claims, binding and policy: what `verification document`s are made of.
        enclave_key: fingerprint of the enclave's TLS key.
    """

    def __init__(self, session: Session, verified: Verified, record: Verification, clock: Callable[[], float]) -> None:
        self.verified, self.record = verified, record
        self.enclave_key = record.session.binding.attester.hex()
        self._session, self._clock = session, clock
        self._sequence = 0
        self._open = True

    @classmethod
    def connect(
        cls,
        address: TcpAddress,
        identity: Identity,
        policy: Policy,
        *,
        pinned: Collection[str] | None = None,
        complete: Callable[[Evidence, int], Evidence] | None = None,
        clock: Callable[[], float] = time.time,
        seconds: float = CONNECT_SECONDS,
    ) -> Self:
        """Connect, and verify before anything is sent but a nonce.

        Args:
            address: where the enclave is said to be.
            identity: ours: by its key the enclave knows us.
            policy: what is accepted.
            pinned: fingerprints of the keys that the enclave may have besides; None for any.
            complete: adds to evidence what its verifier needs: `CollateralCache.complete`.
            clock: Unix seconds.
            seconds: for all of it.

        Raises:
            VerificationFailed: the policy refuses the enclave. It carries every check.
            EvidenceError, ChannelError: what came is no evidence, or no message.
            UntrustedPeer: the enclave's key is not pinned.
            ConnectionLost, DeadlineExceeded: nobody answers.
        """
        deadline = Deadline(seconds)
        context = tls_context(identity, server=False)
        session = Session(_connected(address, deadline), context, server=False)
        try:
            session.handshake(deadline)
            if pinned is not None and session.peer_key.hex() not in pinned:
                raise UntrustedPeer(f"the enclave's key is {session.peer_key.hex()}, which is not pinned here")
            nonce = secrets.token_bytes(NONCE_BYTES)
            # Of this very session: nothing here is taken from the peer's word.
            binding = Binding(session.exporter(nonce), session.peer_key, bytes.fromhex(identity.fingerprint), nonce)
            session.send(Hello(ROLE, nonce).pack(), deadline)
            body = parse_body(session.receive(MessageType.EVIDENCE, deadline), frozenset({"claims", "evidence"}))
            if not isinstance(body["claims"], dict) or not isinstance(body["evidence"], dict):
                raise ChannelError("claims and evidence are objects")
            claims = Claims.from_document(body["claims"])
            evidence, now = Evidence.from_document(body["evidence"]), int(clock())
            if complete is not None:
                evidence = complete(evidence, now)
            attested = AttestedSession(evidence, claims, binding, now)
            verified = attested.verify(policy, now)
        except BaseException:
            session.end()
            raise
        return cls(session, verified, Verification(attested, policy, now, verified.checks), clock)

    def request(self, kind: str, document: dict[str, Any], *, seconds: float = REQUEST_SECONDS) -> dict[str, Any]:
        """Ask for something that no secret goes with: revoke, consent, status.

        Raises:
            TermsError, IntegrityError: the enclave refuses it, in its words. The session goes on.
            VerificationFailed: what was verified has expired.
            ChannelError, ConnectionLost, DeadlineExceeded: the session is over.
        """
        return self._ask(kind, document, None, seconds)

    def release(
        self, kind: str, document: dict[str, Any], secret: bytes, *, seconds: float = REQUEST_SECONDS
    ) -> dict[str, Any]:
        """Release a secret to the verified enclave, for this request alone: grant, owner-key.

        Raises:
            As `request`.
        """
        return self._ask(kind, document, secret, seconds)

    def close(self) -> None:
        """End the session. Twice is once."""
        if self._open:
            self._open = False
            self._session.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, kind: str, document: dict[str, Any], secret: bytes | None, seconds: float) -> dict[str, Any]:
        if KINDS.get(kind) is not (secret is not None):
            raise ChannelError(f"{kind!r} is no request {'without' if secret is None else 'with'} a secret")
        if not self._open:
            raise ChannelError("the session is over: connect, and verify, anew")
        try:
            now = int(self._clock())
            if not self.verified.time <= now < self.verified.expires:
                raise VerificationFailed("what was verified has expired: connect, and verify, anew")
            reply = self._exchange(kind, document, secret, Deadline(seconds))
        except BaseException:
            self.close()
            raise
        if reply.refusal is not None:
            code, text = reply.refusal
            raised = {"terms": TermsError, "integrity": IntegrityError}.get(code, ChannelError)
            raise raised(f"the enclave refuses {kind}: {text}")
        return reply.result or {}

    def _exchange(self, kind: str, document: dict[str, Any], secret: bytes | None, deadline: Deadline) -> Reply:
        self._sequence += 1
        sealed = None
        if secret is not None:
            info = release_info(kind, self.verified.report_data, self._sequence, documents.canonical(document))
            sealed = seal(secret, bytes.fromhex(self.verified.claims.hpke_key), info)
        self._session.send(Request(self._sequence, kind, document, sealed).pack(), deadline)
        return Reply.parse(self._session.receive(MessageType.REPLY, deadline), self._sequence)


def _connected(address: TcpAddress, deadline: Deadline) -> socket.socket:
    try:
        sock = socket.create_connection((address.host, address.port), timeout=deadline.remaining())
    except OSError as error:
        raise ConnectionLost(f"no enclave answers at {address}: {error.strerror or error}") from error
    tune(sock, UNREACHABLE_SECONDS)
    return sock
